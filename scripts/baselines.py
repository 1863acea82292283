"""The other ways to decode with a bounded view, for scripts/benchmark.py to compare `SinkCache` with.

Each is what its source describes, made to give the logits that it should (tests/test_benchmark.py), in few lines and without a
detour that would make it slow. A `Decoder` is filled with a prompt and then takes one token after another. One more,
`FrozenDecoder`, gives no logits that anybody wants: it shows what a token costs where the cache costs nothing.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, QuantizedCache, StaticCache

from common import storage_bytes
from custom_generate.probe import model_traits
from custom_generate.releases import CACHE_NAME
from custom_generate.rotation import Rotation

PREFILL_CHUNK_LENGTH = 1024


@dataclass(frozen=True)
class Setup:
    """What all decoders of a comparison have in common.

    Attributes:
        prompt: what is seen before the first step, `[batch, num_tokens]`: `window_length` tokens, or fewer for a stream.
        turn_length: tokens decoded from one `Decoder.rewind` to the next.
        compile_mode: of `torch.compile`.
        is_random: the caches are filled with random keys and values, and no model reads the prompt.
    """

    window_length: int
    num_sink_tokens: int
    prompt: torch.Tensor
    turn_length: int = 1
    compile_mode: str = "default"
    is_random: bool = False

    @property
    def first_length(self) -> int:
        """Of a cache that grows, so that it is `window_length` on average over a turn."""
        return self.window_length - (self.turn_length + 1) // 2


class Decoder:
    """Takes one token after another, `window_length` of them in view: at each step, or on average over a turn.

    Raises (all of them, when made):
        ValueError: this model, or this machine, can't do it so.
    """

    max_turn_length: int | None = None  # of a method whose time does not change from step to step, and is long
    model: Callable
    cache: object

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, 1, vocab]` for `token`, `[batch, 1]`."""
        return self.model(token, **{CACHE_NAME: self.cache}).logits

    def rewind(self) -> None:
        """Between turns, off the clock: back to the length before the turn, where there is one."""

    @property
    def num_bytes_held(self) -> int:
        return storage_bytes(self.cache)


class RandomStates:
    """In place of a model that reads a prompt: random keys and values. What they are makes no difference to the time of a step,
    and long windows are full at once."""

    def __init__(self, model, window_length: int):
        self.layers = model_traits(model, window_length).layers

    def __call__(self, input_ids: torch.Tensor, **inputs) -> None:
        for index, traits in enumerate(self.layers):
            if traits is not None:
                sizes = [(len(input_ids), num_heads, input_ids.shape[1], head_dim) for num_heads, head_dim in traits.shapes]
                states = (torch.randn(size, dtype=traits.dtype, device=traits.device) for size in sizes)
                inputs[CACHE_NAME].update(*states, index)


def reader(model, setup: Setup) -> Callable:
    """What reads prompts."""
    return RandomStates(model, setup.window_length) if setup.is_random else model


def fill(model, cache, setup: Setup, num_tokens: int | None = None):
    """The cache, after the model has read (the first tokens of) the prompt with it."""
    read = reader(model, setup)
    for chunk in setup.prompt[:, :num_tokens].split(PREFILL_CHUNK_LENGTH, dim=1):
        read(input_ids=chunk, **{CACHE_NAME: cache}, logits_to_keep=1)
    return cache


def compiled(model, mode: str) -> Callable:
    """The forward pass as one graph, or an error."""
    return torch.compile(model.forward, fullgraph=True, mode=mode)


# The caches of transformers


class DynamicDecoder(Decoder):
    """`DynamicCache`, which concatenates: from half a turn before the window to half a turn after it, then cropped."""

    def __init__(self, model, setup: Setup):
        self.model, self.turn_length = model, setup.turn_length
        self.cache = fill(model, DynamicCache(config=model.config), setup, setup.first_length)

    def rewind(self) -> None:
        self.cache.crop(-self.turn_length)


