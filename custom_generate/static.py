"""A window that never moves in memory, for `torch.compile`: one graph serves every token of a stream.

What a pass over one token has to know stands in tensors (`Cursor`), which are changed in place before the pass: no number in the
graph changes from token to token. Passes over several tokens are those of `layers.py`.
"""

import torch

from .layers import Ring
from .plan import Pass, Plan, as_mask
from .rotation import rotate
from .sinks import Sinks
from .stream import Stream
from .window import Window


class Cursor:
    """The plan of a pass over one token for each row, in tensors that stay where they are.

    Attributes:
        slots: int64 `[batch, num_sinks + 1]`, the slots that a pass writes: the slots of the sinks, and of the token of each row.
        visible: `[batch, 1, 1, window_length]`, what its query sees: bool, or numbers that are added to the scores.
        is_new: `[batch, 1, 1, 1]`, whether a row brings a token, where `has_idle_rows`, which bring padding.
    """

    num_columns = num_parts = 1
    is_in_tensors = can_be_undone = True
    is_causal = False  # slots that are not in use yet are handed out too

    def __init__(self, window: Window, batch_size: int, device: torch.device):
        self.window, self.kv_length = window, window.length
        self.rows = torch.arange(batch_size, device=device)
        self.slots = torch.arange(window.num_sinks + 1, device=device).repeat(batch_size, 1)
        self.visible = torch.zeros(batch_size, 1, 1, window.length, dtype=torch.bool, device=device)
        self.shifts, self.writes_sinks, self._num_visible = [0], True, [0]
        self.is_new, self.has_idle_rows = torch.ones(batch_size, 1, 1, 1, dtype=torch.bool, device=device), False
        keep_in_place(*self.tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.rows, self.slots, self.visible, self.is_new]

    def move(self, current: Pass) -> None:
        """To the token of this pass."""
        window, num_seen, had_all_sinks = self.window, current.num_seen, not self.writes_sinks
        self.shifts = [window.shift(seen - start) for seen, start in zip(num_seen, current.base)]
        self.writes_sinks = min(num_seen) < window.num_sinks
        if len(num_seen) == 1 and had_all_sinks and not self.writes_sinks:
            self.slots[:, -1].fill_(window.slot(num_seen[0]))  # copies nothing to the device
        else:
            # No slot is written twice: a slot not yet in use takes the place of the slot of a sink that is the token itself.
            sinks = range(window.num_sinks)
            slots = [[*(j if j != seen else window.num_sinks for j in sinks), window.slot(seen)] for seen in num_seen]
            self.slots.copy_(torch.tensor(slots))
        self.has_idle_rows = min(current.num_new) == 0
        if self.has_idle_rows:
            self.is_new.copy_(torch.tensor(current.num_new)[:, None, None, None])
        num_visible = [min(max(after, 1), window.length) for after in current.num_after]
        if num_visible != self._num_visible:
            self._show(num_visible)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype != self.visible.dtype:  # for the first time, or after model.set_attn_implementation
            with torch.inference_mode(False):  # it can be changed later in any mode
                self.visible = torch.zeros_like(self.visible, dtype=dtype)
            keep_in_place(self.visible)
            self._show(self._num_visible)
        return self.visible

    def _show(self, num_visible: list[int]) -> None:
        self._num_visible = num_visible
        num_visible = torch.tensor(num_visible, device=self.rows.device)[:, None, None, None]
        visible = torch.arange(self.window.length, device=self.rows.device) < num_visible
        self.visible.copy_(as_mask(visible, self.visible.dtype))

    def write(self, held: torch.Tensor, new: torch.Tensor) -> None:
        """Put the token of each row, `[batch, heads, 1, head_dim]`, in its slot; the sinks too, if they stand in front of it."""
        slots = self.slots[:, -new.shape[2] :]
        if self.has_idle_rows:  # what stands where their next token goes may still be seen
            before = held[self.rows[:, None], :, slots[:, -1:]].transpose(1, 2)
            new = torch.cat([new[:, :, :-1], torch.where(self.is_new, new[:, :, -1:], before)], dim=2)
        if len(slots) == 1:
            held.index_copy_(2, slots[0], new)
        else:
            held[self.rows[:, None], :, slots] = new.transpose(1, 2)


