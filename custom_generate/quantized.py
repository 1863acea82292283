"""A quantized window: all but the sinks and the most recent tokens is held as codes of a few bits, in blocks of tokens."""

from functools import cached_property

import torch

from .layers import Ring, selected, take_slots, undone
from .plan import Pass, Plan
from .quantization import Quantization
from .stored import StoredRing
from .stream import Stream
from .window import Window


class QuantizedPlan(Plan):
    """A plan that also says which tokens are whole, that is, held as they came, and which are quantized in blocks.

    Number the tokens behind the sinks 0, 1, 2, ... Token t is in slot t mod `num_whole` of the whole tokens, or in block
    t // `length`, which is in slot block mod `max_blocks`. A block is quantized once, by the pass after which `residual_length`
    tokens have come since its last one. So a pass sees its own tokens and the `residual_length` before them as they came.
    """

    def __init__(self, quantization: Quantization, *how):
        super().__init__(*how)
        self.quantization, self.num_whole, self.length = quantization, quantization.min_recent, quantization.q_group_size
        self.max_blocks, num_sinks = quantization.max_blocks(self.window), self.window.num_sinks
        repeats = self.current.batch_size if self.is_uniform else 1
        # Tokens behind the sinks that each row has seen before the pass and after it.
        self.seen = [
            (before - num_sinks, after - num_sinks)
            for before, after in zip(self.current.num_seen * repeats, self.current.num_after * repeats)
        ]
        longest = max(after for _, after in self.seen)
        self.num_blocks = min(quantization.num_blocks(longest), self.max_blocks)  # held after the pass, of the longest row
        # Not if tokens that the pass brings are no longer whole after it: they might have to be whole again.
        self.can_be_undone &= self.num_columns <= self.num_whole or longest <= self.num_whole

    @cached_property
    def sources(self) -> torch.Tensor:
        """Where each slot behind the sinks comes from: its place among the whole tokens and then all blocks, `[rows, num]`."""
        num_sinks, length = self.window.num_sinks, self.length
        num_seen = torch.tensor(self.current.num_seen, device=self.device)[:, None]
        slots = torch.arange(num_sinks, max(self.num_held, num_sinks), device=self.device)
        tokens = self.window.token(slots, num_seen) - num_sinks
        first_whole = (num_seen - num_sinks - self.quantization.residual_length).clamp(min=0) // length * length
        in_block = self.num_whole + tokens // length % self.max_blocks * length + tokens % length
        return torch.where(tokens < first_whole, in_block, tokens % self.num_whole)

    @cached_property
    def new_whole(self) -> torch.Tensor:
        """New tokens that are whole after the pass: lines with their rows, slots, tokens (sinks counted) and columns."""
        entries = [
            [row, token % self.num_whole, token + self.window.num_sinks, token - after + self.num_columns]
            for row, (before, after) in enumerate(self.seen)
            for token in range(max(before, after - self.num_whole, 0), after)
        ]
        return torch.tensor(entries, dtype=torch.long).view(-1, 4).T.to(self.device)

    @cached_property
    def new_blocks(self) -> torch.Tensor:
        """Blocks that the pass quantizes: lines with their rows, slots, the tokens (sinks counted) that make them due, and for
        each token of a block its place among the whole tokens and then the columns of the pass."""
        entries = []
        for row, (before, after) in enumerate(self.seen):
            end, column = self.quantization.num_blocks(after), self.num_whole + self.num_columns - after  # column of token 0
            for block in range(max(self.quantization.num_blocks(before), end - self.max_blocks), end):
                tokens = range(block * self.length, (block + 1) * self.length)
                due = tokens.stop - 1 + self.quantization.residual_length + self.window.num_sinks
                places = [token % self.num_whole if token < before else token + column for token in tokens]
                entries.append([row, block % self.max_blocks, due, *places])
        return torch.tensor(entries, dtype=torch.long).view(-1, 3 + self.length).T.to(self.device)