class StaticDecoder(Decoder):
    """`StaticCache` of the length of the window: each step attends to all of it, under a mask, and writes one of the last."""

    def __init__(self, model, setup: Setup, is_compiled: bool = False):
        self.cache = StaticCache(config=model.config, max_cache_len=setup.window_length)
        if any(self.cache.is_sliding) or not all(hasattr(layer, "cumulative_length") for layer in self.cache.layers):
            raise ValueError("the static cache of this model, or of this release of transformers, can't be set back")
        self.first_length = setup.window_length - setup.turn_length
        fill(model, self.cache, setup, self.first_length)
        self.model = compiled(model, setup.compile_mode) if is_compiled else model

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.first_length)


class QuantizedDecoder(Decoder):
    """`QuantizedCache` (KIVI, https://arxiv.org/abs/2402.02750), which can't be cropped: each turn begins with what was there
    before. (It changes no tensor in place.)"""

    def __init__(self, model, setup: Setup, backend: str):
        self.model = model
        self.filled = fill(model, QuantizedCache(backend, model.config), setup, setup.first_length)
        self.rewind()

    def rewind(self) -> None:
        self.cache = copy.copy(self.filled)
        self.cache.layers = [copy.copy(layer) for layer in self.filled.layers]


class NativeWindowDecoder(Decoder):
    """The same weights in a model with a sliding window of its own (Mistral 7B, https://arxiv.org/abs/2310.06825): no sinks."""

    def __init__(self, model, setup: Setup):
        self.model = native_window_model(model, setup.window_length)
        self.cache = fill(self.model, DynamicCache(config=self.model.config), setup)


def native_window_model(model, window_length: int):
    """A model that shares the weights of `model`, and in which all layers have a native window.

    Raises:
        ValueError: there is no such class of models.
    """
    config, family = model.config.to_dict(), model.config.model_type
    if family in ("llama", "mistral"):  # but for the window, one architecture
        config = MistralConfig(**config | {"model_type": "mistral", "sliding_window": window_length})
    elif family in ("qwen2", "qwen3"):
        layer_types = ["sliding_attention"] * model.config.num_hidden_layers
        windows = {"use_sliding_window": True, "sliding_window": window_length, "layer_types": layer_types}
        config = type(model.config)(**config | windows)
    else:
        raise ValueError(f"weights of type {family} fit into no model with native windows that is known here")
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.model.rotary_emb = model.model.rotary_emb
    twin.generation_config = model.generation_config
    return twin.eval()


class FrozenCache(DynamicCache):
    """A full window that is handed out as it is, whatever comes."""

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        return layer.keys, layer.values

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].keys.shape[2], 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].keys.shape[2] - 1


class FrozenDecoder(Decoder):
    """No work for the cache at all: the model, and its attention over `window_length` keys. No such cache can be faster."""

    def __init__(self, model, setup: Setup):
        layers = fill(model, DynamicCache(), setup).layers
        self.model, self.cache = model, FrozenCache()
        self.cache.layers = layers
        self.position_ids = torch.full((1, 1), setup.window_length - 1, device=setup.prompt.device)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return self.model(token, **{CACHE_NAME: self.cache}, position_ids=self.position_ids).logits


# Sinks and recent tokens, in the ways that were published before


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-second, first], dim=-1) * sin