class StaticRing(Ring):
    """A ring whose slots are allocated at once, and stay where they are."""

    def allocate(self, batch_size: int) -> None:
        if batch_size in (0, len(self.slots)):
            self.forget()  # the memory stays
            if batch_size:
                self.slots.zero_()  # no query sees what is left; but 0 * NaN is NaN
        else:
            super().allocate(batch_size, self.window.length)
            keep_in_place(self.slots)

    def views(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """All slots: a file then has as many bytes as will be allocated for it."""
        return super().views(self.window.length)

    def update(self, plan: Plan | Cursor, new: torch.Tensor, held: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(plan, Plan):
            return super().update(plan, new, held)
        if self.sinks is not None:
            sinks = rotate(self.sinks.pristine[:, self.number], self.sinks.turn)  # where the query of this pass needs them
            new = torch.cat([sinks.to(new.dtype), new], dim=2)  # one write, once it is compiled
        plan.write(self.slots, new)
        return self.slots

    def select_rows(self, index: torch.Tensor) -> None:
        super().select_rows(index)
        keep_in_place(self.slots)


class StaticSinks(Sinks):
    """Sinks that a pass over one token rotates within its graph, by cosines and sines in `turn`."""

    turn = torch.zeros(0)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors, self.turn]

    def begin(self, plan: Plan | Cursor) -> None:
        if isinstance(plan, Plan):
            return super().begin(plan)
        self.are_new = plan.writes_sinks
        if not all(plan.shifts):  # after a roll-back: sinks that do not move have to be there, even if the pass is interrupted
            self.move([0])
        cos_sin = self.cos_sin_at(plan.shifts).expand(-1, len(plan.rows), -1, -1, -1)
        if self.turn.shape != cos_sin.shape:
            self.turn = cos_sin.clone(memory_format=torch.contiguous_format)
            keep_in_place(self.turn)
        self.turn.copy_(cos_sin)
        self.moved_by = [-shift for shift in plan.shifts]  # not known: an interrupted pass moves the sinks of some layers only

    def allocate(self, batch_size: int) -> None:
        if self.pristine is not None and batch_size in (0, self.pristine.shape[2]):
            self.forget()
            if batch_size:
                self.pristine.zero_()
        else:
            super().allocate(batch_size)
            keep_in_place(self.pristine)

    def select_rows(self, index: torch.Tensor) -> None:
        super().select_rows(index)
        keep_in_place(self.pristine)


class StaticStream(Stream):
    """A stream whose passes over one token are plans in tensors."""

    new_sinks = StaticSinks

    def __init__(self, *args):
        self.cursors: dict[tuple[Window, torch.device], Cursor] = {}
        super().__init__(*args)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return super().tensors + [tensor for each in self.cursors.values() for tensor in each.tensors]

    def new_ring(self, window: Window, *how, kind: str | None = None) -> StaticRing:
        return StaticRing(window, *how)

    def plan_of(self, window: Window, current: Pass, device: torch.device) -> Plan | Cursor:
        if not (current.is_prepared and current.num_columns == max(current.num_new) == 1):
            return Plan(window, current, device)
        cursor = self.cursors.get((window, device))
        if cursor is None or len(cursor.rows) != current.batch_size:
            cursor = self.cursors[window, device] = Cursor(window, current.batch_size, device)
        cursor.move(current)
        return cursor

    def begin(self, current: Pass, input_ids: torch.Tensor | None) -> None:
        super().begin(current, input_ids)
        if current.is_recorded and self.plans[0].is_in_tensors:  # here, because a graph can't keep a log
            for ring in (*self.rings, self.ids):
                ring.record(Plan(ring.window, current, ring.slots.device), ring.slots)


def keep_in_place(*tensors: torch.Tensor) -> None:
    """Tell torch.compile that these are changed in place and never move, so that CUDA graphs can be made of what reads them."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)
