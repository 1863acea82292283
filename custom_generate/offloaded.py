"""Windows of which only the sinks stand where attention reads them (`StoredRing`); and one whose other tokens are kept in the
memory of the host, and copied to the device for each layer in turn."""

import contextlib
from functools import cache, cached_property

import torch

from .layers import MIN_SLOTS, Ring, undone
from .plan import Plan
from .stream import Stream
from .window import Window


class StoredRing(Ring):
    """A ring of which `slots` holds the sinks alone. The rest, `recent`, is kept in another form, or in other memory.

    For a pass, `fetch(plan)` makes the slots behind the sinks as they are before it, `[batch, heads, plan.num_held - num_sinks,
    head_dim]`, which are let go afterwards, and `store(plan, new)` keeps the new tokens but for the sinks. What a query sees and
    how sinks move is the same as in a plain ring.
    """

    def allocate(self, batch_size: int) -> None:
        super().allocate(batch_size, self.window.num_sinks)

    def update(self, plan: Plan, new: torch.Tensor, held: torch.Tensor | None = None) -> torch.Tensor:
        held = torch.cat([self.slots, self.fetch(plan)], dim=2)
        handed_out = super().update(plan, new, held)
        if plan.writes_sinks:
            self.slots.copy_(held[:, :, : self.window.num_sinks])
        self.store(plan, new)
        return handed_out


class OffloadedPlan(Plan):
    @cached_property
    def on_host(self) -> tuple:
        """`rows, slots, columns` of new tokens behind the sinks, slots counted from there. Slices, or indices on the host."""
        num_sinks = self.window.num_sinks
        if isinstance(self.slots, slice):
            start, stop = max(self.slots.start, num_sinks), max(self.slots.stop, num_sinks)
            return slice(None), slice(start - num_sinks, stop - num_sinks), slice(self.num_columns - (stop - start), None)
        is_recent = self.slots >= num_sinks
        rows = self.rows if self.is_uniform else self.rows[is_recent].cpu()
        return rows, (self.slots[is_recent] - num_sinks).cpu(), self.columns[is_recent].cpu()


class OffloadedRing(StoredRing):
    """Keys or values on the host: `host` is `[num_slots, batch, heads, head_dim]`, so that new tokens are copied in one piece.

    While a layer works, what the next one needs is copied on a stream of its own. When a layer is through with its copy, the copy
    is let go, and only new tokens are copied back. As in the offloaded caches of transformers, each stream waits for what the
    other has begun: copies to the device for copies back, and the layer for its copy.

    On a CPU, all of this happens in one memory, with the same copies. (It was tested that way. The stream on CUDA was not.)

    Args:
        chain: the rings of all layers that have the same plans, in the order of the layers. This one is added.
    """

    def __init__(self, chain: list["OffloadedRing"], window: Window, *how):
        super().__init__(window, *how)
        self.chain, self.place = chain, len(chain)
        chain.append(self)

    @property
    def recent(self) -> torch.Tensor:
        """For the host itself, which waits for copies under way."""
        finish_copies(self.slots.device)
        return self.host.permute(1, 2, 0, 3)

    def views(self, num_tokens: int) -> dict[str, torch.Tensor]:
        self._reserve(num_tokens)
        return {"slots": self.slots, "recent": self.recent[:, :, : self._num_recent(num_tokens)]}

    def allocate(self, batch_size: int) -> None:
        super().allocate(batch_size)
        self.host = self._room(0, batch_size)
        self.ahead: dict[Plan, torch.Tensor] = {}  # what was copied to the device and has not been read, for which plan

    def fetch(self, plan: Plan) -> torch.Tensor:
        if plan not in self.ahead:
            self.fetch_ahead(plan)
        if self.slots.is_cuda:  # the layer waits for its copy
            torch.cuda.current_stream(self.slots.device).wait_stream(copy_stream(self.slots.device))
        states = self.ahead.pop(plan)
        for following in self.chain[self.place + 1 : self.place + 2]:
            following.fetch_ahead(plan)
        return states.permute(1, 2, 0, 3)

    def fetch_ahead(self, plan: Plan) -> None:
        """Begin to copy what a pass needs to the device."""
        self._reserve(plan.num_held)
        with while_computing(self.slots.device):
            needed = self.host[: self._num_recent(plan.num_held)]
            self.ahead = {plan: needed.to(self.slots.device, non_blocking=True, copy=True)}

    def store(self, plan: OffloadedPlan, new: torch.Tensor) -> None:
        rows, slots, columns = plan.on_host
        if isinstance(slots, slice):
            self.host[slots].copy_(new[:, :, columns].permute(2, 0, 1, 3), non_blocking=True)
        else:
            self.host.permute(1, 2, 0, 3)[rows, :, slots] = new[rows, :, columns].cpu()

    def _num_recent(self, num_tokens: int) -> int:
        """Slots behind the sinks that a text of so many tokens uses."""
        return max(min(num_tokens, self.window.length) - self.window.num_sinks, 0)

    @torch.inference_mode(False)
    def _room(self, num_slots: int, batch_size: int) -> torch.Tensor:
        """Pinned where another device reads it: only from there can it be copied while that device computes."""
        shape = num_slots, batch_size, self.slots.shape[1], self.slots.shape[3]
        return torch.zeros(shape, dtype=self.slots.dtype, device="cpu", pin_memory=self.slots.is_cuda)

    def _reserve(self, num_tokens: int) -> None:
        num_slots, num_before = self._num_recent(num_tokens), len(self.host)
        if num_slots > num_before:
            before, num_slots = self.recent, min(self.window.num_recent, max(num_slots, 2 * num_before, MIN_SLOTS))
            self.host = self._room(num_slots, len(before))
            self.recent[:, :, :num_before] = before

    def undo(self, num_tokens: list[int]) -> None:
        for rows, slots, is_undone, overwritten in undone(self.log, num_tokens):
            is_recent = slots >= self.window.num_sinks  # a sink has overwritten nothing
            rows, slots = rows[is_recent].cpu(), (slots[is_recent] - self.window.num_sinks).cpu()
            self.recent[rows, :, slots] = overwritten[is_undone][is_recent].cpu()

    def select_rows(self, index: torch.Tensor) -> None:
        super().select_rows(index)
        rows = self.recent.index_select(0, index.cpu())
        if len(rows) != self.host.shape[1]:
            self.host = self._room(len(self.host), len(rows))
        self.recent.copy_(rows)

    def __getstate__(self) -> dict:
        finish_copies(self.slots.device)
        return vars(self) | {"ahead": {}}


class OffloadedStream(Stream):
    plan_of = OffloadedPlan

    def __init__(self, *args):
        self.chains: dict[tuple, list[OffloadedRing]] = {}
        super().__init__(*args)

    def new_ring(self, window: Window, *how, kind: str | None = None) -> Ring:
        chain = self.chains.setdefault((window, how[-1], kind), [])  # the last argument is the device
        return OffloadedRing(chain, window, *how) if kind else Ring(window, *how)


@cache
def copy_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def while_computing(device: torch.device) -> contextlib.AbstractContextManager:
    """Copies begun in here wait for all that was begun before, and what is computed then does not wait for them."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    copy_stream(device).wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(copy_stream(device))


def finish_copies(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