def halves_frequencies(model, window_length: int) -> torch.Tensor:
    """Radians per position, `[head_dim / 2]`, of a model that turns all keys by halves, as those did for which the methods were
    written.

    Raises:
        ValueError: this model does not.
    """
    layers = model_traits(model, window_length).layers
    if None not in layers:
        frequency = layers[0].rotations[0].frequency
        index = torch.arange(len(frequency) // 2)
        halves = Rotation.of_pairs(len(frequency), frequency[len(index) :], index, index + len(index))
        if all(layer.native_window is None and layer.rotations[0].fingerprint == halves.fingerprint for layer in layers):
            return frequency[len(index) :].to(model.device)
    raise ValueError("it is written for models that turn all dimensions of all keys, by halves")


def rotation_table(model, frequencies: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines that move keys by so many positions, `[num_positions, head_dim]`, in the precision of the model."""
    angles = (positions.to(frequencies)[:, None] * frequencies).repeat(1, 2)
    return angles.cos().to(model.dtype), angles.sin().to(model.dtype)


class ConcatenatingCache(DynamicCache):
    """Sinks and recent tokens, in order. When full, a new token is put behind a copy of all but the oldest that is no sink."""

    def __init__(self, model, setup: Setup):
        super().__init__()
        self.window_length, self.num_sink_tokens = setup.window_length, setup.num_sink_tokens
        self.frequencies = halves_frequencies(model, setup.window_length)
        prefill = fill(model, DynamicCache(), setup)
        self.states = [(layer.keys, layer.values) for layer in prefill.layers]

    def append(self, held: torch.Tensor, new: torch.Tensor, move: Callable = lambda recent: recent) -> torch.Tensor:
        """`held` and `new`; if the window is full, the oldest that is no sink is evicted, and what comes behind it is moved."""
        if held.shape[2] < self.window_length:
            return torch.cat([held, new], dim=2)
        sinks, recent = held[:, :, : self.num_sink_tokens], held[:, :, self.num_sink_tokens + 1 :]
        return torch.cat([sinks, move(recent), new], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.states[layer_idx][0].shape[2]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return min(self.get_seq_length() + query_length, self.window_length), 0


class RerotatingCache(ConcatenatingCache):
    """As transformers' own `SinkCache` did up to 4.52: with each token that is evicted, all recent keys turn back by one."""

    def __init__(self, model, setup: Setup):
        super().__init__(model, setup)
        self.back_by_one = rotation_table(model, self.frequencies, torch.tensor([-1]))

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.states[layer_idx]
        keys = self.append(keys, key_states, move=lambda recent: rotate(recent, *self.back_by_one))
        self.states[layer_idx] = keys, self.append(values, value_states)
        return self.states[layer_idx]


class RotatingAtReadCache(ConcatenatingCache):
    """The method of the paper's code (https://arxiv.org/abs/2309.17453): keys are kept as they are before rotation, and all of
    them are turned to their positions in the cache at each step.

    There, the query is turned to position `window_length - 1`, the last. Here it stays at 0, and the keys are turned to
    -(window_length - 1) .. 0: scores depend on distances only, and so the model can stay as it is.
    """

    def __init__(self, model, setup: Setup):
        super().__init__(model, setup)
        self.to_read = rotation_table(model, self.frequencies, torch.arange(1 - setup.window_length, 1))
        unrotated = rotation_table(model, self.frequencies, -torch.arange(setup.prompt.shape[1]))
        self.states = [(rotate(keys, *unrotated), values) for keys, values in self.states]

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.states[layer_idx]
        keys, values = self.append(keys, key_states), self.append(values, value_states)
        self.states[layer_idx] = keys, values
        return rotate(keys, *(table[-keys.shape[2] :] for table in self.to_read)), values


class RerotatingDecoder(Decoder):
    """A token comes at the position that it has in the cache."""

    def __init__(self, model, setup: Setup):
        self.model, self.cache = model, RerotatingCache(model, setup)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        position = min(self.cache.get_seq_length(), self.cache.window_length - 1)
        position_ids = torch.full((1, 1), position, device=token.device)
        return self.model(token, **{CACHE_NAME: self.cache}, position_ids=position_ids).logits


class RotatingAtReadDecoder(Decoder):
    """A token comes at position 0, where a rotation changes nothing."""

    def __init__(self, model, setup: Setup):
        self.model, self.cache = model, RotatingAtReadCache(model, setup)
        self.zero = torch.zeros(1, 1, dtype=torch.long, device=setup.prompt.device)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return self.model(token, **{CACHE_NAME: self.cache}, position_ids=self.zero).logits


class RecomputingDecoder(Decoder):
    """The paper's "sliding window with re-computation": no cache, the last `window_length` tokens anew for each."""

    max_turn_length = 1

    def __init__(self, model, setup: Setup):
        self.model, self.cache = model, setup.prompt

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.cache = torch.cat([self.cache[:, 1:], token], dim=1)
        return self.model(self.cache, use_cache=False, logits_to_keep=1).logits
