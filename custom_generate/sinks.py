"""The sinks, which move: before a pass they are rotated to where its queries need them."""

import torch

from .layers import Ring, selected
from .plan import Plan
from .rotation import rotate

NUM_SHIFTS_AHEAD = 16  # Rotations of the sinks that are computed in one go: one for each of the next tokens.


class Sinks:
    """The sinks of all rings that move alike: same window, rotation, shape, dtype and device.

    The sinks are kept as they came, and before a pass the sinks in the slots are rotated to where its query needs them, for all
    layers in one go: one rotation and one rounding, `num_sinks` keys a step, however long the text is.

    Attributes:
        pristine: the sinks as they came, with their partners: float32 `[2, layers, batch, heads, num_sinks, head_dim]`.
        moved_by: how far the sinks in the slots are from where they came: a number for each row, or a single one. Negative
            where that is not known (static.py).
        are_new: the pass writes some of them, so that they have to be kept when it is done.
        for_queries: cosines and sines that move the sinks for each query of a pass, `[2, rows, 1, columns, num_sinks, head_dim]`.
    """

    pristine: torch.Tensor | None = None

    def __init__(self, rings: list[Ring]):
        self.rings, self.window, self.rotation = rings, rings[0].window, rings[0].rotation
        for number, ring in enumerate(rings):
            ring.sinks, ring.number = self, number

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held beside the slots."""
        return [tensor for tensor in (self.pristine, self._ahead, self.for_queries) if tensor is not None]

    def allocate(self, batch_size: int) -> None:
        _, num_heads, _, head_dim = self.rings[0].slots.shape
        shape = 2, len(self.rings), batch_size, num_heads, self.window.num_sinks, head_dim
        self.pristine = torch.zeros(shape, dtype=torch.float32, device=self.rings[0].slots.device)
        self.forget()
        if batch_size > 0:
            self.cos_sin_at([0])

    def forget(self) -> None:
        self.moved_by, self.are_new, self.for_queries = [0], False, None
        self._views, self._viewed = [], None  # the slots of the sinks, and of the first ring all slots
        self._ahead, self._first_ahead = None, 0

    def begin(self, plan: Plan) -> None:
        """Before a pass: bring the sinks to where its queries need them, or say where that is for each query."""
        self.are_new, self.for_queries = plan.writes_sinks, None
        if plan.hands_out_slots:
            self.move(plan.shifts)
        else:
            self.move([0])
            self.for_queries = self.cos_sin(plan.shifts[:, None])

    def keep(self) -> None:
        now = torch.stack([ring.slots[:, :, : self.window.num_sinks] for ring in self.rings])
        if any(self.moved_by):  # some rows have moved sinks
            is_moved = torch.tensor(self.moved_by, device=now.device).bool()[:, None, None, None]
            now = torch.where(is_moved, self.pristine[0].to(now.dtype), now)
        self.pristine.copy_(torch.stack(self.rotation.pairs(now)))

    def move(self, shifts: list[int]) -> None:
        """Bring the sinks in the slots to `shifts` positions from where they came."""
        if shifts == self.moved_by or not (any(shifts) or any(self.moved_by)):
            return
        if self._viewed is not self.rings[0].slots:
            self._viewed = self.rings[0].slots
            self._views = [ring.slots[:, :, : self.window.num_sinks] for ring in self.rings]
        sinks = rotate(self.pristine, self.cos_sin_at(shifts)).to(self._viewed.dtype)
        torch._foreach_copy_(self._views, sinks.unbind())
        self.moved_by = shifts

    def cos_sin_at(self, shifts: list[int]) -> torch.Tensor:
        """`cos_sin` for a number a row, `[2, rows, 1, num_sinks, head_dim]`; for a single number, the next are computed ahead."""
        if len(shifts) > 1:
            return self.cos_sin(torch.tensor(shifts)[:, None])
        if self._ahead is None or not 0 <= shifts[0] - self._first_ahead < NUM_SHIFTS_AHEAD:
            ahead = torch.arange(shifts[0], shifts[0] + NUM_SHIFTS_AHEAD, device=self.rotation.frequency.device)
            self._ahead, self._first_ahead = self.cos_sin(ahead[:, None, None]), shifts[0]
        return self._ahead[:, shifts[0] - self._first_ahead]

    def cos_sin(self, shift: torch.Tensor) -> torch.Tensor:
        """Cosines and sines that move the sinks by `shift` positions: `[...]` -> `[2, ..., num_sinks, head_dim]`."""
        position = torch.arange(self.window.num_sinks, device=self.rotation.frequency.device)
        angles = self.rotation.angles(position, position + shift.to(position.device)[..., None])
        return torch.stack([angles.cos(), angles.sin()])

    def select_rows(self, index: torch.Tensor) -> None:
        self._views, self._viewed, self.pristine = [], None, selected(self.pristine, index, dim=2)
        if len(self.moved_by) > 1:
            self.moved_by = [self.moved_by[row] for row in index.tolist()]
