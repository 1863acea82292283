"""A quantized window: all but the sinks and the most recent tokens is held as codes of a few bits, in blocks of tokens."""

import importlib
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from .doors import check_count
from .layers import Ring, selected, take_slots, undone
from .offloaded import StoredRing
from .plan import Plan
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

    A block of tokens, `[heads, q_group_size, head_dim]`, is quantized by itself, in groups of `q_group_size` numbers of a head:
    each channel over the tokens of the block (https://arxiv.org/abs/2402.02750), or else the numbers of one token, and of the
    next where `head_dim` is smaller. Number = code * scale + offset.

    Args:
        backend: "quanto" and "hqq" call optimum.quanto or hqq, which have to be installed; "fp8" is torch's float8_e4m3fn.
        nbits: bits of a code. 2 or 4 with quanto; 1, 2, 3 (which take the room of 4), 4 or 8 with hqq; not to be given with fp8.
        axis_key, axis_value: which groups. With quanto -1 is each channel and 0 a token, with hqq 0 and 1. (fp8 takes tokens.)
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
        if type(self.q_group_size) is not int or self.q_group_size < 8 or self.q_group_size % 8:
            raise ValueError(f"q_group_size must be a positive multiple of 8, got {self.q_group_size!r}.")
        check_count("residual_length", self.residual_length, least=0)
        if module is not None:
            backend_module(self.backend)

    @classmethod
    def of(cls, cache_config: dict) -> "Quantization":
        if not isinstance(cache_config, dict):
            found = f"{cache_config!r} ({type(cache_config).__name__})"
            raise ValueError(f"cache_config (quantized= of a SinkCache) must be a dict, got {found}.")
        names = [option.name for option in fields(cls)]
        for name in sorted(cache_config.keys() - names, key=str):
            raise ValueError(f"cache_config has no option {name}. It takes {', '.join(names)}.")
        return cls(**{name: value for name, value in cache_config.items() if value is not None})

    def check_window(self, window_length: int, num_sink_tokens: int) -> None:
        if window_length - num_sink_tokens < self.min_recent:
            raise ValueError(
                f"window_length={window_length} with num_sink_tokens={num_sink_tokens} leaves nothing to quantize: "
                f"residual_length={self.residual_length} tokens stay as they are, and a block has "
                f"q_group_size={self.q_group_size}. Use a longer window, or smaller ones of these."
            )

    @property
    def min_recent(self) -> int:
        """Tokens behind the sinks that are held as they came, at most. A window of fewer has nothing to quantize."""
        return self.residual_length + self.q_group_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that are quantized of a text of so many tokens behind the sinks, held or evicted."""
        return max(0, num_tokens - self.residual_length) // self.q_group_size

    def max_blocks(self, window: Window) -> int:
        """Blocks that hold all but the last `residual_length` tokens of a window, however it lies over them."""
        return self.num_blocks(window.num_recent + self.q_group_size - 1)

    @property
    def _code_width(self) -> int:
        """Bits that a code takes: a byte holds whole codes."""
        return {None: 8, 3: 4}.get(self.nbits, self.nbits)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Bytes of the codes of a group, and how many scales and offsets it has."""
        return self.q_group_size * self._code_width // 8, 1, int(self.backend != "fp8")

    def by_channel(self, kind: str) -> bool:
        """Whether a group of "keys" or "values" is a channel."""
        return BACKENDS[self.backend][1].get(self.axis_key if kind == "keys" else self.axis_value, False)

    def quantize(self, states: torch.Tensor, by_channel: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Blocks `[blocks, heads, q_group_size, head_dim]` -> codes (uint8), scales and offsets of their `head_dim` groups,
        `[blocks, heads, head_dim, width]` each."""
        groups = states.transpose(2, 3) if by_channel else states.flatten(2).unflatten(2, (states.shape[3], states.shape[2]))
        if self.backend == "fp8":
            scales = (groups.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=torch.finfo(groups.dtype).tiny)
            return (groups / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales, scales[..., :0]
        codes, scales, offsets = quantize_with(self.backend, groups, self.nbits)
        codes = codes.unflatten(-1, (-1, 8 // self._code_width)) << self._shifts(codes.device)
        return codes.sum(-1, dtype=torch.uint8), scales, offsets

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, by_channel: bool) -> torch.Tensor:
        """`[..., head_dim, width]` each -> `[..., q_group_size, head_dim]`."""
        if self.backend == "fp8":
            groups = codes.view(torch.float8_e4m3fn).to(scales.dtype) * scales
        else:
            codes = (codes[..., None] >> self._shifts(codes.device) & 2**self._code_width - 1).flatten(-2)
            groups = torch.addcmul(offsets, codes.to(scales.dtype), scales)
        return groups.transpose(-2, -1) if by_channel else groups.flatten(-2).unflatten(-1, groups.shape[:-3:-1])

    def _shifts(self, device: torch.device) -> torch.Tensor:
        return torch.arange(0, 8, self._code_width, dtype=torch.uint8, device=device)


def quantize_with(backend: str, groups: torch.Tensor, nbits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (uint8), scales and offsets of the groups `[blocks, ..., q_group_size]`."""
    module, dtype, length = backend_module(backend), groups.dtype, groups.shape[-1]
    if backend == "quanto":
        flat, qtype = groups.flatten(0, -2), module.qint4 if nbits == 4 else module.qint2
        scales, shifts = module.MaxOptimizer()(flat, qtype, 0, length)
        codes = torch.ops.quanto.quantize_affine(flat, nbits, 0, length, scales, shifts)
        return tuple(part.unflatten(0, groups.shape[:-1]) for part in (codes, scales, -shifts))
    options = {"group_size": length, "axis": 1, "bitpack": False, "compute_dtype": dtype, "device": str(groups.device)}
    blocks = []
    for block in groups:  # one by one: hqq looks at all groups that it is given when it decides how long to search
        codes, meta = module.Quantizer.quantize(block.flatten(0, -2), nbits, **options)
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
    """A plan that also says which tokens are whole, that is, held as they came, and which are quantized in blocks.

    Number the tokens behind the sinks 0, 1, 2, ... Token t is in slot t mod `num_whole` of the whole tokens, or in block
    t // `length`, which is in slot block mod `max_blocks`. A block is quantized once, by the pass after which `residual_length`
    tokens have come since its last one. So a pass sees its own tokens and the `residual_length` before them as they came.
    """

    def __init__(self, quantization: Quantization, *how):
        super().__init__(*how)
        self.quantization, self.num_whole, self.length = quantization, quantization.min_recent, quantization.q_group_size
        self.max_blocks, num_sinks = quantization.max_blocks(self.window), self.window.num_sinks
        # Tokens behind the sinks that each row has seen before the pass and after it.
        seen = [(num - num_sinks, after - num_sinks) for num, after in zip(self.current.num_seen, self.current.num_after)]
        self.seen = seen * self.current.batch_size if self.is_uniform else seen
        longest = max(after for _, after in seen)
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
        in_blocks = self.num_whole + tokens % (self.max_blocks * length)
        return torch.where(tokens < first_whole, in_blocks, tokens % self.num_whole)

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
        rotates: positions may have been lowered since some block was quantized.
        block_log: what recorded passes have overwritten in the blocks: `(rows, slots, tokens), parts`.
    """

    recent: torch.Tensor = None

    def __init__(self, quantization: Quantization, by_channel: bool, window: Window, *how):
        super().__init__(window, *how)
        self.quantization, self.by_channel = quantization, by_channel

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors, *self.blocks, *(part for _, parts in self.block_log for part in parts)]

    def views(self, num_tokens: int) -> dict[str, torch.Tensor]:
        num_blocks = self.quantization.num_blocks(num_tokens - self.window.num_sinks)
        num_blocks = min(num_blocks, self.quantization.max_blocks(self.window))
        self._reserve(num_blocks)
        self.rotates = True
        blocks = zip(("codes", "scales", "offsets", "lowered"), [part[:, :, :num_blocks] for part in self.blocks])
        return {"slots": self.slots, "recent": self.recent} | dict(blocks)

    def allocate(self, batch_size: int) -> None:
        super().allocate(batch_size)
        new, (_, num_heads, _, head_dim), dtype = self.slots.new_zeros, self.slots.shape, self.slots.dtype
        self.recent = new(batch_size, num_heads, self.quantization.min_recent, head_dim)
        widths = zip(self.quantization.widths, (torch.uint8, dtype, dtype))
        self.blocks = [new(batch_size, num_heads, 0, head_dim, width, dtype=of_part) for width, of_part in widths]
        self.blocks.append(new(batch_size, 1, 0, 1, dtype=torch.long))
        self.rotates = False

    @torch.inference_mode(False)
    def _reserve(self, num_blocks: int) -> None:
        num_more = num_blocks - self.blocks[0].shape[2]
        if num_more > 0:
            more = [part.new_zeros(*part.shape[:2], num_more, *part.shape[3:]) for part in self.blocks]
            self.blocks = [torch.cat(both, dim=2) for both in zip(self.blocks, more)]

    def fetch(self, plan: QuantizedPlan) -> torch.Tensor:
        self._reserve(plan.num_blocks)
        *parts, lowered = self.blocks
        blocks = self.quantization.dequantize(*parts, self.by_channel)
        if self.rotates:
            blocks = self.rotation.turn(blocks, self.rotation.angles(lowered, torch.zeros_like(lowered)))
        return take_slots(torch.cat([self.recent, blocks.flatten(2, 3)], dim=2), plan.sources)

    def store(self, plan: QuantizedPlan, new: torch.Tensor) -> None:
        (rows, slots, _), places = plan.new_blocks[:3], plan.new_blocks[3:]
        if len(rows):
            states = torch.cat([self.recent, new], dim=2)[rows, :, places].permute(1, 2, 0, 3)
            for part, now in zip(self.blocks, (*self.quantization.quantize(states, self.by_channel), 0)):
                part[rows, :, slots] = now
            self.rotates = self.rotates and bool(self.blocks[3].any())
        rows, slots, _, columns = plan.new_whole
        self.recent[rows, :, slots] = new[rows, :, columns]

    def record(self, plan: QuantizedPlan, held: torch.Tensor) -> None:
        whole, blocks = plan.new_whole[:3], plan.new_blocks[:3]
        self.log.append((whole, self.recent[whole[0], :, whole[1]]))
        self.block_log.append((blocks, [part[blocks[0], :, blocks[1]] for part in self.blocks]))

    def undo(self, num_tokens: list[int]) -> None:
        for rows, slots, is_undone, overwritten in undone(self.log, num_tokens):
            self.recent[rows, :, slots] = overwritten[is_undone]
        for rows, slots, is_undone, parts in undone(self.block_log, num_tokens):
            self.rotates = True
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
        self.rotates = True

    def select_rows(self, index: torch.Tensor) -> None:
        super().select_rows(index)
        self.recent, *self.blocks = (selected(held, index) for held in (self.recent, *self.blocks))


class QuantizedStream(Stream):
    def __init__(self, window: Window, layers: dict, quantization: Quantization):
        self.quantization = quantization
        super().__init__(window, layers)
        unquantized = [each.num_sinks + quantization.min_recent for each, _ in self.places if self._quantizes(each)]
        self.num_intact = min(self.num_intact, *unquantized)

    def new_ring(self, window: Window, *how, kind: str | None = None) -> Ring:
        if kind is None or not self._quantizes(window):
            return Ring(window, *how)
        return QuantizedRing(self.quantization, self.quantization.by_channel(kind), window, *how)

    def plan_of(self, window: Window, *how) -> Plan:
        return QuantizedPlan(self.quantization, window, *how) if self._quantizes(window) else Plan(window, *how)

    def _quantizes(self, window: Window) -> bool:
        """Native windows may be too short."""
        return window.num_recent >= self.quantization.min_recent
