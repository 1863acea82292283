"""A quantized window: all but the sinks and the most recent tokens is held as codes of a few bits, in blocks of tokens."""

import importlib
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from .layers import Ring, selected, take_slots, undone
from .plan import Pass, Plan
from .stored import StoredRing
from .stream import Stream
from .window import Window

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
# name: (nbits, whether an axis stands for channels, module, package)
BACKENDS = {
    "quanto": ((2, 4), {0: False, -1: True}, "optimum.quanto", "optimum-quanto"),
    "hqq": ((1, 2, 3, 4, 8), {0: True, 1: False}, "hqq.core.quantize", "hqq"),
    "fp8": ((), {}, None, None),
}


@dataclass(frozen=True)
class Quantization:
    """How a window is quantized. Options, their names and defaults are those of transformers' `QuantizedCache`.

    A block of tokens, `[heads, q_group_size, head_dim]`, is quantized in groups of `q_group_size` numbers of a head: each channel over
    the tokens of the block (https://arxiv.org/abs/2402.02750), or else the numbers of one token, and of the next if `head_dim` is
    smaller. No other block, row or layer has a part in it. Number = code * scale + offset.

    Args:
        backend: "quanto" and "hqq" call optimum.quanto or hqq, which have to be installed; "fp8" is torch's float8_e4m3fn.
        nbits: bits of a code. 2 or 4 with quanto; 1, 2, 3 (which take the room of 4), 4 or 8 with hqq; not to be given with fp8.
        axis_key, axis_value: which groups. With quanto -1 is each channel and 0 a token, with hqq 0 and 1; not to be given with fp8,
            which takes tokens.
        q_group_size: numbers in a group, and tokens in a block; a multiple of 8.
        residual_length: the most recent tokens that are not quantized.

    Raises:
        ValueError: an option is not one of these.
        ImportError: the backend is not installed.
    """

    backend: str = "quanto"
    nbits: int | None = None
    axis_key: int | None = None
    axis_value: int | None = None
    q_group_size: int = 64
    residual_length: int = 128

    def __post_init__(self):
        if self.backend not in [*BACKENDS]:  # a list: no hash is asked for
            raise ValueError(f"backend={self.backend!r} does not quantize caches. Use one of {', '.join(BACKENDS)}.")
        allowed_bits, axes, module, _ = BACKENDS[self.backend]
        for name, allowed, default in (("nbits", allowed_bits, 4), ("axis_key", axes, 0), ("axis_value", axes, 0)):
            value = getattr(self, name)
            if value is None and allowed:
                object.__setattr__(self, name, default)
            elif value is not None and (type(value) is not int or value not in allowed):
                choice = f"Use one of {', '.join(map(str, allowed))}" if allowed else "Leave it out"
                raise ValueError(f"{name}={value!r} can't be used with backend={self.backend!r}. {choice}.")
        counts = ("q_group_size", 8, 8, "a positive multiple of 8"), ("residual_length", 0, 1, "an int of at least 0")
        for name, smallest, step, kind in counts:
            value = getattr(self, name)
            if type(value) is not int or value < smallest or value % step:
                raise ValueError(f"{name} must be {kind}, got {value!r}.")
        if module is not None:
            backend_module(self.backend)

    @classmethod
    def of(cls, cache_config: dict) -> "Quantization":
        if not isinstance(cache_config, dict):
            raise ValueError(
                f"cache_config (quantized= of a SinkCache) must be a dict, got {cache_config!r} ({type(cache_config).__name__})."
            )
        names = [option.name for option in fields(cls)]
        for name in cache_config:
            if name not in names:
                raise ValueError(f"cache_config has no option {name}. It takes {', '.join(names)}.")
        return cls(**{name: value for name, value in cache_config.items() if value is not None})

    def check_window(self, window_length: int, num_sink_tokens: int) -> None:
        if window_length - num_sink_tokens < self.min_recent:
            raise ValueError(
                f"window_length={window_length} with num_sink_tokens={num_sink_tokens} leaves nothing to quantize: residual_length="
                f"{self.residual_length} tokens stay as they are, and a block has q_group_size={self.q_group_size}. Use a longer window, "
                "or smaller ones of these."
            )

    # Of a window. Tokens are counted behind the sinks.

    @property
    def min_recent(self) -> int:
        """Tokens that are held as they came, at most. A window of fewer has nothing to quantize."""
        return self.residual_length + self.q_group_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that are quantized of a text of so many tokens, held or evicted."""
        return max(0, num_tokens - self.residual_length) // self.q_group_size

    def max_blocks(self, window: Window) -> int:
        """Blocks that hold all but the last `residual_length` tokens of a window, however it lies over them."""
        return self.num_blocks(window.num_recent + self.q_group_size - 1)

    # Of a block

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes of a group."""
        return self.q_group_size * self._code_width // 8

    @property
    def has_offsets(self) -> bool:
        return self.backend != "fp8"

    @property
    def _code_width(self) -> int:
        """Bits that a code takes: a byte holds whole codes."""
        return {None: 8, 3: 4}.get(self.nbits, self.nbits)

    def by_channel(self, kind: str) -> bool:
        """Whether a group of "keys" or "values" is a channel."""
        return BACKENDS[self.backend][1].get(self.axis_key if kind == "keys" else self.axis_value, False)

    def quantize(self, states: torch.Tensor, by_channel: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Blocks `[blocks, heads, q_group_size, head_dim]` -> codes uint8 `[blocks, heads, head_dim, num_bytes]`, and scales and offsets
        `[blocks, heads, head_dim, 1]` (or 0, without offsets): one of each for each of the `head_dim` groups."""
        groups = states.transpose(2, 3) if by_channel else states.flatten(2).unflatten(2, (states.shape[3], states.shape[2]))
        if self.backend == "fp8":
            scales = (groups.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=torch.finfo(groups.dtype).tiny)
            return (groups / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales, scales[..., :0]
        codes, scales, offsets = (quantize_with_quanto if self.backend == "quanto" else quantize_with_hqq)(groups, self.nbits)
        codes = codes.unflatten(-1, (self.num_bytes, -1)) << self._shifts(codes.device)
        return codes.sum(-1, dtype=torch.uint8), scales, offsets

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, by_channel: bool) -> torch.Tensor:
        """`[..., heads, head_dim, num_bytes]` and so on -> `[..., heads, q_group_size, head_dim]`."""
        if self.backend == "fp8":
            groups = codes.view(torch.float8_e4m3fn).to(scales.dtype) * scales
        else:
            codes = (codes[..., None] >> self._shifts(codes.device) & 2**self._code_width - 1).flatten(-2)
            groups = torch.addcmul(offsets, codes.to(scales.dtype), scales)
        return groups.transpose(-2, -1) if by_channel else groups.flatten(-2).unflatten(-1, groups.shape[:-3:-1])

    def _shifts(self, device: torch.device) -> torch.Tensor:
        return torch.arange(0, 8, self._code_width, dtype=torch.uint8, device=device)


def quantize_with_quanto(groups: torch.Tensor, nbits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (uint8), scales and offsets of the groups `[..., q_group_size]`."""
    quanto = backend_module("quanto")
    flat, qtype = groups.flatten(0, -2), quanto.qint4 if nbits == 4 else quanto.qint2
    scales, shifts = quanto.MaxOptimizer()(flat, qtype, 0, flat.shape[1])
    codes = torch.ops.quanto.quantize_affine(flat, nbits, 0, flat.shape[1], scales, shifts)
    return tuple(part.unflatten(0, groups.shape[:-1]) for part in (codes, scales, -shifts))


def quantize_with_hqq(groups: torch.Tensor, nbits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, block by block: hqq looks at all groups that it is given when it decides how long to search."""
    quantizer, dtype = backend_module("hqq").Quantizer, groups.dtype
    options = {"group_size": groups.shape[-1], "axis": 1, "bitpack": False, "compute_dtype": dtype, "device": str(groups.device)}
    blocks = []
    for block in groups:
        codes, meta = quantizer.quantize(block.flatten(0, -2), nbits, **options)
        parts = codes.to(torch.uint8), meta["scale"].to(dtype), (-meta["zero"] * meta["scale"]).to(dtype)
        blocks.append([part.unflatten(0, block.shape[:-1]) for part in parts])
    return tuple(torch.stack(parts) for parts in zip(*blocks))


def backend_module(backend: str):
    module, package = BACKENDS[backend][2:]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"backend={backend!r} quantizes by means of {package}: pip install {package}") from error


class QuantizedPlan(Plan):
    """A plan that also says which tokens are whole (held as they came), and which are quantized in blocks.

    Number the tokens behind the sinks 0, 1, 2, ... Token t is in slot t mod `min_recent` of the whole tokens, or in block
    t // `q_group_size`, which is in slot block mod `max_blocks`. A block is quantized once, by the pass after which `residual_length` tokens
    have come since its last one. So a pass sees the tokens that it brings, and at least the `residual_length` before them, as they came.
    """

    def __init__(self, quantization: Quantization, *how):
        super().__init__(*how)
        self.quantization, self.num_whole = quantization, quantization.min_recent
        self.block_length, self.max_blocks = quantization.q_group_size, quantization.max_blocks(self.window)
        # Not if tokens that the pass brings are no longer whole after it: they might have to be whole again.
        is_short = self.num_columns <= self.num_whole or max(self.current.num_after) <= self.window.num_sinks + self.num_whole
        self.can_be_undone = self.can_be_undone and is_short

    @property
    def num_blocks(self) -> int:
        """Blocks that are held after the pass, of the row that has the most."""
        return min(self.quantization.num_blocks(max(self.current.num_after) - self.window.num_sinks), self.max_blocks)

    @cached_property
    def sources(self) -> torch.Tensor:
        """Where each slot behind the sinks comes from, `[rows, num_held - num_sinks]`: the whole tokens, and behind them all blocks."""
        num_sinks, length = self.window.num_sinks, self.block_length
        num_seen = torch.tensor(self.current.num_seen, device=self.device)[:, None]
        tokens = self.window.token(torch.arange(num_sinks, max(self.num_held, num_sinks), device=self.device), num_seen) - num_sinks
        first_whole = (num_seen - num_sinks - self.quantization.residual_length).clamp(min=0) // length * length
        in_block = self.num_whole + tokens // length % self.max_blocks * length + tokens % length
        return torch.where(tokens < first_whole, in_block, tokens % self.num_whole)

    def _rows(self) -> list[tuple[int, int, int]]:
        """Each row, with the tokens behind the sinks that it has seen before and after the pass."""
        current, num_sinks = self.current, self.window.num_sinks
        seen = list(zip(current.num_seen, current.num_after)) * (current.batch_size if self.is_uniform else 1)
        return [(row, before - num_sinks, after - num_sinks) for row, (before, after) in enumerate(seen)]

    @cached_property
    def new_whole(self) -> torch.Tensor:
        """New tokens that are whole after the pass: lines with their rows, slots, tokens (with sinks) and columns."""
        entries = [
            [row, token % self.num_whole, token + self.window.num_sinks, token - after + self.num_columns]
            for row, before, after in self._rows()
            for token in range(max(before, after - self.num_whole, 0), after)
        ]
        return torch.tensor(entries, dtype=torch.long).view(-1, 4).T.to(self.device)

    @cached_property
    def new_blocks(self) -> torch.Tensor:
        """Blocks that the pass quantizes: lines with their rows, slots, the tokens (with sinks) at which they are due, and then for each of
        their tokens its place among the whole ones, or behind them its column."""
        entries = []
        for row, before, after in self._rows():
            end = self.quantization.num_blocks(after)
            for block in range(max(self.quantization.num_blocks(before), end - self.max_blocks), end):
                tokens = range(block * self.block_length, (block + 1) * self.block_length)
                due = tokens.stop - 1 + self.quantization.residual_length + self.window.num_sinks
                column = self.num_whole + self.num_columns - after  # of token 0
                places = [token % self.num_whole if token < before else token + column for token in tokens]
                entries.append([row, block % self.max_blocks, due, *places])
        return torch.tensor(entries, dtype=torch.long).view(-1, 3 + self.block_length).T.to(self.device)


class QuantizedRing(StoredRing):
    """Keys or values of which only the most recent tokens are held as they came (`QuantizedPlan`).

    A block is quantized with the positions that its keys have then. If positions are lowered later, it is rotated when it is read.

    Attributes:
        whole: `[batch, heads, num_whole, head_dim]`.
        blocks: codes, scales and offsets, `[batch, heads, num_blocks, ...]`, as `Quantization.quantize` makes them; and by how much
            positions were lowered since each block was quantized, int64 `[batch, 1, num_blocks, 1]`.
        block_log: what recorded passes have overwritten in the blocks: `(rows, slots, tokens), parts`.
    """

    def __init__(self, quantization: Quantization, by_channel: bool, window: Window, *how):
        super().__init__(window, *how)
        self.quantization, self.by_channel, self.num_whole = quantization, by_channel, quantization.min_recent

    @property
    def num_intact(self) -> int:
        return self.window.num_sinks + self.num_whole

    @property
    def recent(self) -> torch.Tensor:
        return self.whole

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors, self.whole, *self.blocks, *(part for _, parts in self.block_log for part in parts)]

    def views(self, num_tokens: int) -> dict[str, torch.Tensor]:
        num_recent = max(num_tokens - self.window.num_sinks, 0)
        num_blocks = min(self.quantization.num_blocks(num_recent), self.quantization.max_blocks(self.window))
        self._reserve(num_blocks)
        self.rotates_until = None
        blocks = {name: part[:, :, :num_blocks] for name, part in zip(("codes", "scales", "offsets", "lowered"), self.blocks)}
        return super().views(num_tokens) | {"whole": self.whole[:, :, : min(num_recent, self.num_whole)]} | blocks

    @torch.inference_mode(False)
    def allocate(self, batch_size: int) -> None:
        super().allocate(batch_size)
        new, (_, num_heads, _, head_dim) = self.slots.new_zeros, self.slots.shape
        self.whole = new(batch_size, num_heads, self.num_whole, head_dim)
        codes = new(batch_size, num_heads, 0, head_dim, self.quantization.num_bytes, dtype=torch.uint8)
        scales, offsets = (new(batch_size, num_heads, 0, head_dim, num) for num in (1, int(self.quantization.has_offsets)))
        self.blocks = [codes, scales, offsets, new(batch_size, 1, 0, 1, dtype=torch.long)]
        # Blocks may have to be rotated as long as a row has seen no more tokens. None: that has to be looked up.
        self.rotates_until: int | None = -1

    @torch.inference_mode(False)
    def _reserve(self, num_blocks: int) -> None:
        num_before = self.blocks[0].shape[2]
        if num_blocks > num_before:
            num_more = min(max(num_blocks, 2 * num_before), self.quantization.max_blocks(self.window)) - num_before
            self.blocks = [
                torch.cat([part, part.new_zeros(*part.shape[:2], num_more, *part.shape[3:])], dim=2) for part in self.blocks
            ]

    def fetch(self, plan: QuantizedPlan) -> torch.Tensor:
        self._reserve(plan.num_blocks)
        *quantized, lowered = self.blocks
        blocks = self.quantization.dequantize(*quantized, self.by_channel)
        if self._has_lowered(plan.current.num_seen):
            blocks = self.rotation.turn(blocks, self.rotation.angles(lowered, torch.zeros_like(lowered)))
        return take_slots(torch.cat([self.whole, blocks.flatten(2, 3)], dim=2), plan.sources)

    def _has_lowered(self, num_seen: list[int]) -> bool:
        """Whether the window may hold blocks whose positions were lowered since they were quantized."""
        if self.rotates_until is None:
            self.rotates_until = max(num_seen) + self.window.length if bool(self.blocks[3].any()) else -1
        return min(num_seen) <= self.rotates_until

    def store(self, plan: QuantizedPlan, new: torch.Tensor) -> None:
        (rows, slots, _), places = plan.new_blocks[:3], plan.new_blocks[3:]
        if len(rows):
            states = torch.cat([self.whole, new], dim=2)[rows, :, places].permute(1, 2, 0, 3)
            for part, now in zip(self.blocks, (*self.quantization.quantize(states, self.by_channel), 0)):
                part[rows, :, slots] = now
        rows, slots, _, columns = plan.new_whole
        self.whole[rows, :, slots] = new[rows, :, columns]

    def record(self, plan: QuantizedPlan, held: torch.Tensor) -> None:
        rows, slots, tokens, _ = plan.new_whole
        self.log.append(((rows, slots, tokens), self.whole[rows, :, slots]))
        rows, slots, tokens = plan.new_blocks[:3]
        self.block_log.append(((rows, slots, tokens), [part[rows, :, slots] for part in self.blocks]))

    def undo(self, num_tokens: list[int]) -> None:
        for rows, slots, is_undone, overwritten in undone(self.log, num_tokens):
            self.whole[rows, :, slots] = overwritten[is_undone]
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
        self.whole, *self.blocks = (selected(held, index) for held in (self.whole, *self.blocks))


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
