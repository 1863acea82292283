"""One forward pass: how many tokens come, what is written where, what each query sees, and how far the sinks move.

A pass is decided before the model runs, and stays as it is: what comes (`Pass`), and what it does to each window (`Plan`).
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from .window import Window
from .workspace import Workspace


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward call of the model. Lists have one number for each row, or a single number where all rows are alike.

    Attributes:
        num_seen, num_after: tokens seen before the pass, and after it.
        num_new: new tokens. They are the last of the `num_columns` columns; the columns before them are padding.
        base: number that is subtracted from a row's token numbers to get its positions.
        num_parts: rows of the batch that the model is given for each row of the cache (`Plan`).
        is_ordered: keys are handed out in the order of their tokens.
        is_prepared: positions and masks come from `prepare`, not from the model.
        is_recorded: what the pass evicts is kept, so that it can be rolled back.
    """

    num_seen: list[int]
    num_new: list[int]
    num_after: list[int]
    base: list[int]
    batch_size: int
    num_columns: int
    num_parts: int = 1
    is_ordered: bool = False
    is_prepared: bool = True
    is_recorded: bool = False

    @property
    def part_length(self) -> int:
        return self.num_columns // self.num_parts


class Plan:
    """What a pass does in the layers of one window: decided once, carried out alike in every layer.

    There are two kinds. Where nothing that a query of the pass needs is evicted by it (the window is filling, or there is a
    single new token), the new tokens are written to their slots, and the slots are handed out as they are. Else the queries
    need the sinks at different distances, and tokens that later queries evict. Such a pass is handed

        [ the sinks as query 0 sees them | ... as query n-1 sees them | recent tokens as before the pass | new tokens ]

    with a mask in which each query sees its own copy of the sinks. A long pass over full windows may come in parts: each part of
    the new tokens is a row of the batch, with the copies of the sinks for its own queries and only the tokens that they see.

    Attributes:
        num_held: slots in use after the pass, of the row that has the most.
        kv_length: keys that the pass is handed, in each part.
        is_causal: no mask is needed, because a single query sees all slots, or slots are in the order of tokens, in all rows.
        can_be_undone: rolling back the pass restores the window, because no new token has evicted another new token.
        recent_before: the slots of recent tokens that are in use before the pass. As `workspace`, for the second kind only.
        rows, slots, columns: column `columns[i]` of row `rows[i]` is written to slot `slots[i]`. Slices where that is possible.
        written: row, slot and token of all that a recorded pass writes. Known before it runs: a graph can't compute them.
        shifts: how far the sinks are moved: a number for each row (a list), or for each query, `[rows, columns]`.
        order: slots in the order of their tokens, `[rows, num_held]`, for an ordered pass. Else None.
        workspace: memory for copies that are handed out.
    """

    is_in_tensors = False  # its numbers stand in Python; those of `Cursor` (static.py) in tensors, which a graph reads

    def __init__(self, window: Window, current: Pass, device: torch.device):
        num_seen, num_after, num_columns = current.num_seen, current.num_after, current.num_columns
        self.window, self.current, self.device = window, current, device
        self.num_columns, self.num_parts = num_columns, current.num_parts
        self.is_uniform = len(num_seen) == 1
        self.num_held = min(max(num_after), window.length)
        self.hands_out_slots = num_columns == 1 or max(num_after) <= window.length
        self.writes_sinks = min(num_seen) < min(window.num_sinks, self.num_held)
        self.can_be_undone = self.hands_out_slots or num_columns <= window.num_recent
        self.order = self._order() if current.is_ordered else None
        is_full = self.is_uniform and current.num_new[0] == num_columns  # no row has padding
        self.is_causal = self.hands_out_slots and (is_full or num_columns == 1 and min(num_after) >= self.num_held)
        if self.hands_out_slots:
            self.kv_length = self.num_held
            self.shifts = [window.shift(seen - start) for seen, start in zip(num_seen, current.base)]
        else:
            self.recent_before = slice(window.num_sinks, max(min(max(num_seen), window.length), window.num_sinks))
            num_recent = self.recent_before.stop - window.num_sinks + num_columns
            num_recent = self._num_recent_in_part if self.num_parts > 1 else num_recent
            self.kv_length = window.num_sinks * current.part_length + num_recent
            self.workspace = Workspace()
            self.shifts = window.shift(self.tokens - torch.tensor(current.base, device=device)[:, None])
        if self.num_parts > 1:  # the slots of the recent tokens before the pass, oldest first: `[rows, num_recent]`
            self.recent_slots = window.slot(self._num_seen + torch.arange(-window.num_recent, 0, device=device))
        if self.hands_out_slots and is_full:
            start = window.slot(num_seen[0])  # the slots never go past the end: it is one token, or the window is filling
            self.rows, self.slots, self.columns = slice(None), slice(start, start + num_columns), slice(None)
        else:
            self.rows, self.slots, self.columns = self._entries()
        self.written = self._written() if current.is_recorded else None

    # Tokens and slots. All tensors have one row for each row of the batch, or a single row.

    @cached_property
    def _num_seen(self) -> torch.Tensor:
        return torch.tensor(self.current.num_seen, device=self.device)[:, None]

    @cached_property
    def _is_token(self) -> torch.Tensor:
        return last_columns(self.current.num_new, self.num_columns, self.device)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """The number of the token in each column, `[rows, columns]`; for padding, a seen or a negative number."""
        after = torch.tensor(self.current.num_after, device=self.device)[:, None]
        return after + torch.arange(-self.num_columns, 0, device=self.device)

    def _entries(self) -> tuple:
        """`rows, slots, columns` of the new tokens that are still held after the pass."""
        is_held = self.window.sees(self.tokens[:, -1:], self.tokens)  # what the last token sees
        rows, columns = (self._is_token & is_held).nonzero(as_tuple=True)
        slots = self.window.slot(self.tokens[rows, columns])
        return slice(None) if self.is_uniform else rows, slots, columns

    def new_sinks(self) -> tuple:
        """`rows, slots, columns` of the new tokens that are sinks. Not for a pass that hands out slots."""
        is_sink = self.slots < self.window.num_sinks
        return self.rows if self.is_uniform else self.rows[is_sink], self.slots[is_sink], self.columns[is_sink]

    def _written(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, slots, columns = self._entries()
        if not self.is_uniform:
            return rows, slots, self.tokens[rows, columns]
        batch_size = self.current.batch_size
        rows = torch.arange(batch_size, device=self.device).repeat_interleave(len(slots))
        return rows, slots.repeat(batch_size), self.tokens[0, columns].repeat(batch_size)

    def _order(self) -> torch.Tensor:
        window, after = self.window, torch.tensor(self.current.num_after, device=self.device)[:, None]
        column = torch.arange(self.num_held, device=self.device)
        is_sink = (after > window.length) & (column < window.num_sinks)
        return window.slot(torch.where(is_sink, column, after - self.num_held + column).clamp(min=0))

    # A pass in parts

    @property
    def _num_recent_in_part(self) -> int:
        """Recent and new tokens that the queries of a part see."""
        return self.window.num_recent + self.current.part_length - 1

    def joined(self, states: torch.Tensor) -> torch.Tensor:
        """`[batch * parts, heads, part_length, head_dim]` -> `[batch, heads, num_columns, head_dim]`."""
        return states.unflatten(0, (-1, self.num_parts)).transpose(1, 2).flatten(2, 3)

    def in_parts(self, sinks: torch.Tensor, recent: torch.Tensor) -> torch.Tensor:
        """Keys or values for each part, `[batch * parts, heads, kv_length, head_dim]`.

        Args:
            sinks: one copy for each query, `[batch, heads, num_columns, num_sinks, head_dim]`.
            recent: recent tokens before the pass and its own, in order, `[batch, heads, num_recent + num_columns, head_dim]`.
        """
        sinks = sinks.unflatten(2, (self.num_parts, -1)).flatten(3, 4)
        recent = recent[:, :, 1:].unfold(2, self._num_recent_in_part, self.current.part_length).transpose(3, 4)
        return self.workspace.cat([sinks.transpose(1, 2), recent.transpose(1, 2)], dim=3).flatten(0, 1)

    # What each query sees

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """`visible` in the form that attention takes, `[rows, 1, columns, kv_length]`."""
        return as_mask(self.visible()[:, None], dtype)

    def visible(self) -> torch.Tensor:
        """Bool, `[rows, columns, kv_length]`; of a pass in parts, `[1, part_length, kv_length]`, because all parts are alike."""
        if self.is_causal and self.num_columns == 1:
            return torch.ones(1, 1, self.num_held, dtype=torch.bool, device=self.device)
        if self.hands_out_slots:
            slot = torch.arange(self.num_held, device=self.device)
            held = self.window.token(slot, self.tokens[:, -1:] + 1)[:, None]
            # The query of a padding column sees slot 0: its result is never used, but must be a number.
            return self.window.sees(self.tokens.clamp(min=0)[:, :, None], held)
        return self._visible_in_part() if self.num_parts > 1 else self._visible_of_copies()

    def _own_copies(self) -> torch.Tensor:
        """Which copies of the sinks belong to a query: `[part_length, part_length * num_sinks]`."""
        own = torch.eye(self.current.part_length, dtype=torch.bool, device=self.device)
        return own.repeat_interleave(self.window.num_sinks, 1)

    def _visible_in_part(self) -> torch.Tensor:
        column = torch.arange(self.current.part_length, device=self.device)[:, None]
        distance = torch.arange(self._num_recent_in_part, device=self.device) - column
        return torch.cat([self._own_copies(), (distance >= 0) & (distance < self.window.num_recent)], dim=-1)[None]

    def _visible_of_copies(self) -> torch.Tensor:
        window, device, query = self.window, self.device, self.tokens[:, :, None]
        sinks = self._own_copies() & (torch.arange(window.num_sinks, device=device).repeat(self.num_columns) <= query)
        slot = torch.arange(self.recent_before.start, self.recent_before.stop, device=device)
        held = window.token(slot, self._num_seen)[:, None]
        recent = (held < self._num_seen[:, :, None]) & window.sees(query, held)
        token = self.tokens[:, None, :]
        new = self._is_token[:, None] & (token >= window.num_sinks) & window.sees(query, token)
        itself = torch.eye(self.num_columns, dtype=torch.bool, device=device) & ~self._is_token[:, :, None]
        return torch.cat([sinks.expand(len(query), -1, -1), recent, new | itself], dim=-1)


def last_columns(num: list[int], num_columns: int, device: torch.device) -> torch.Tensor:
    """Whether a column is among the last `num` ones of its row, `[rows, num_columns]`."""
    return torch.arange(num_columns, device=device) >= num_columns - torch.tensor(num, device=device)[:, None]


def as_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is visible, as a mask that says so (bool), or as a mask that is added to the scores."""
    if dtype == torch.bool:
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