class QuantizedRing(StoredRing):
    """Keys or values of which only the most recent tokens are held as they came (`QuantizedPlan`).

    A block is quantized at the positions that its keys have then. If positions are lowered later, it is rotated when it is read.

    Attributes:
        recent: the whole tokens, `[batch, heads, num_whole, head_dim]`.
        blocks: codes, scales and offsets, `[batch, heads, num_blocks, head_dim, width]`, as `Quantization.quantize` makes them;
            and by how much positions were lowered since each block was quantized, int64 `[batch, 1, num_blocks, 1]`.
        rotates_until: as long as a row has seen no more tokens, blocks may have to be rotated. None: that has to be looked up.
        block_log: what recorded passes have overwritten in the blocks: `(rows, slots, tokens), parts`.
    """

    recent: torch.Tensor = None

    def __init__(self, quantization: Quantization, by_channel: bool, window: Window, *how):
        super().__init__(window, *how)
        self.quantization, self.by_channel = quantization, by_channel

    @property
    def num_intact(self) -> int:
        return self.window.num_sinks + self.quantization.min_recent

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors, *self.blocks, *(part for _, parts in self.block_log for part in parts)]

    def views(self, num_tokens: int) -> dict[str, torch.Tensor]:
        num_blocks = self.quantization.num_blocks(num_tokens - self.window.num_sinks)
        num_blocks = min(num_blocks, self.quantization.max_blocks(self.window))
        self._reserve(num_blocks)
        self.rotates_until = None
        parts = zip(("codes", "scales", "offsets", "lowered"), self.blocks)
        return super().views(num_tokens) | {name: part[:, :, :num_blocks] for name, part in parts}

    @torch.inference_mode(False)
    def allocate(self, batch_size: int) -> None:
        super().allocate(batch_size)
        new, (_, num_heads, _, head_dim), dtype = self.slots.new_zeros, self.slots.shape, self.slots.dtype
        self.recent = new(batch_size, num_heads, self.quantization.min_recent, head_dim)
        widths = zip(self.quantization.widths, (torch.uint8, dtype, dtype))
        self.blocks = [new(batch_size, num_heads, 0, head_dim, width, dtype=of_part) for width, of_part in widths]
        self.blocks.append(new(batch_size, 1, 0, 1, dtype=torch.long))
        self.rotates_until: int | None = -1

    @torch.inference_mode(False)
    def _reserve(self, num_blocks: int) -> None:
        num_more = num_blocks - self.blocks[0].shape[2]
        if num_more > 0:
            more = [part.new_zeros(*part.shape[:2], num_more, *part.shape[3:]) for part in self.blocks]
            self.blocks = [torch.cat(both, dim=2) for both in zip(self.blocks, more)]

    def fetch(self, plan: QuantizedPlan) -> torch.Tensor:
        self._reserve(plan.num_blocks)
        (*parts, lowered), num_seen = self.blocks, plan.current.num_seen
        blocks = self.quantization.dequantize(*parts, self.by_channel)
        if self.rotates_until is None:  # until all blocks have been replaced
            self.rotates_until = max(num_seen) + self.window.length if bool(lowered.any()) else -1
        if min(num_seen) <= self.rotates_until:
            blocks = self.rotation.turn(blocks, self.rotation.angles(lowered, torch.zeros_like(lowered)))
        return take_slots(torch.cat([self.recent, blocks.flatten(2, 3)], dim=2), plan.sources)

    def store(self, plan: QuantizedPlan, new: torch.Tensor) -> None:
        (rows, slots, _), places = plan.new_blocks[:3], plan.new_blocks[3:]
        if len(rows):
            states = torch.cat([self.recent, new], dim=2)[rows, :, places].permute(1, 2, 0, 3)
            for part, now in zip(self.blocks, (*self.quantization.quantize(states, self.by_channel), 0)):
                part[rows, :, slots] = now
        rows, slots, _, columns = plan.new_whole
        self.recent[rows, :, slots] = new[rows, :, columns]

    def record(self, plan: QuantizedPlan, held: torch.Tensor) -> None:
        rows, slots, tokens, _ = plan.new_whole
        self.log.append(((rows, slots, tokens), self.recent[rows, :, slots]))
        rows, slots, tokens = plan.new_blocks[:3]
        self.block_log.append(((rows, slots, tokens), [part[rows, :, slots] for part in self.blocks]))

    def undo(self, num_tokens: list[int]) -> None:
        for rows, slots, is_undone, overwritten in undone(self.log, num_tokens):
            self.recent[rows, :, slots] = overwritten[is_undone]
        for rows, slots, is_undone, parts in undone(self.block_log, num_tokens):
            for part, overwritten in zip(self.blocks, parts):
                part[rows, :, slots] = overwritten[is_undone]

    def forget(self) -> None:
        super().forget()
        self.block_log: list[tuple] = []

    def rebase(self, num_positions: torch.Tensor) -> None:
        super().rebase(num_positions)
        self.blocks[3] += num_positions[..., None]
        for (rows, _, _), parts in self.block_log:
            parts[3] = parts[3] + (num_positions if len(num_positions) == 1 else num_positions[rows])
        self.rotates_until = None

    def select_rows(self, index: torch.Tensor) -> None:
        super().select_rows(index)
        self.recent, *self.blocks = (selected(held, index) for held in (self.recent, *self.blocks))


class QuantizedStream(Stream):
    def __init__(self, window: Window, layers: dict, quantization: Quantization):
        self.quantization = quantization
        super().__init__(window, layers)

    def new_ring(self, window: Window, *how, kind: str | None = None) -> Ring:
        if kind is None or not self._quantizes(window):
            return Ring(window, *how)
        return QuantizedRing(self.quantization, self.quantization.by_channel(kind), window, *how)

    def plan_of(self, current: Pass, window: Window, device: torch.device) -> Plan:
        how = window, current, device
        return QuantizedPlan(self.quantization, *how) if self._quantizes(window) else Plan(*how)

    def _quantizes(self, window: Window) -> bool:
        """Native windows may be too short."""
        return window.num_recent >= self.quantization.min_recent
