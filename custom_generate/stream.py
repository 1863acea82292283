"""The state that all layers of a cache share: tokens seen, where positions begin, and the pass under way."""

import torch
from transformers.utils import is_torchdynamo_compiling

from .layers import Ring, SinkLayer, Sinks
from .plan import Pass, Plan
from .rotation import Rotation
from .window import Window

KINDS = ("keys", "values")


class Stream:
    """What the layers of a cache share.

    A pass is open (`current`) from `begin` until the last layer calls `commit`. Lists have one number for each row, or a single number
    where all rows are alike.

    Args:
        window: the window of layers that have no shorter one of their own.
        layers: `LayerTraits` of each attention layer, by the number of the layer.

    Attributes:
        num_seen: tokens seen before the open pass.
        base: number that is subtracted from token numbers to get positions.
        has_begun: a layer has carried out its part of the open pass.
        done: a pass that has ended and is not yet part of `num_seen`. (A compiled pass can say no more than that it has ended.)
        ids: ids of the tokens held, as a ring that does not move; `knows_ids` is False if some tokens came without ids.
        places: the layers, and the sinks that move alike, of each window and device.
        num_recorded: tokens that can be rolled back.
    """

    def __init__(self, window: Window, layers: dict):
        self.ids = self.new_ring(window, Rotation.identity(1), (1, 1), torch.long, next(iter(layers.values())).device)
        self.layers: dict[int, SinkLayer] = {}
        self.places: dict[tuple, tuple[list[SinkLayer], list[Sinks]]] = {self._place(self.ids): ([], [])}  # ids come first
        alike: dict[tuple, list[Ring]] = {}
        for index, traits in layers.items():
            own = native_window(traits.native_window, window)
            kinds = zip(KINDS, traits.rotations, traits.shapes)
            rings = [self.new_ring(own, rotation, shape, traits.dtype, traits.device, kind=kind) for kind, rotation, shape in kinds]
            self.layers[index] = SinkLayer(own, rings, self, is_sliding=traits.native_window == own.length)
            self.places.setdefault(self._place(rings[0]), ([], []))[0].append(self.layers[index])
            for ring in rings:
                if own.num_sinks > 0 and not ring.rotation.is_identity:
                    key = own, ring.rotation.fingerprint, ring.slots.shape, ring.slots.dtype, ring.slots.device
                    alike.setdefault(key, []).append(ring)
        for rings in alike.values():
            self.places[self._place(rings[0])][1].append(self.new_sinks(rings))
        self.first_layer, self.last_layer = min(layers), max(layers)
        self.clear()

    # Other ways to hold a window replace these three.

    def new_ring(self, window: Window, *how, kind: str | None = None) -> Ring:
        """For the keys or the values of a layer, or (kind None) for ids. `how` are the other arguments of a `Ring`."""
        return Ring(window, *how)

    def new_sinks(self, rings: list[Ring]) -> Sinks:
        return Sinks(rings)

    def plan_of(self, current: Pass, window: Window, device: torch.device) -> Plan:
        return Plan(window, current, device)

    # The pass

    @property
    def num_tokens(self) -> list[int]:
        """Tokens seen, by the pass that has ended last too."""
        return self.num_seen if self.done is None else self.done.num_after

    @property
    def rings(self) -> list[Ring]:
        return [ring for layer in self.layers.values() for ring in layer.rings]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that it holds."""
        held = [tensor for ring in (*self.rings, self.ids) for tensor in ring.tensors]
        return held + [tensor for sinks in self.groups for tensor in sinks.tensors]

    @property
    def groups(self) -> list[Sinks]:
        return [sinks for _, groups in self.places.values() for sinks in groups]

    def rings_at(self, window: Window, device: torch.device) -> list[Ring]:
        layers, _ = self.places[window, device]
        ids = [self.ids] if self._place(self.ids) == (window, device) else []
        return [ring for layer in layers for ring in layer.rings] + ids

    def begin(self, current: Pass) -> None:
        """Open a pass, for which all checks have been made."""
        if self.batch_size == -1:
            self.allocate(current.batch_size)
        if current.base is not self.base:
            self._rebase(current.base)
        self.num_seen, self.base = current.num_seen, current.base
        self.current, self.has_begun = current, False
        self.ids_plan = None
        for (window, device), (layers, groups) in self.places.items():
            plan = self.plan_of(current, window, device)
            self.ids_plan = self.ids_plan or plan  # ids are in the first place
            for layer in layers:
                layer.plan = plan
            for sinks in groups:
                sinks.begin(plan)

    def commit(self) -> None:
        """The last layer has carried out its part: the pass is done."""
        self.current, self.done = None, self.current
        if not is_torchdynamo_compiling():
            self.settle()

    def settle(self) -> None:
        """Make a pass that is done part of what was seen."""
        if self.done is None:
            return
        done, plan, self.done = self.done, self.ids_plan, None
        self.knows_ids &= done.input_ids is not None
        if self.knows_ids:
            self.ids.update(plan, done.input_ids[:, None, :, None].to(self.ids.slots.device))
        for sinks in self.groups:
            sinks.for_queries = None  # memory of a long pass
        if done.is_recorded:
            self.num_recorded += min(done.num_new)
            if not all(ring.can_undo(layer.plan) for layer in self.layers.values() for ring in layer.rings):
                self.forget_recorded()
        self.num_seen = done.num_after

    def give_up(self) -> None:
        """The open pass was interrupted, and can be begun anew: what was recorded of it is put back."""
        if self.current is not None and self.current.is_recorded:
            self.undo(self.num_seen)
        self.current = None

    def _rebase(self, base: list[int]) -> None:
        """Lower positions to a new base."""
        num_rows = max(len(base), len(self.base))
        before, after = (each * (num_rows // len(each)) for each in (self.base, base))
        num_positions = torch.tensor(after) - torch.tensor(before)
        if bool(num_positions.any()):
            for ring in self.rings:
                if not ring.rotation.is_identity:
                    ring.rebase(num_positions[:, None, None].to(ring.slots.device))

    # Roll-back

    def undo(self, num_tokens: list[int]) -> None:
        """Take back all recorded tokens of each row from `num_tokens` on."""
        for ring in (*self.rings, self.ids):
            ring.undo(num_tokens)

    def forget_recorded(self) -> None:
        """What recorded passes have brought stands."""
        self.num_recorded = 0
        for ring in (*self.rings, self.ids):
            ring.forget()

    # The batch

    def allocate(self, batch_size: int) -> None:
        """Begin with no tokens, and room for so many rows."""
        self.batch_size = batch_size
        for each in (*self.rings, self.ids, *self.groups):
            each.allocate(batch_size)

    def select_rows(self, index: torch.Tensor) -> None:
        """What stands beside the layers: row i becomes a copy of row `index[i]`."""
        if len(self.num_seen) > 1:
            rows = index.tolist()
            self.num_seen, self.base = [self.num_seen[row] for row in rows], [self.base[row] for row in rows]
        self.ids.select_rows(index.to(self.ids.slots.device))
        for sinks in self.groups:
            sinks.select_rows(index.to(sinks.rings[0].slots.device))
        self.batch_size = len(index)
        self.forget_recorded()

    def clear(self) -> None:
        """As before the first token."""
        self.num_seen, self.base = [0], [0]
        self.current: Pass | None = None
        self.done: Pass | None = None
        self.has_begun, self.is_recording, self.knows_ids, self.ids_plan = False, False, True, None
        self.num_recorded = 0
        self.allocate(0)
        self.batch_size = -1

    @staticmethod
    def _place(ring: Ring) -> tuple[Window, torch.device]:
        return ring.window, ring.slots.device


def native_window(native_length: int | None, window: Window) -> Window:
    """A native window that is not longer stays as it is, without sinks: the layer was trained so."""
    return window if native_length is None or native_length > window.length else Window(native_length, 0)


def next_base(num_seen: list[int], num_after: list[int], base: list[int], traits, window_length: int) -> list[int]:
    """The base of each row for a pass: rarely raised, and then so that positions go on from `window_length`.

    Positions stay small, so that float32 angles are exact, and the frequencies of all RoPE types are those of short texts. A key is
    rotated back, and so rounded, at most once in `window_length` tokens.
    """
    bases, limit = [], traits.max_positions
    for seen, after, start in zip(num_seen, num_after, base):
        is_due = seen - start >= traits.rebase_at or (limit is not None and after - start > limit)
        lowest = min(seen, window_length)  # else sinks would stand before position 0; met only after a roll-back
        bases.append(seen - lowest if is_due or seen - start < lowest else start)
    return base if bases == base else bases
