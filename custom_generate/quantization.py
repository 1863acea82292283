"""How numbers are quantized: the options of transformers' `QuantizedCache`, and the arithmetic of one block of tokens."""

import importlib
from dataclasses import dataclass, fields

import torch

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

    A block of tokens, `[heads, q_group_size, head_dim]`, is quantized in groups of `q_group_size` numbers of a head: each channel
    over the tokens of the block (https://arxiv.org/abs/2402.02750), or else the numbers of one token, and of the next where
    `head_dim` is smaller. No other block, row or layer has a part in it. Number = code * scale + offset.

    Args:
        backend: "quanto" and "hqq" call optimum.quanto or hqq, which have to be installed; "fp8" is torch's float8_e4m3fn.
        nbits: bits of a code. 2 or 4 with quanto; 1, 2, 3 (which take the room of 4), 4 or 8 with hqq; not to be given with fp8.
        axis_key, axis_value: which groups. With quanto -1 is each channel and 0 a token, with hqq 0 and 1; not to be given with
            fp8, which takes tokens.
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
                f"window_length={window_length} with num_sink_tokens={num_sink_tokens} leaves nothing to quantize: "
                f"residual_length={self.residual_length} tokens stay as they are, and a block has "
                f"q_group_size={self.q_group_size}. Use a longer window, or smaller ones of these."
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
