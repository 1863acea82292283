"""The state that all layers of a cache share: tokens seen, where positions begin, and the pass under way."""

import contextlib

import torch
from transformers.utils import is_torchdynamo_compiling

from .layers import Ring, SinkLayer
from .plan import Pass, Plan
from .rotation import Rotation
from .sinks import Sinks
from .window import Window

KINDS = ("keys", "values")


class Stream:
    """What the layers of a cache share.

    A pass is open (`current`) from `begin` until the last layer calls `commit`. Lists have one number for each row, or a single
    number where all rows are alike.

    Args:
        window: the window of layers that have no shorter one of their own.
        layers: `LayerTraits` of each attention layer, by the number of the layer.

    Attributes:
        num_seen: tokens seen before the open pass.
        base: number that is subtracted from token numbers to get positions.
        has_begun: a layer has carried out its part of the open pass.
        plans: of the open pass, for each place.
        done: a pass that has ended and is not yet part of `num_seen`. (A compiled pass can say no more than that it has ended.)
        ids: ids of the tokens held, as a ring that does not move; `knows_ids` is False if some tokens came without ids.
        places: the layers, and the groups of sinks that move alike, of each window and device. The place of `ids` comes first.
        shortest_length: length of the shortest window.
        is_torn: a change of all layers was interrupted, so that they do not agree.
        num_recorded: tokens that can be rolled back.
        num_intact: the longest text that can be rolled back without a log: nothing of it has been evicted.
    """

    def __init__(self, window: Window, layers: dict):
        self.ids = self.new_ring(window, Rotation.identity(1), (1, 1), torch.long, next(iter(layers.values())).device)
        self.layers: dict[int, SinkLayer] = {}
        self.places: dict[tuple[Window, torch.device], tuple[list[SinkLayer], list[Sinks]]] = {}
        self.places[window, self.ids.slots.device] = [], []
        alike: dict[tuple, list[Ring]] = {}
        for index, traits in layers.items():
            keeps_native = traits.native_window is not None and traits.native_window <= window.length
            own = Window(traits.native_window, 0) if keeps_native else window  # a layer was trained with its native window
            hows = [(rotation, shape, traits.dtype, traits.device) for rotation, shape in zip(traits.rotations, traits.shapes)]
            rings = [self.new_ring(own, *how, kind=kind) for kind, how in zip(KINDS, hows)]
            self.layers[index] = SinkLayer(own, rings, self, is_sliding=traits.native_window == own.length)
            self.places.setdefault((own, traits.device), ([], []))[0].append(self.layers[index])
            for ring in rings:
                if own.num_sinks > 0 and not ring.rotation.is_identity:
                    key = own, traits.device, traits.dtype, ring.slots.shape, ring.rotation.fingerprint
                    alike.setdefault(key, []).append(ring)
        self.groups = [self.new_sinks(rings) for rings in alike.values()]
        for place, group in zip(alike, self.groups):
            self.places[place[:2]][1].append(group)
        self.rings = [ring for layer in self.layers.values() for ring in layer.rings]
        self.first_layer, self.last_layer = min(layers), max(layers)
        self.shortest_length = self.num_intact = min(window.length for window, _ in self.places)
        self.clear()

    # Other ways to hold a window replace these three.

    new_sinks, plan_of = Sinks, Plan

    def new_ring(self, window: Window, *how, kind: str | None = None) -> Ring:
        """For the keys or the values of a layer, or (kind None) for ids. `how` are the other arguments of a `Ring`."""
        return Ring(window, *how)

    @property
    def num_tokens(self) -> list[int]:
        """Tokens seen, by the pass that has ended last too."""
        return self.num_seen if self.done is None else self.done.num_after

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that it holds."""
        return [tensor for each in (*self.rings, self.ids, *self.groups) for tensor in each.tensors]

    # The pass

    def next_pass(self, traits, num_new: list[int], batch_size: int, num_columns: int, num_parts: int, is_prepared: bool) -> Pass:
        """What the next forward call brings. Nothing is changed.

        The base of a row is rarely raised, and then so that positions go on from `window_length`: they stay small, so that
        float32 angles are exact, and the frequencies of all RoPE types are those of short texts. Then a key is rotated back, and
        so rounded: once in `window_length` tokens, or once a pass if a pass takes more positions than the model has left.
        """
        num_seen, base, limit = self.num_seen, self.base, traits.max_positions
        if len(num_new) > 1 or len(num_seen) > 1:
            num_new, num_seen, base = (x if len(x) == batch_size else x * batch_size for x in (num_new, num_seen, base))
        num_after, bases = [seen + new for seen, new in zip(num_seen, num_new)], []
        for seen, after, start in zip(num_seen, num_after, base) if is_prepared else ():
            is_due = seen - start >= traits.rebase_at or (limit is not None and after - start > limit)
            lowest = min(seen, self.ids.window.length)  # else sinks would stand before position 0; met only after a roll-back
            bases.append(seen - lowest if is_due or seen - start < lowest else start)
        counts = num_seen, num_new, num_after, bases if is_prepared and bases != base else base
        if len(num_new) > 1 and len(set(zip(*counts))) == 1:  # all rows alike: one number serves them all
            counts = [numbers[:1] for numbers in counts]
        is_recorded = self.is_recording or num_columns == 1 and self.num_intact in num_seen  # if given up, nothing is lost
        return Pass(*counts, batch_size, num_columns, num_parts, traits.is_ordered, is_prepared, is_recorded)

    def begin(self, current: Pass, input_ids: torch.Tensor | None) -> None:
        """Open a pass, for which all checks have been made."""
        if self.batch_size == -1:
            self.allocate(current.batch_size)
        if current.base is not self.base:
            self._rebase(current.base)
        self.num_seen, self.base = current.num_seen, current.base
        self.current, self.has_begun, self.input_ids, self.plans = current, False, input_ids, []
        for (window, device), (layers, groups) in self.places.items():
            plan = self.plan_of(window, current, device)
            self.plans.append(plan)
            for layer in layers:
                layer.plan, layer.kv_length = plan, plan.kv_length
            for sinks in groups:
                sinks.begin(plan)

    def commit(self) -> None:
        """The last layer has carried out its part: the pass is done."""
        self.current, self.done = None, self.current
        if not is_torchdynamo_compiling():
            self.settle()

    def settle(self) -> None:
        """Make the pass that is done part of what was seen. (What is repeated after an interrupt changes nothing more.)"""
        done, ids, num_recorded = self.done, self.input_ids, 0
        self.knows_ids = ids is not None and (self.knows_ids or not any(done.num_seen))
        if self.knows_ids:
            self.ids.update(self.plans[0], ids[:, None, :, None].to(self.ids.slots))
        for sinks in self.groups:
            sinks.for_queries = None  # memory of a long pass
            if sinks.are_new:
                sinks.keep()
        if self.is_recording and all(layer.plan.can_be_undone for layer in self.layers.values()):
            num_recorded = self.num_recorded + min(done.num_new)
        elif done.is_recorded or self.num_recorded:  # what a pass evicts that is not recorded can't be put back behind it
            self.forget_recorded()
        self.num_seen, self.num_recorded, self.done, self.input_ids = done.num_after, num_recorded, None, None
        self.plans = []
        for layer in self.layers.values():  # memory of a long pass
            layer.plan = None

    def give_up(self) -> None:
        """The open pass was interrupted, and can be begun anew: what was recorded of it is put back."""
        if self.current.is_recorded:
            self.undo(self.num_seen)
            if not self.is_recording:
                self.forget_recorded()
        self.current = None

    def _rebase(self, base: list[int]) -> None:
        num_rows = max(len(base), len(self.base))
        before, after = (each * (num_rows // len(each)) for each in (self.base, base))
        if after == before:
            return
        lowered = [[[new - old]] for new, old in zip(after, before)]
        num_positions = {device: torch.tensor(lowered, device=device) for _, device in self.places}
        with self.changing():
            for ring in self.rings:
                if not ring.rotation.is_identity:
                    ring.rebase(num_positions[ring.slots.device])
            self.base = base

    @contextlib.contextmanager
    def changing(self):
        """For a change of all layers. If it is interrupted, the cache is refused until `reset()`."""
        self.is_torn = True
        yield
        self.is_torn = False

    # Roll-back

    def undo(self, num_tokens: list[int]) -> None:
        """Take back all recorded tokens of each row from `num_tokens` on."""
        with self.changing():
            for ring in (*self.rings, self.ids):
                ring.undo(num_tokens)
            self.num_seen = num_tokens

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
        """Row i becomes a copy of row `index[i]`."""
        if len(self.num_seen) > 1:
            self.num_seen, self.base = ([numbers[row] for row in index.tolist()] for numbers in (self.num_seen, self.base))
        for ring in (*self.rings, self.ids):
            ring.select_rows(index.to(ring.slots.device))
        for sinks in self.groups:
            sinks.select_rows(index.to(sinks.pristine.device))
        self.batch_size = len(index)
        self.forget_recorded()

    def clear(self) -> None:
        """As before the first token."""
        self.num_seen, self.base = [0], [0]
        self.current: Pass | None = None
        self.done: Pass | None = None
        self.input_ids, self.plans, self.num_recorded = None, [], 0
        self.has_begun, self.is_torn, self.is_recording, self.knows_ids = False, False, False, True
        self.allocate(0)
        self.batch_size = -1
