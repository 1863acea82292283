"""The layers of a cache: keys and values in the slots of a window."""

import torch
from transformers.cache_utils import CacheLayerMixin

from .plan import Plan
from .rotation import Rotation, rotate
from .window import Window

MIN_SLOTS = 32  # A ring is allocated with at least as many, so that it does not grow at each of the first tokens.


class Ring:
    """The keys, or the values, of one layer: `slots` is `[batch, heads, num_slots, head_dim]`. Only the sinks move (`sinks.py`).

    Attributes:
        sinks, number: the `Sinks` (sinks.py) that move the sinks of this ring, and its number there; None if they do not move.
        log: what recorded passes have overwritten: `(rows, slots, tokens), keys or values`.
    """

    def __init__(self, window: Window, rotation: Rotation, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        self.window, self.rotation = window, rotation
        num_heads, head_dim = shape
        self.slots = torch.zeros(0, num_heads, 0, head_dim, dtype=dtype, device=device)
        self.sinks = None
        self.number: int | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that the ring holds."""
        return [self.slots, self.recent, *(tensor for written, overwritten in self.log for tensor in (*written, overwritten))]

    @property
    def recent(self) -> torch.Tensor:
        """What is held behind the sinks as it came, `[batch, heads, num_slots, head_dim]`."""
        return self.slots[:, :, self.window.num_sinks :]

    def views(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """Make room for so many tokens, and return views of all that they leave here, to save or fill. Rows are dimension 0."""
        if self.slots.shape[2] < min(num_tokens, self.window.length):
            self.grow(num_tokens)
        return {"slots": self.slots[:, :, : min(num_tokens, self.window.length)]}

    def allocate(self, batch_size: int, num_slots: int = 0) -> None:
        """Begin with no tokens."""
        self.forget()
        self.slots = self.slots.new_zeros(batch_size, self.slots.shape[1], num_slots, self.slots.shape[3])

    def update(self, plan: Plan, new: torch.Tensor, held: torch.Tensor | None = None) -> torch.Tensor:
        """`[batch, heads, num_columns, head_dim]` is written, and the pass is handed `[batch, heads, kv_length, head_dim]`.

        Args:
            held: the slots before the pass, if they are kept in another form than `slots`.
        """
        if held is None:
            if plan.num_held > self.slots.shape[2]:
                self.grow(plan.num_held)
            held = self.slots
        copies = None if plan.hands_out_slots else self._with_copies_of_sinks(plan, held, new)
        if plan.current.is_recorded:
            self.record(plan, held)
        if isinstance(plan.slots, slice):
            held.narrow(2, plan.slots.start, plan.num_columns).copy_(new)
        else:
            held[plan.rows, :, plan.slots] = new[plan.rows, :, plan.columns]
        if copies is not None:
            return copies
        if plan.order is not None:
            return take_slots(held, plan.order)
        return held if plan.num_held == held.shape[2] else held.narrow(2, 0, plan.num_held)

    def _with_copies_of_sinks(self, plan: Plan, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """A copy of the sinks for each query, recent tokens as before the pass, and new tokens."""
        if plan.writes_sinks:  # sinks that come with this pass have to be copied, too
            rows, slots, columns = plan.new_sinks()
            held[rows, :, slots] = new[rows, :, columns]
        copies = held[:, :, None, : self.window.num_sinks]
        if self.sinks is not None:
            copies = rotate(self.rotation.pairs(copies), self.sinks.for_queries).to(new.dtype)
        copies = copies.expand(-1, -1, plan.num_columns, -1, -1)
        if plan.num_parts > 1:
            return plan.in_parts(copies, torch.cat([take_slots(held, plan.recent_slots), new], dim=2))
        return plan.workspace.cat([copies.flatten(2, 3), held[:, :, plan.recent_before], new], dim=2)

    @torch.inference_mode(False)  # the slots can be changed later in any mode
    def grow(self, num_slots: int) -> None:
        """To at least twice the size, so that a short text does not pay for the whole window."""
        batch_size, num_heads, num_before, head_dim = self.slots.shape
        num_slots = min(self.window.length, max(num_slots, 2 * num_before, MIN_SLOTS, self.window.num_sinks))
        slots = self.slots.new_zeros(batch_size, num_heads, num_slots, head_dim)  # not empty memory: 0 * NaN is NaN
        slots[:, :, :num_before] = self.slots
        self.slots = slots

    def record(self, plan: Plan, held: torch.Tensor) -> None:
        """Keep what the pass is about to overwrite."""
        rows, slots, _ = plan.written
        self.log.append((plan.written, held[rows, :, slots]))

    def undo(self, num_tokens: list[int]) -> None:
        """Put back what recorded passes have overwritten, for all tokens of each row from `num_tokens` on."""
        for rows, slots, is_undone, overwritten in undone(self.log, num_tokens):
            self.slots[rows, :, slots] = overwritten[is_undone]

    def forget(self) -> None:
        self.log: list[tuple] = []

    def rebase(self, num_positions: torch.Tensor) -> None:
        """Lower the positions of each row by `num_positions` `[rows, 1, 1]`: keys behind the sinks turn back, rounded once."""
        angles = self.rotation.angles(num_positions, torch.zeros_like(num_positions))
        self.recent.copy_(self.rotation.turn(self.recent.to(angles.device), angles))
        for number, (written, overwritten) in enumerate(self.log):
            of_entries = angles[0] if len(angles) == 1 else angles[written[0], 0]
            self.log[number] = written, self.rotation.turn(overwritten, of_entries)

    def select_rows(self, index: torch.Tensor) -> None:
        """Row i becomes a copy of row `index[i]`."""
        self.slots = selected(self.slots, index)


class SinkLayer(CacheLayerMixin):
    """One attention layer of a `SinkCache`, as transformers knows it. The pass is decided before; a layer only carries it out."""

    is_croppable = is_initialized = True  # rings make room when they are written

    def __init__(self, window: Window, rings: list[Ring], stream, is_sliding: bool):
        self.window, self.rings, self.stream, self.is_sliding = window, rings, stream, is_sliding
        self.plan: Plan | None = None  # of the pass under way
        self.kv_length = 0  # keys that it is handed, or that the last pass was handed

    @property
    def keys(self) -> torch.Tensor:
        return self.rings[0].slots

    @property
    def values(self) -> torch.Tensor:
        return self.rings[1].slots

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, heads, num_columns, head_dim]` in, `[batch, heads, kv_length, head_dim]` out."""
        plan, (keys, values) = self.plan, self.rings
        if not key_states.dtype == value_states.dtype == keys.slots.dtype:
            raise wrong_dtypes(key_states, value_states, keys.slots.dtype)
        if plan.num_parts > 1:
            key_states, value_states = plan.joined(key_states), plan.joined(value_states)
        return keys.update(plan, key_states), values.update(plan, value_states)

    @property
    def record_past(self) -> bool:
        """Whether what a pass evicts is kept. transformers switches it off layer by layer."""
        return self.stream.is_recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.stream.is_recording = value

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing has to be done."""

    def get_seq_length(self) -> int:
        return max(self.stream.num_tokens)

    def get_max_length(self) -> int:
        return self.window.length

    get_max_cache_shape = get_max_length  # before transformers 5

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kv_length, 0


def wrong_dtypes(key_states: torch.Tensor, value_states: torch.Tensor, dtype: torch.dtype) -> ValueError:
    return ValueError(
        f"The model brings keys in {key_states.dtype} and values in {value_states.dtype}, and this cache was made for {dtype}. "
        "Put the model into one dtype, model.to(dtype), in place of autocast; if that was done after the cache was made, make a "
        "new one."
    )


def selected(states: torch.Tensor, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The rows `index` of what has its rows in dimension `dim`; in the same memory if there are as many rows as before."""
    rows = states.index_select(dim, index)
    return states.copy_(rows) if rows.shape == states.shape else rows


def undone(log: list[tuple], num_tokens: list[int]):
    """For each pass, the last one first: rows and slots to put back, which entries they are, and what all have overwritten."""
    for (rows, slots, tokens), overwritten in reversed(log):
        first = torch.tensor(num_tokens, device=tokens.device)
        is_undone = tokens >= (first if len(first) == 1 else first[rows])
        yield rows[is_undone], slots[is_undone], is_undone, overwritten


def take_slots(held: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Keys or values `[batch, heads, num_slots, head_dim]` in the slots `[rows, num]`, in that order."""
    if len(slots) == 1:
        return held.index_select(2, slots[0])
    return held.take_along_dim(slots[:, None, :, None], dim=2)
