"""Text of any length from a cache that never holds more than `window_length` tokens: attention sinks + recent tokens.

    model.generate(**inputs, custom_generate="org/sink_cache", trust_remote_code=True, window_length=256, num_sink_tokens=4)

The method is StreamingLLM (https://arxiv.org/abs/2309.17453). Of the tokens seen so far, the cache holds

    [ 0 .. num_sink_tokens - 1 | the most recent ones ]        window_length in all, the newest included

and the model sees them as if they were numbered 0 .. window_length - 1. It does not see further back than that: the context
does not get longer, the text does. While nothing has been evicted, the logits are those of `DynamicCache`.

The file is three ideas, each a small thing that can be read by itself, and what is made of them:

    1. `Window`          where a token is stored: the slots of a ring behind the sinks
    2. `Rotation`        how this model moves a key by some positions: found by asking the model, then checked
    3. `Step`            what each query of one forward pass may see, and where the pass writes
       `Cursor`          the same in tensors, for a compiled pass over one token
       `States`          the keys and values themselves; `StoredStates`, if they are quantized or offloaded
       `SinkCache`       the transformers cache; `Saved`, one on disk
       `generate`        what `custom_generate` calls; `History`, a text that grows without being copied

Nothing here opens a connection, changes anything global, or leaves anything on the model. No file is opened but the one whose path is
passed to `SinkCache.save` or `load`.
"""

import contextlib
import copy
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Cache, DynamicCache, GenerationMixin, LogitsProcessor, PreTrainedModel, cache_utils
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import is_torchdynamo_compiling, logging

logger = logging.get_logger(__name__)

DEFAULT_WINDOW_LENGTH = 256
DEFAULT_NUM_SINK_TOKENS = 4
# Tokens of a prompt that go through the model in one pass: while the window is filling, once it is full, and where it is full but the
# pass can't come in parts. There is one moved copy of the sinks for each token: with many sinks, passes are shorter.
DEFAULT_PREFILL_CHUNK_SIZES = (1024, 512, 128)
MAX_SINK_COPIES = 4 * 512


# ---------------------------------------------------------------------------------------------------------------------
# What differs between releases of transformers
# ---------------------------------------------------------------------------------------------------------------------

# Told by what is there, not by the number of a release, so that the next one has a chance to just work. What transformers hands to
# our methods in one form or another (`update`, `get_mask_sizes`, `crop`) is taken in either, where it comes.

if not hasattr(GenerationMixin, "load_custom_generate"):
    raise ImportError(
        "sink_cache needs transformers 4.52 or newer, which loads custom generation methods: pip install -U transformers"
    )

# The caches of models know which layers have native windows (since 4.56).
HAS_LAYERS_BY_CONFIG = "config" in inspect.signature(DynamicCache.__init__).parameters
# Layers of a model have types (since 4.53). A config may name them before, but nothing reads it.
HAS_LAYER_TYPES = hasattr(Cache, "get_mask_sizes")
# Diverse and constrained beam search are part of transformers (until 4.56; then they live in repositories of their own).
HAS_ALL_BEAM_SEARCHES = hasattr(GenerationMixin, "_constrained_beam_search")
# Models ask the cache where the queries of a pass stand among its keys (since 5.16). Before, they take the number of tokens seen,
# which hides all keys behind a native window.
MODELS_ASK_FOR_QUERY_OFFSET = hasattr(Cache, "get_query_offset")
# What a cache is called where it is passed and returned: `cache` since 5.24. First the name in this release.
CACHE_NAMES = ("cache", "past_key_values")
if "cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    CACHE_NAMES = CACHE_NAMES[::-1]
CACHE_NAME = CACHE_NAMES[0]


def _cache_name(accepted) -> str:
    """What a model that takes these arguments calls its cache: code from the Hub keeps the name it was written with."""
    return next((name for name in CACHE_NAMES if name in accepted), CACHE_NAME)


def _layer_class(name: str) -> type:
    """A class of cache layers; an empty one where the release has no such layers."""
    return getattr(cache_utils, name, None) or type(name, (), {})


DynamicLayer = _layer_class("DynamicLayer")
DynamicSlidingWindowLayer = _layer_class("DynamicSlidingWindowLayer")
IndexedLayer = _layer_class("DynamicIndexedLayer")
LinearAttentionLayer = _layer_class("LinearAttentionLayer")
DummyLayer = _layer_class("DummyLayer")
FULL_ATTENTION = DynamicLayer, _layer_class("LinearAttentionAndFullAttentionLayer")
SLIDING_ATTENTION = DynamicSlidingWindowLayer, _layer_class("LinearAttentionAndSlidingWindowAttentionLayer")


def _makes_masks_itself(model: torch.nn.Module) -> bool:
    """Whether this is a model of the old kind (all before 4.53, the last ones in 5.1), which does not leave masks to transformers.

    It takes one mask for all layers, with floats that are added to the scores. One that it makes by itself covers the whole text.
    """
    return any(hasattr(module, "_update_causal_mask") for module in model.modules())


def _own_cache(config, kind: type[DynamicCache] = DynamicCache) -> DynamicCache:
    """The cache that the model's own `generate` would make."""
    return kind(config=config) if HAS_LAYERS_BY_CONFIG else kind()


def _own_layers(config) -> list:
    """The layers of that cache, new; or what stands for them where a release does not tell them apart."""
    if HAS_LAYERS_BY_CONFIG:
        return _own_cache(config).layers
    sliding_window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    default = "full_attention" if sliding_window is None else "sliding_attention"
    layers = []
    layer_types = getattr(config, "layer_types", None) if HAS_LAYER_TYPES else None
    for layer_type in layer_types or [default] * config.num_hidden_layers:
        layers.append(DynamicSlidingWindowLayer() if layer_type == "sliding_attention" else DynamicLayer())
        layers[-1].sliding_window = sliding_window
    return layers


def _named_states(layer) -> dict[str, torch.Tensor]:
    """The recurrent and convolutional states of a layer, one of each or several (since 5.14), by names that say where they belong:
    `conv_states.0`."""
    kinds = {name: getattr(layer, name) for name in ("conv_states", "recurrent_states")}
    kinds = {name: states if isinstance(states, dict) else {0: states} for name, states in kinds.items()}
    return {f"{name}.{key}": state for name, states in kinds.items() for key, state in states.items() if state is not None}


def _restore_recurrent(layer, states: dict[str, torch.Tensor], has_previous_state: list[bool]) -> None:
    """Put named states into a new layer of transformers, which makes their room by itself."""
    for name, state in states.items():
        kind, key = name.split(".")
        place = getattr(layer, kind)
        has_several = isinstance(place, dict)
        layer.lazy_initialization(**{kind: state}, **({"state_idx": int(key)} if has_several else {}))
        (getattr(layer, kind)[int(key)] if has_several else getattr(layer, kind)).copy_(state)
    if isinstance(layer.has_previous_state, dict):
        layer.has_previous_state.update(enumerate(has_previous_state))
    else:
        (layer.has_previous_state,) = has_previous_state


def _noting(method):
    place = list(inspect.signature(method).parameters).index("layer_idx")

    @functools.wraps(method)
    def noting(cache, *args, **kwargs):
        cache.layers_reached.add(kwargs.get("layer_idx", (cache, *args, None)[place]))
        return method(cache, *args, **kwargs)

    return noting


class NotesRecurrentLayers:
    """A cache with `layers_reached`: the recurrent layers that have asked for their states or brought new ones, in whatever way the
    release has for it."""


for _name in [name for name in vars(Cache) if name.endswith("_state")]:
    setattr(NotesRecurrentLayers, _name, _noting(getattr(Cache, _name)))


class NotingCache(NotesRecurrentLayers, DynamicCache):
    """One of transformers' own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.layers_reached = set()


def _num_states(layer) -> int:
    """How many convolutional and recurrent states a layer has of each."""
    return getattr(layer, "number_of_states", 1)


def _has_previous_state(layer) -> list[bool]:
    """For each state of a layer, whether any token has been through it."""
    flags = layer.has_previous_state
    return list(flags.values()) if isinstance(flags, dict) else [flags]


def _cached_states(cache: DynamicCache) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Keys and values of each layer."""
    if hasattr(cache, "layers"):  # since 4.54
        return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))


def _stop_counting(view: torch.nn.Module) -> None:
    """Before 5.4, `generate` takes what is new from the lengths of `input_ids` and of what the cache has seen, and fails if the prompt
    is the shorter one. Nothing reads the positions that it makes of them, so one will do."""
    if hasattr(view, "_get_initial_cache_position"):

        def get_initial_cache_position(length, device, model_kwargs):
            model_kwargs["cache_position"] = torch.ones(1, dtype=torch.long, device=device)
            return model_kwargs

        view._get_initial_cache_position = get_initial_cache_position


def _input_device(model: torch.nn.Module) -> torch.device:
    """Where the model takes its inputs; if its first weights are offloaded, where they are brought to for each pass."""
    if model.device.type != "meta":
        return model.device
    devices = [device for device in getattr(model, "hf_device_map", {}).values() if device not in ("cpu", "disk")]
    return torch.device(devices[0] if devices else "cpu")


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model of transformers inside of what torch.compile, PEFT or DataParallel puts around it.

    Raises:
        ValueError: it is wrapped so that it gets other tokens than it is called with.
    """
    _check_prompt_learning(model)
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod") or hasattr(model, "module"):
            model = getattr(model, "_orig_mod", None) or model.module
        else:
            break
    _check_prompt_learning(getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", model))  # put there by PEFT
    return model


def _check_prompt_learning(model: torch.nn.Module) -> None:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"SinkCache can't serve {type(model).__name__} with {model.active_peft_config.peft_type.value}: its virtual tokens would "
            "pass by the cache, which could neither count nor hold them. Adapters that change weights (LoRA and the like) work."
        )


def _is_autocast_enabled(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


# By how many tensors, in Python or not, the memory of one is used. torch has it for its CUDA graphs, and promises nothing.
num_users_of_storage = getattr(torch._C, "_storage_Use_Count", None)


def _num_users(tensor: torch.Tensor) -> int:
    return num_users_of_storage(tensor.untyped_storage()._cdata)


def _shallow_copy(model: torch.nn.Module) -> torch.nn.Module:
    """As `copy.copy`, also for a class that does not let it (FSDP2), and with what model.compile() has made."""
    view = object.__new__(type(model))
    vars(view).update(vars(model))
    return view


def _as_written(model: torch.nn.Module) -> torch.nn.Module:
    """The model as it is when nobody compiles it, sharing all else: a pass of a shape that comes once is not worth a graph."""
    view = _shallow_copy(model)
    view._compiled_call_impl = None  # model.compile()
    forward = getattr(model.forward, "_torchdynamo_orig_callable", None)  # model.forward = torch.compile(model.forward)
    if forward is not None:
        view.forward = forward
    return view


# ---------------------------------------------------------------------------------------------------------------------
# 1. Where a token is stored
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """The tokens that a layer holds: the first `num_sinks` and the most recent ones, `length` in all.

    Tokens are numbered 0, 1, 2, ... in each row by itself, padding not counted. Until `length` tokens have been seen, token t
    is in slot t; from then on the slots behind the sinks are a ring, and each new token takes the slot of the oldest.
    """

    length: int
    num_sinks: int

    @property
    def num_recent(self) -> int:
        return self.length - self.num_sinks

    def slot(self, token):
        """The slot of a token (an int, or a tensor of them)."""
        on_ring = self.num_sinks + (token - self.num_sinks) % self.num_recent
        if isinstance(token, torch.Tensor):
            return torch.where(token < self.num_sinks, token, on_ring)
        return token if token < self.num_sinks else on_ring

    def token(self, slot: torch.Tensor, num_seen: torch.Tensor) -> torch.Tensor:
        """The token in each slot after `num_seen` tokens; for a slot not yet used, a number that is not less than `num_seen`."""
        laps = torch.div(num_seen - 1 - slot, self.num_recent, rounding_mode="floor").clamp(min=0)
        return torch.where(slot < self.num_sinks, slot, slot + laps * self.num_recent)

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether the query of one token attends to the key of another."""
        return (key <= query) & ((key < self.num_sinks) | (key > query - self.num_recent))

    @property
    def part_length(self) -> int:
        """How long the parts of a long pass over a full window should be (`Step`): long ones attend to many copies of the sinks, and of
        short ones each has a copy of the recent tokens. Fitted to what was fastest for 4 sinks and windows of 256 to 4,096 on a CPU; a
        power of two, since most prompts are cut at multiples of one."""
        return 2 ** max(0, round(math.log2(1.2 * self.num_recent**0.75 / (self.num_sinks + 1) ** 0.5)))

    def shift(self, position):
        """How far the sinks have to be moved for the query at a position, so that the first stands `length - 1` before it."""
        shift = position - self.length + 1
        return shift.clamp(min=0) if isinstance(shift, torch.Tensor) else max(shift, 0)


# ---------------------------------------------------------------------------------------------------------------------
# 2. How this model moves a key
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864) as this model applies it to the keys of a layer.

    Dimension i of a key turns together with dimension `partner[i]`, by `frequency[i]` radians per position; the two of a pair
    carry opposite signs, and a dimension that does not turn has frequency 0. This covers halves and interleaved pairs,
    leading, trailing or all dimensions, either direction, and none at all.

    Attributes:
        frequency: float32, `[head_dim]`
        partner: int64, `[head_dim]`
    """

    frequency: torch.Tensor
    partner: torch.Tensor

    @classmethod
    def of_pairs(cls, head_dim: int, inv_freq: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> "Rotation":
        """The rotation that turns dimension `first[i]` towards dimension `second[i]`, `inv_freq[i]` radians a position."""
        frequency, partner = torch.zeros(head_dim, dtype=torch.float32), torch.arange(head_dim)
        frequency[first], frequency[second] = -inv_freq, inv_freq
        partner[first], partner[second] = second, first
        return cls(frequency, partner)

    @classmethod
    def identity(cls, head_dim: int) -> "Rotation":
        """No rotation: keys do not depend on the position."""
        return cls(torch.zeros(head_dim, dtype=torch.float32), torch.arange(head_dim))

    @property
    def is_identity(self) -> bool:
        return not self.frequency.any()

    @property
    def fingerprint(self) -> tuple:
        """Equal for equal rotations."""
        return tuple(self.frequency.tolist()), tuple(self.partner.tolist())

    def as_tensor(self) -> torch.Tensor:
        """Both in one, float32 `[2, head_dim]`."""
        return torch.stack([self.frequency, self.partner.float()])

    def to(self, device: torch.device) -> "Rotation":
        return Rotation(self.frequency.to(device), self.partner.to(device))

    def angles(self, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """Angles that move a key from position `start` to `stop`: `[...]` -> `[..., head_dim]`, float32.

        Each end is rounded as the model rounds it, so that a moved key meets the query as the model's own key would.
        """
        return stop[..., None].float() * self.frequency - start[..., None].float() * self.frequency

    def turn(self, keys: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Keys `[..., head_dim]` turned by angles that broadcast to them. Computed in float32 and rounded once."""
        return turned(self.with_partners(keys), (angles.cos(), angles.sin())).to(keys.dtype)

    def with_partners(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What has to be known of keys to turn them: themselves in float32, and what turns together with each dimension."""
        wide = keys.float()
        return wide, wide[..., self.partner]

    def misfit(self, keys: torch.Tensor, positions: torch.Tensor) -> float:
        """How far keys `[tokens, positions, heads, head_dim]` are from those at the first position, moved to the others.

        The worst dimension, relative to the length of the pair it belongs to: a wrong frequency can't hide behind right ones.
        """
        first = keys[:, :1].float()
        angles = self.angles(positions[:1].expand_as(positions), positions)
        error = self.turn(first, angles[None, :, None]) - keys.float()
        length = (first.square() + first[..., self.partner].square()).mean((0, 2))
        return (error.square().mean((0, 2)) / (length + 1e-4 * length.mean())).max().sqrt().item()


def turned(with_partners, turn) -> torch.Tensor:
    """Keys and their partners, turned by cosines and sines: float32."""
    (keys, partners), (cosines, sines) = with_partners, turn
    return torch.addcmul(keys * cosines, partners, sines)


def candidate_rotations(head_dim: int, tables: list[torch.Tensor]):
    """Every rotation that models are known to apply, with the frequencies in `tables`; most usual first."""
    yield Rotation.identity(head_dim)
    for inv_freq in tables:
        num_pairs = len(inv_freq)
        index = torch.arange(num_pairs)
        if 2 * num_pairs > head_dim:
            continue  # the table of other, wider heads
        for offset in sorted({0, head_dim - 2 * num_pairs}):
            halves = offset + index, offset + index + num_pairs
            interleaved = offset + 2 * index, offset + 2 * index + 1
            for first, second in (halves, interleaved, halves[::-1], interleaved[::-1]):
                yield Rotation.of_pairs(head_dim, inv_freq, first, second)


@dataclass(frozen=True)
class LayerTraits:
    """What the cache has to know of one attention layer. Pairs are for what the layer caches: keys and values.

    (Most models rotate keys. Those with latent attention cache a latent as their keys, and the rotated part as their values.)

    Attributes:
        native_window: the layer's own sliding window, None for full attention.
        rotations: how each is moved.
        shapes: `(num_heads, head_dim)` of each.
    """

    native_window: int | None
    rotations: tuple[Rotation, Rotation]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ModelTraits:
    """What the cache has to know of a model.

    Attributes:
        layers: None for a layer without keys of its own: a recurrent or convolutional state, or another layer's keys.
        turns_at: the position at which held keys are turned back.
        num_positions: positions from here on are not computed as those below. None: there is no such limit.
        is_ordered: scores depend on the order in which keys are handed out (ALiBi), and keys do not depend on positions.
        recurrent_states: those of each layer that has any, by their names: recurrent or convolutional ones, with no rows.
        noted_layers: those of them that say when a pass has reached them (`NotesRecurrentLayers`).
        is_chunked: layers attend within chunks of the text (Llama 4), and the window fits into one.
        is_indexed: layers choose what they attend to (DeepSeek Sparse Attention), and the window is not more than they may choose.
        layer_types: one name a layer, where the model takes one mask for each type of layer. Else None.
        has_old_masks: `_makes_masks_itself`.
    """

    layers: tuple[LayerTraits | None, ...]
    turns_at: int
    num_positions: int | None
    is_ordered: bool
    recurrent_states: dict[int, dict[str, torch.Tensor]]
    noted_layers: frozenset[int]
    is_chunked: bool
    is_indexed: bool
    layer_types: tuple[str, ...] | None
    has_old_masks: bool

    @property
    def is_recurrent(self) -> bool:
        """There are recurrent or convolutional states."""
        return len(self.recurrent_states) > 0

    @functools.cached_property
    def has_local_attention(self) -> bool:
        """The model's own masks of some layers hide what is far behind a query."""
        return self.is_chunked or any(layer is not None and layer.native_window is not None for layer in self.layers)


# How far keys may be from a rotation that explains them: what rounding does, relative to the length of a pair. In float32 it is that of
# the angle at the largest position; in 16 bits, the model rounds cosine, sine, both products and their sum. Behind the first layer
# (second number) scores that were rounded one way or another come on top, where a token can attend to something else than itself.
ROTATION_TOLERANCE = {
    torch.float64: (2e-3, 2e-3),
    torch.float32: (2e-3, 2e-3),
    torch.float16: (4e-3, 4e-2),
    torch.bfloat16: (1.5e-2, 0.15),
}

# The same text at two places may have logits that differ by so much, in standard deviations. Rounding only: deep models add it up.
LOGITS_TOLERANCE = {torch.float64: 3e-4, torch.float32: 3e-4, torch.float16: 0.3, torch.bfloat16: 1.0}

# Held keys are turned back when positions reach twice the window; but in 16 bits, where that costs a rounding, not before here:
# the float32 angles of such positions are still many times finer than the cosines of the model.
MIN_TURN_IN_16_BITS = 2**14

# From somewhere here on, what float32 makes of the angles of two positions may depend on where these are.
LONGEST_USUAL_WINDOW = 2**15

# float32 holds every whole number up to here. What a model computes from larger positions is not what they say.
MAX_EXACT_POSITION = 2**24

# What was found out, so that a model is asked once for each window length.
_known_traits: "weakref.WeakKeyDictionary[torch.nn.Module, dict]" = weakref.WeakKeyDictionary()


def model_traits(model: torch.nn.Module, window_length: int) -> ModelTraits:
    """Finds out what the cache has to know of a model, by one forward pass over 36 tokens (45 in 16 bits) the first time.

    Raises:
        ValueError: the rules can't be kept for this model. The message says what stands in the way.
    """
    known = _known_traits.setdefault(model, {})
    key = window_length, model.dtype, model.device
    if key not in known:
        known[key] = _find_model_traits(_as_written(model), window_length)
    return known[key]


@torch.no_grad()
def _find_model_traits(model: torch.nn.Module, window_length: int) -> ModelTraits:
    probe = Probe(model, window_length)
    layers = probe.layers()
    probe.check_that_no_token_sees_later_ones()
    probe.check_that_logits_depend_on_distances_only()
    has_rotation = any(not rotation.is_identity for layer in layers if layer for rotation in layer.rotations)
    noted_layers = probe.check_that_texts_can_be_split() if probe.is_recurrent else frozenset()
    if probe.is_recurrent and not has_rotation:
        probe.check_that_order_does_not_count()
    probe.check_length("keep_window_size", "from there on it chooses among its keys")  # Doge
    if not has_rotation:
        probe.check_length("max_seq_len", "its position biases end there")  # MPT
    if probe.is_chunked:
        probe.check_length("attention_chunk_size", "its layers attend within chunks of that length")
    if probe.is_indexed:
        probe.check_length("index_topk", "from there on its layers choose among their keys")
    return ModelTraits(
        layers=layers,
        turns_at=probe.turns_at,
        num_positions=probe.num_positions,
        is_ordered=not has_rotation and not probe.is_recurrent,
        recurrent_states=probe.recurrent_states(),
        noted_layers=noted_layers,
        is_chunked=probe.is_chunked,
        is_indexed=probe.is_indexed,
        layer_types=probe.layer_types if probe.takes_masks_by_type else None,
        has_old_masks=probe.has_old_masks,
    )


class Probe:
    """A model that is asked how it treats positions.

    It is shown texts of three tokens, a a b, each at several positions. The first token sees only itself, the second itself and its
    copy: they go through all layers alike wherever they stand and whatever the third is, so that their keys differ by what the
    model does to positions, and by nothing else. The third has to choose what to attend to, and must choose alike wherever the
    text stands.

    Raises:
        ValueError: from every method, when the answer is that the rules can't be kept.
    """

    def __init__(self, model: torch.nn.Module, window_length: int):
        self.model, self.name, self.window_length = model, type(model).__name__, window_length
        _check_is_decoder(model)
        self.device = _input_device(model)
        self.config = model.config.get_text_config(decoder=True)
        self.has_old_masks = _makes_masks_itself(model)
        if self.has_old_masks and getattr(self.config, "attention_chunk_size", None):
            raise self._refusal("its layers with chunked attention take no masks. With transformers 4.53 or newer they do")
        self.layer_types = tuple(getattr(self.config, "layer_types", None) or ()) or None
        self.is_chunked = CHUNKED in (self.layer_types or ())
        if self.has_old_masks and any(getattr(module, "is_sliding", False) for module in model.modules()):
            raise self._refusal("its layers change the mask they are given. With transformers 4.53 or newer they don't")
        if any(hasattr(module, "_cached_keys") for module in model.modules()):  # GLM MoE DSA, until 5.10
            raise self._refusal(
                "its layers hold keys of their own outside of the cache. With transformers 5.11 or newer they don't"
            )
        self.accepted = inspect.signature(model.forward).parameters
        self.num_positions = _num_positions(model, self.config) if "position_ids" in self.accepted else None
        if self.num_positions is not None and 2 * window_length > self.num_positions:
            raise ValueError(
                f"window_length={window_length} is too long for {self.name}: what it computes of positions changes or ends at position "
                f"{self.num_positions}, and the cache needs positions up to twice the window. Use a window_length of at most "
                f"{self.num_positions // 2}."
            )
        turns_at = max(2 * window_length, MIN_TURN_IN_16_BITS if model.dtype.itemsize == 2 else 0)
        self.turns_at = min(turns_at, self.num_positions or turns_at)
        with self._looking():
            own_layers = _own_layers(self.config)
        self.native_windows = [self._native_window(index, layer) for index, layer in enumerate(own_layers)]
        self.is_recurrent = any(isinstance(layer, LinearAttentionLayer) for layer in own_layers)
        self.is_indexed = any(isinstance(layer, IndexedLayer) for layer in own_layers)
        # Indexers take one mask for all layers, and none by type, before 5.14.
        takes_one_mask = self.is_indexed and len(set(self.layer_types or ())) <= 1
        self.takes_masks_by_type = not (self.has_old_masks or takes_one_mask)

        self.positions = torch.tensor(sorted({0, 1, window_length, 2 * window_length - 3, self.turns_at - 3} - {-1}))
        with self._looking():
            embeddings = model.get_input_embeddings()
            # ZeRO-3 leaves a weight of no rows.
            vocab_size = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
            a, b = vocab_size // 3, 2 * vocab_size // 3
            self.texts = torch.tensor([[a, a, b], [b, b, a], [a, a, (a + b) // 2]])
            # Keys are compared, and must not be cut to a native window: a cache of full attention, unless layers need others.
            needs_own = self.is_recurrent or self.is_indexed or any(isinstance(layer, DummyLayer) for layer in own_layers)
            self.cache = _own_cache(self.config) if needs_own else DynamicCache()
            # Without one, they take the position of a query for its slot, before 5.17.
            mask = _as_mask(torch.ones(1, 1, 3, 3).tril().bool(), model.dtype) if takes_one_mask else None
            self.logits = self._ask(self.cache, slice(0, 3), mask)

    def layers(self) -> tuple[LayerTraits | None, ...]:
        """What there is to know of each layer: how its keys move, and its shapes."""
        cached = _cached_states(self.cache)
        holds_keys = [window != NO_KEYS for window in self.native_windows]
        if not any(holds_keys) or len(cached) != len(holds_keys) or any(c[0] is None for c, h in zip(cached, holds_keys) if h):
            raise self._refusal("attention layers do not put their keys and values into its cache")
        tables = _inverse_frequencies(self.model, self.config)
        traits = []
        for index, (states, native_window) in enumerate(zip(cached, self.native_windows)):
            if native_window == NO_KEYS:
                traits.append(None)
                continue
            keys, values = states
            if keys.dtype != values.dtype:
                dtypes = f"keys in {keys.dtype} and values in {values.dtype}"
                raise self._refusal(f"it has {dtypes} (under autocast?). Put it into one dtype, model.to(dtype)")
            rotations = tuple(self._rotation(index, each.cpu(), tables).to(each.device) for each in states)
            shapes = tuple((each.shape[1], each.shape[3]) for each in states)
            traits.append(LayerTraits(native_window, rotations, shapes, keys.dtype, keys.device))
        return tuple(traits)

    def recurrent_states(self) -> dict[int, dict[str, torch.Tensor]]:
        """What the layers hold beside keys and values, without the rows."""
        layers = enumerate(self.cache.layers) if self.is_recurrent else ()
        layers = {index: layer for index, layer in layers if isinstance(layer, LinearAttentionLayer)}
        return {
            index: {name: state[:0].clone() for name, state in _named_states(layer).items()} for index, layer in layers.items()
        }

    def check_that_no_token_sees_later_ones(self) -> None:
        """The first and the last text begin alike."""
        layers = [states for states, window in zip(_cached_states(self.cache), self.native_windows) if window != NO_KEYS]
        for states in layers[-1]:
            _, tolerance = ROTATION_TOLERANCE[states.dtype]
            states = self._by_position(states[:, :, :2]).float()
            difference = self._worst((states[0] - states[-1]).flatten(1).abs().amax(1))
            if difference > tolerance * states.std():
                raise self._refusal("a token sees others that come after it")

    def check_that_logits_depend_on_distances_only(self) -> None:
        logits = self.logits[:, -1]
        at_first_position = self._by_position(logits)[:, :1].expand(-1, len(self.positions), -1).flatten(0, 1)
        self._compare(logits, at_first_position, 1, "its logits depend on where a text stands, not only on distances")

    def check_that_texts_can_be_split(self) -> frozenset[int]:
        """Returns the recurrent layers that say of themselves that a pass has reached them."""
        cache = _own_cache(self.config, NotingCache)
        try:
            self._ask(cache, slice(0, 1), dict.fromkeys((*FULL_MASKS, *SLIDING_MASKS, *PADDING_MASKS)))
        except Exception as error:
            raise self._refusal("this release takes no masks for its recurrent and other layers: try a newer one") from error
        noted, cache.layers_reached = cache.layers_reached, set()
        logits = self._ask(cache, slice(1, 3))
        reason = "its logits depend on how a text is split into passes: its recurrent layers forget their state in a pass of several tokens"
        self._compare(logits[:, -1], self.logits[:, -1], 10, reason)  # 10: the two ways of a recurrence round differently
        return frozenset(noted & cache.layers_reached - {None})

    def check_that_order_does_not_count(self) -> None:
        """One token more, on the keys as they are and in reverse."""
        flipped = copy.deepcopy(self.cache)
        for layer, native_window in zip(flipped.layers, self.native_windows):
            if native_window != NO_KEYS:
                layer.keys, layer.values = layer.keys.flip(2), layer.values.flip(2)
        logits = self._ask(self.cache, slice(2, 3))[:, -1]
        self._compare(
            self._ask(flipped, slice(2, 3))[:, -1], logits, 1, "its scores depend on the order in which keys are cached"
        )

    def check_length(self, option: str, reason: str) -> None:
        length = getattr(self.config, option, None)
        if length is not None and self.window_length > length:
            raise ValueError(f"window_length={self.window_length} is too long for {self.name} ({option}={length}): {reason}.")

    def _ask(self, cache: DynamicCache, columns: slice, masks: dict | torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[texts * positions, 1 or columns, vocab]` of these columns of the texts, which go into the cache."""
        inputs = {
            "input_ids": self.texts.repeat_interleave(len(self.positions), dim=0)[:, columns],
            "position_ids": (self.positions.repeat(len(self.texts))[:, None] + torch.arange(3))[:, columns],
            _cache_name(self.accepted): cache,
            "attention_mask": masks,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        inputs = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        return self.model(**{name: value for name, value in inputs.items() if name in self.accepted}).logits

    def _by_position(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (len(self.texts), len(self.positions)))

    def _compare(self, logits: torch.Tensor, reference: torch.Tensor, slack: float, reason: str) -> None:
        """Refuse if logits `[texts * positions, vocab]` differ."""
        difference = self._worst(self._by_position((logits - reference).float().abs()).amax((1, 2)))
        if difference > slack * LOGITS_TOLERANCE[self.model.dtype] * reference.float().std():
            raise self._refusal(reason)

    def _worst(self, differences: torch.Tensor) -> torch.Tensor:
        """The largest; but in 16 bits, where rounding may send a token to another expert, what all of them come to."""
        return differences.min() if self.model.dtype.itemsize == 2 else differences.max()

    def _rotation(self, index: int, states: torch.Tensor, tables: list[torch.Tensor]) -> Rotation:
        """The rotation that explains the states `[texts * positions, heads, 3, head_dim]` of a layer."""
        if states.shape[0] == len(self.texts) * len(self.positions) and states.shape[2] <= 3:
            tolerance, deep_tolerance = ROTATION_TOLERANCE[states.dtype]
            first, best = self._by_position(states[:, :, 0]), (float("inf"), None)
            for rotation in candidate_rotations(states.shape[3], tables):
                best = min(best, (rotation.misfit(first, self.positions), rotation), key=lambda pair: pair[0])
                if best[0] <= tolerance:
                    break
            misfit, rotation = best
            # In the first layer the copy must be as the original, moved by one, or the model counts positions by itself.
            is_first = index == 0 and not self.is_recurrent
            step = torch.arange(2) if "position_ids" in self.accepted else torch.zeros(2)
            if is_first and misfit <= tolerance:
                misfit = rotation.misfit(states[:, :, :2].transpose(1, 2), step)
            if misfit <= (tolerance if index == 0 else deep_tolerance):
                return rotation
        raise self._refusal(
            f"no known rotation explains how the keys of layer {index} change with their position. It has absolute or learned position "
            "embeddings, or a rotation of its own"
            + (". It is in training mode: if it has dropout, call `model.eval()` first" if self.model.training else "")
        )

    def _native_window(self, index: int, layer) -> int | str | None:
        """The sliding window of a layer of the model's own cache: None for full attention, `NO_KEYS` for a layer without keys."""
        if type(layer) in FULL_ATTENTION or self.is_chunked and self.layer_types[index] == CHUNKED:
            return None
        if type(layer) in SLIDING_ATTENTION:
            return layer.sliding_window
        if type(layer) is IndexedLayer and hasattr(self.config, "index_topk"):
            return None
        if type(layer) in (LinearAttentionLayer, DummyLayer):
            return NO_KEYS
        raise self._refusal(f"layer {index} keeps another kind of state ({type(layer).__name__})")

    @contextlib.contextmanager
    def _looking(self):
        """Whatever goes wrong in a first look at a model is a reason to refuse it."""
        try:
            yield
        except Exception as error:
            raise self._refusal(f"a first look at how it caches keys failed ({type(error).__name__}: {error})") from error

    def _refusal(self, reason: str) -> ValueError:
        if self.window_length > LONGEST_USUAL_WINDOW:
            reason += f" (Or it can't tell positions up to {2 * self.window_length} apart, which such a window needs: try a shorter one)"
        return ValueError(f"SinkCache can't keep its rules for {self.name} with window_length={self.window_length}: {reason}.")


def _check_is_decoder(model: torch.nn.Module) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"SinkCache serves decoder-only models, and {type(model).__name__} is an encoder-decoder model.")


# In place of the length of a native window.
NO_KEYS = "no keys"
# The type of layers that attend within chunks of the text.
CHUNKED = "chunked_attention"
# Under which names models with recurrent layers look for the masks of those that see all, of those with a native window, and of those
# that have to know only what is padding.
FULL_MASKS, SLIDING_MASKS, PADDING_MASKS = (
    ("full_attention", "hybrid"),
    ("sliding_attention", "hybrid_sliding"),
    ("linear_attention", "conv"),
)


def _inverse_frequencies(model: torch.nn.Module, config) -> list[torch.Tensor]:
    """The tables of rotary frequencies that the model holds, each once, float32 on the CPU."""
    tables: list[torch.Tensor] = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            table = buffer.float().cpu()
            if not any(torch.equal(table, other) for other in tables):
                tables.append(table)
    if not tables and getattr(config, "rotary_dim", None):  # GPT-J, CodeGen: they hold sines and cosines instead
        tables.append(10000.0 ** -(torch.arange(0, config.rotary_dim, 2) / config.rotary_dim))
    return tables


def _num_positions(model: torch.nn.Module, config) -> int | None:
    """The position from which on the model computes positions in another way or not at all, None if there is none."""
    limits = []
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}  # since 5.0; before
    places = [parameters, *(each for each in parameters.values() if isinstance(each, dict)), vars(config)]
    originals = [each["original_max_position_embeddings"] for each in places if "original_max_position_embeddings" in each]
    for module in model.modules():
        rope_types = getattr(module, "rope_type", None) or ()
        rope_types = rope_types.values() if isinstance(rope_types, dict) else [rope_types]
        if any("dynamic" in rope_type for rope_type in rope_types):
            limits.append(module.original_max_seq_len)
        if any(rope_type == "longrope" for rope_type in rope_types):
            limits += originals
    if parameters.get("llama_4_scaling_beta"):  # Ministral 3: queries are scaled from there on
        limits += originals
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4, likewise
        limits.append(config.floor_scale - 1)
    if not any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        limits.append(getattr(config, "max_position_embeddings", None))  # tables of that length
    return min((limit for limit in limits if limit is not None), default=None)


# ---------------------------------------------------------------------------------------------------------------------
# 3. What one forward pass does
# ---------------------------------------------------------------------------------------------------------------------


class Step:
    """One forward pass through the layers of one window: decided once here, applied alike in every layer.

    There are two kinds. Where nothing that a query of the pass needs is evicted by it (the window is filling, or there is a
    single new token), the new tokens are written to their slots and the slots are handed out as they are. Else the queries need
    the sinks at different distances and tokens that later ones evict, so the pass is handed

        [ the sinks as query 0 sees them | ... as query n-1 sees them | recent tokens as before the pass | new tokens ]

    with a mask in which each query sees its own copy of the sinks.

    A long pass over full windows comes in parts: `num_parts` rows of the batch for each row of the cache, one for each part of the
    new tokens. A part is handed the copies of the sinks for its own queries, and only those tokens that they see. So attention costs
    little more than over the window, while all else in the model works on many tokens at once.

    Args:
        window: the window of these layers.
        num_seen: tokens seen before the pass, one number for each row, or a single one if that serves all rows.
        num_new: new tokens of each row. They are the last ones of its `num_columns` columns, what comes before is padding.
        num_columns: length of the pass.
        base: what is subtracted from each row's token numbers to get positions.
        is_ordered: hand out keys in the order of their tokens, right-aligned.
        num_parts: in which the pass comes. With more than one, all windows are full and nothing is padding.
    """

    def __init__(
        self,
        window: Window,
        num_seen: list[int],
        num_new: list[int],
        num_columns: int,
        base: list[int],
        device: torch.device,
        is_ordered: bool,
        num_parts: int = 1,
    ):
        self.window = window
        self.device = device
        self._num_new = num_new
        self.num_columns, self.num_parts = num_columns, num_parts
        self._rooms: list[tuple[torch.Tensor, int]] = []  # and by how many each is used while it is free
        self.is_uniform = len(num_seen) == 1
        num_after = [seen + new for seen, new in zip(num_seen, num_new)]
        self.num_before, self.num_after = num_seen, num_after
        self.num_held = min(max(num_after), window.length)
        self.recent_before = slice(window.num_sinks, max(min(max(num_seen), window.length), window.num_sinks))
        self.hands_out_slots = num_columns == 1 or max(num_after) <= window.length
        self.writes_sinks = min(num_seen) < window.num_sinks
        self.can_be_undone = self.hands_out_slots or num_columns <= window.num_recent
        self.is_causal = self.hands_out_slots and (self.is_uniform or num_columns == 1 and min(num_after) >= self.num_held)
        # How far the sinks have to be moved: once for each row, or for each query of the row.
        self.shifts: list[int] | torch.Tensor = [window.shift(seen - start) for seen, start in zip(num_seen, base)]
        self.order = None
        if self.is_uniform and self.hands_out_slots:
            # Contiguous slots: slices will do, and no tensor has to be made.
            start = window.slot(num_seen[0])
            self.tokens = None
            self.rows, self.slots, self.columns = slice(None), slice(start, start + num_columns), slice(None)
        else:
            self._locate()
            if num_parts > 1:
                self.recent_slots = window.slot(self.num_seen + torch.arange(-window.num_recent, 0, device=device))
            if not self.hands_out_slots:
                self.shifts = window.shift(self.tokens - torch.tensor(base, device=device)[:, None])
        if is_ordered:
            self._order(num_after)

    def to(self, device: torch.device) -> "Step":
        """The same, for what is on another device."""
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved.device = device
        vars(moved).update({name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)})
        return moved

    @property
    def kv_length(self) -> int:
        """How many keys and values the pass is handed, in each part."""
        if self.hands_out_slots:
            return self.num_held
        num_copies = self.window.num_sinks * self.part_length
        if self.num_parts > 1:
            return num_copies + self.num_recent_in_part
        return num_copies + self.recent_before.stop - self.recent_before.start + self.num_columns

    @property
    def part_length(self) -> int:
        return self.num_columns // self.num_parts

    @property
    def num_recent_in_part(self) -> int:
        """The tokens that any query of a part sees, but for the sinks: it itself and those before it."""
        return self.window.num_recent + self.part_length - 1

    def joined(self, states: torch.Tensor) -> torch.Tensor:
        """The states of a pass in parts, `[batch * parts, heads, part_length, head_dim]`, as `[batch, heads, num_columns, head_dim]`."""
        return states.unflatten(0, (-1, self.num_parts)).transpose(1, 2).flatten(2, 3)

    def in_parts(self, sinks: torch.Tensor, recent: torch.Tensor) -> torch.Tensor:
        """What the parts are handed: `[batch * parts, heads, kv_length, head_dim]`.

        Args:
            sinks: one copy for each query, `[batch, heads, num_columns, num_sinks, head_dim]`.
            recent: the tokens before the pass and its own, in order, `[batch, heads, num_recent + num_columns, head_dim]`.
        """
        sinks = sinks.unflatten(2, (self.num_parts, -1)).flatten(3, 4)
        recent = recent[:, :, 1:].unfold(2, self.num_recent_in_part, self.part_length).transpose(3, 4)
        batch_size, num_heads, num_parts, num_copies, head_dim = sinks.shape
        room = self._room((batch_size * num_parts, num_heads, self.kv_length, head_dim), sinks)
        parts = room.unflatten(0, (batch_size, num_parts)).transpose(1, 2)
        parts[:, :, :, :num_copies], parts[:, :, :, num_copies:] = sinks, recent
        return room

    def _room(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """For what a layer is handed. On a CPU, memory that is new to the process costs more than the copies into it: so that of a layer
        before is used again, once nobody refers to it or to a view of it any more."""
        if like.device.type != "cpu" or num_users_of_storage is None or is_torchdynamo_compiling():
            return like.new_empty(shape)
        for room, num_users in self._rooms:
            if room.shape == shape and room.dtype == like.dtype and _num_users(room) == num_users:
                return room.view(shape)
        room = like.new_empty(shape)
        self._rooms.append((room, _num_users(room)))
        return room.view(shape)

    def _locate(self) -> None:
        """Where each new token is written, and which of them are still held after the pass."""
        window, num_columns, device = self.window, self.num_columns, self.device
        self.num_seen = torch.tensor(self.num_before, device=device)[:, None]  # [rows, 1]
        num_padding = num_columns - torch.tensor(self._num_new, device=device)[:, None]
        column = torch.arange(num_columns, device=device)
        self.tokens = self.num_seen + column - num_padding  # [rows, columns]
        self.is_padding = column < num_padding
        last = self.num_seen + num_columns - num_padding - 1
        is_held = ~self.is_padding & window.sees(last, self.tokens)
        rows, self.columns = is_held.nonzero(as_tuple=True)
        self.slots = window.slot(self.tokens[rows, self.columns])
        self.rows = slice(None) if self.is_uniform else rows

    def written(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, slot and token of everything that is written, one entry each."""
        if self.tokens is None:
            tokens = torch.arange(self.num_columns, device=self.device) + self.num_before[0]
            slots = torch.arange(self.slots.start, self.slots.stop, device=self.device)
        else:
            slots = self.slots
            tokens = self.tokens[0, self.columns] if self.is_uniform else self.tokens[self.rows, self.columns]
        if not self.is_uniform:
            return self.rows, slots, tokens
        rows = torch.arange(batch_size, device=self.device).repeat_interleave(len(slots))
        return rows, slots.repeat(batch_size), tokens.repeat(batch_size)

    def only_sinks(self) -> tuple:
        """`rows, slots, columns` of those new tokens that are sinks. Not for passes that hand out slots."""
        is_sink = self.slots < self.window.num_sinks
        rows = self.rows if self.is_uniform else self.rows[is_sink]
        return rows, self.slots[is_sink], self.columns[is_sink]

    def _order(self, num_after: list[int]) -> None:
        """The slots in the order of their tokens, the newest last: `[rows, num_held]`, and which of them are in use."""
        window = self.window
        after = torch.tensor(num_after, device=self.device)[:, None]
        column = torch.arange(self.num_held, device=self.device)
        is_full = after > window.length
        token = torch.where(is_full & (column < window.num_sinks), column, after - self.num_held + column)
        self.is_held = token >= 0
        self.order = window.slot(token.clamp(min=0))

    def visible(self) -> torch.Tensor:
        """What each query sees: bool, `[rows, columns, kv_length]`; in parts, `[1, part_length, kv_length]`, as they are all alike."""
        window, device = self.window, self.device
        if self.is_causal and self.num_columns == 1:
            return torch.ones(1, 1, self.num_held, dtype=torch.bool, device=device)
        if self.tokens is None:
            self._locate()
        query = self.tokens[:, :, None]
        if self.hands_out_slots:
            slot = torch.arange(self.num_held, device=device)
            last = self.num_seen + (~self.is_padding).sum(1, keepdim=True)
            token = window.token(slot, last)[:, None]
            # A padding query sees slot 0: what it computes is never used, but must be a number.
            return window.sees(query.clamp(min=0), token)
        own_copy = torch.eye(self.part_length, dtype=torch.bool, device=device).repeat_interleave(window.num_sinks, 1)
        if self.num_parts > 1:
            distance = (
                torch.arange(self.num_recent_in_part, device=device) - torch.arange(self.part_length, device=device)[:, None]
            )
            return torch.cat([own_copy, (distance >= 0) & (distance < window.num_recent)], dim=-1)[None]
        sink = torch.arange(window.num_sinks, device=device).repeat(self.num_columns)
        sinks = own_copy & (sink <= query)
        slot = torch.arange(self.recent_before.start, self.recent_before.stop, device=device)
        held = window.token(slot, self.num_seen)[:, None]
        recent = (held < self.num_seen[:, :, None]) & window.sees(query, held)
        token = self.tokens[:, None, :]
        new = ~self.is_padding[:, None, :] & (token >= window.num_sinks) & window.sees(query, token)
        itself = torch.eye(self.num_columns, dtype=torch.bool, device=device) & self.is_padding[:, :, None]
        return torch.cat([sinks.expand(len(query), -1, -1), recent, new | itself], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The keys and values
# ---------------------------------------------------------------------------------------------------------------------


MIN_SLOTS = 32  # made room for at once
NUM_TURNS_AT_ONCE = 16  # rotations of the sinks that are computed ahead: one step each


class Cursor:
    """Where the next token goes and what it sees, in tensors that stay where they are: one compiled graph serves every token.

    Attributes:
        rows: int64 `[batch]`, the numbers 0, 1, 2, ...
        slots: int64 `[batch, num_sinks + 1]`, the slots that a pass writes: those of the sinks, and that of the token of each row.
        visible: `[batch, 1, 1, window_length]`, what its query sees: bool or, where it is added to the scores, numbers of `dtype`.
    """

    def __init__(self, window: Window, batch_size: int, dtype: torch.dtype, device: torch.device):
        self.window = window
        self.rows = torch.arange(batch_size, device=device)
        self.slots = torch.arange(window.num_sinks + 1, device=device).repeat(batch_size, 1)
        self.visible = torch.zeros(batch_size, 1, 1, window.length, dtype=dtype, device=device)
        self._num_visible, self._has_all_sinks = [0], False
        _keep_in_place(self.rows, self.slots, self.visible)

    def move(self, num_seen: list[int]) -> None:
        """To the token that comes after `num_seen`: of each row, or of all."""
        num_sinks = self.window.num_sinks
        slots = [self.window.slot(seen) for seen in num_seen]
        has_all_sinks = min(num_seen) >= num_sinks
        if not (has_all_sinks and self._has_all_sinks):
            # The token may be a sink itself. No slot is written twice: another one, not yet in use, takes the place of that sink's.
            slots = torch.tensor(slots)[:, None]
            sinks = torch.arange(num_sinks)
            self.slots.copy_(torch.cat([torch.where(sinks == slots, num_sinks, sinks), slots], dim=1))
            self._has_all_sinks = has_all_sinks
        elif len(slots) == 1:
            self.slots[:, -1].fill_(slots[0])
        else:
            self.slots[:, -1].copy_(torch.tensor(slots))
        num_visible = [min(seen + 1, self.window.length) for seen in num_seen]
        if num_visible != self._num_visible:
            slot = torch.arange(self.window.length, device=self.rows.device)
            visible = slot < torch.tensor(num_visible, device=self.rows.device)[:, None, None, None]
            self.visible.copy_(_as_mask(visible, self.visible.dtype))
            self._num_visible = num_visible

    def write(self, held: torch.Tensor, new: torch.Tensor, sinks: torch.Tensor | None) -> None:
        """Put the states of the token, and of sinks that were moved, where they go: at once, so that it is compiled to one write."""
        new = new if sinks is None else torch.cat([sinks, new], dim=2)
        slots = self.slots[:, -new.shape[2] :]
        if len(slots) == 1:
            held.index_copy_(2, slots[0], new)
        else:
            held[self.rows[:, None], :, slots] = new.transpose(1, 2)


def _keep_in_place(*tensors: torch.Tensor) -> None:
    """Tell torch.compile that these are changed in place and never move, so that CUDA graphs can be made of what reads them."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def _as_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is visible, as a mask that says so (bool), or as one that is added to the scores."""
    if dtype == torch.bool:
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


class States:
    """The keys, or the values, of all layers that are alike: `slots`, one `[batch, heads, num_slots, head_dim]` for each layer.

    What is written stays as it is. Only sinks move, where the model rotates these states: they are kept as they came, and before a pass
    those in the slots are turned to where its query needs them, for all layers in one go. One rotation, one rounding, `num_sinks` a
    step.
    """

    def __init__(self, window: Window, shape: tuple[int, ...], rotation: Rotation, dtype: torch.dtype, device: torch.device):
        num_layers, batch_size, num_heads, head_dim = shape
        self.window = window
        self.rotation = rotation
        self.cursor: Cursor | None = None
        self.slots = [torch.zeros(batch_size, num_heads, 0, head_dim, dtype=dtype, device=device) for _ in range(num_layers)]
        self._moves_sinks = window.num_sinks > 0 and not rotation.is_identity
        self._look_at_sinks()
        if self._moves_sinks:
            none_yet = self.slots[0].new_zeros(num_layers, batch_size, num_heads, window.num_sinks, head_dim)
            self._sinks = torch.stack(rotation.with_partners(none_yet))
            self._set_turns(0)
        self.clear()

    def follow(self, cursor: Cursor) -> None:
        """From now on in static mode."""
        self.cursor = cursor
        self._reserve(self.window.length)
        _keep_in_place(*self.slots)
        if self._moves_sinks:
            self._turn = self._turn_by(torch.zeros_like(cursor.rows)[:, None])
            _keep_in_place(self._sinks, self._turn)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return _tensors_in(*vars(self).values())

    @property
    def num_bytes_on_host(self) -> int:
        """Bytes that are offloaded."""
        return 0

    @property
    def num_intact(self) -> int:
        """A text of so many tokens has lost nothing that is needed if the last ones are taken back."""
        return self.window.length

    def can_undo(self, step: Step) -> bool:
        """Whether the tokens of a recorded pass can be taken back, some or all."""
        return step.can_be_undone

    def begin(self, step: Step, is_recording: bool, at_cursor: bool) -> None:
        """Before a pass: make room, and bring the sinks to where its queries need them, or say where (at the cursor)."""
        if self.step is not None:
            self._give_up()
        self.step, self._copies_turn, self._num_logged = step, None, len(self.log)
        self._reserve(step.num_held)
        if is_recording:
            rows, slots, tokens = step.written(len(self.slots[0]))
            self.log.append((rows, slots, tokens, [held[rows, :, slots] for held in self.slots]))
        if not self._moves_sinks:
            return
        if self._sinks_are_new:
            self._keep_sinks()
        self._sinks_are_new = step.writes_sinks
        if at_cursor:
            self._turn.copy_(self._sink_turn(step.shifts))
            self._sinks_are_at = step.shifts
        elif step.hands_out_slots:
            self._move_sinks(step.shifts)
        else:
            self._move_sinks([0])
            self._copies_turn = self._turn_by(step.shifts[:, None])  # [2, rows, 1, columns, num_sinks, head_dim]

    def update(self, index: int, new: torch.Tensor) -> torch.Tensor:
        """Write the new states of one layer, `[batch, heads, num_columns, head_dim]`, and hand out `[batch, heads, kv_length, head_dim]`."""
        step, held = self.step, self.slots[index]
        if step.hands_out_slots:
            if step.tokens is None:
                held.narrow(2, step.slots.start, step.num_columns).copy_(new)
            else:
                held[step.rows, :, step.slots] = new[step.rows, :, step.columns]
            if step.order is not None:
                return _take_slots(held, step.order)
            return held if step.num_held == held.shape[2] else held.narrow(2, 0, step.num_held)
        if step.writes_sinks:
            rows, slots, columns = step.only_sinks()
            held[rows, :, slots] = new[rows, :, columns]
        sinks = held[:, :, None, : self.window.num_sinks]
        if self._moves_sinks:
            sinks = turned(self.rotation.with_partners(sinks), self._copies_turn).to(held.dtype)
        sinks = sinks.expand(-1, -1, step.num_columns, -1, -1)
        if step.num_parts > 1:
            handed_out = step.in_parts(sinks, torch.cat([_take_slots(held, step.recent_slots), new], dim=2))
        else:
            handed_out = torch.cat([sinks.flatten(2, 3), held[:, :, step.recent_before], new], dim=2)
        held[step.rows, :, step.slots] = new[step.rows, :, step.columns]
        return handed_out

    def _give_up(self) -> None:
        """A pass was begun, and has not ended: what was recorded of it is put back."""
        self.log, given_up = self.log[: self._num_logged], self.log[self._num_logged :]
        self._put_back(given_up, [0])

    def end(self) -> None:
        """After a pass: let go of what only that needed."""
        self.step = self._copies_turn = None

    def update_at_cursor(self, index: int, new: torch.Tensor) -> torch.Tensor:
        """As `update`, in a compiled pass over one token: all slots are handed out, also those not yet used."""
        held = self.slots[index]
        sinks = turned(self._sinks[:, index], self._turn).to(held.dtype) if self._moves_sinks else None
        self.cursor.write(held, new, sinks)
        return held

    def clear(self) -> None:
        """As before the first token. What is in the slots stays there, and no query sees it."""
        self.step: Step | None = None  # the pass that was begun
        self.log: list[tuple] = []  # what passes have overwritten, while that is recorded
        self._sinks_are_new = False  # a pass has written some since they were kept
        self._sinks_are_at = [0]  # by how much the sinks in the slots are moved: one number for each row, or one for all

    def state(self) -> tuple[list[dict[str, torch.Tensor]], dict]:
        """What a cache that goes on elsewhere has to know: tensors of each layer, and numbers. All else is made again of these, in the
        same steps, so that it comes out with the same bits. What was recorded for a roll-back stays here."""
        tensors = [{"slots": held, "rotation": self.rotation.as_tensor()} for held in self._intact()]
        numbers = {"sinks_are_new": self._sinks_are_new, "sinks_are_at": self._sinks_are_at, "first_turn": 0}
        if self._moves_sinks:
            tensors = [each | {"sinks": sinks.clone()} for each, sinks in zip(tensors, self._sinks[0])]
            numbers["first_turn"] = self._first_turn
        return tensors, numbers

    def restore(self, saved: "Saved", layers: list[str], batch_size: int, min_slots: int) -> None:
        """The opposite of `state`, in new states that have no rows yet: no more rows or slots than are really in the file.

        Args:
            layers: the names that they have there.
            min_slots: of each layer.
        """
        for layer in layers:
            if saved.number("states", layer) != saved.number("states", layers[0]):
                raise saved.refusal(f"{layer} is like {layers[0]} here, and not in the file")
        new, at, turn = (saved.number("states", layers[0], name) for name in ("sinks_are_new", "sinks_are_at", "first_turn"))
        if not isinstance(new, bool) or not _are_counts(at, batch_size) or not _are_counts([turn], 1):
            raise saved.refusal(f"the sinks of {layers[0]} can't be moved by {at!r:.50} or {turn!r:.50}")
        num_slots, num_sinks = saved.num_slots(layers[0], "slots"), self.window.num_sinks
        if not max(num_sinks, min_slots) <= num_slots <= self.num_intact:
            raise saved.refusal(
                f"{layers[0]}.slots has room for {num_slots} tokens, and {self.num_intact} of a window of {self.window.length} stay as they came"
            )
        device, dtype = self.slots[0].device, self.slots[0].dtype
        _, num_heads, _, head_dim = self.slots[0].shape
        here = self.rotation.as_tensor().cpu()
        for layer, there in zip(layers, saved.take_all(layers, "rotation", (2, head_dim), torch.float32)):
            if not torch.allclose(here, there, rtol=1e-4, atol=0):  # another machine may round frequencies differently
                index = int((here - there).abs().amax(0).argmax())
                raise saved.refusal(
                    f"{layer}.rotation turns dimension {index} with {there[1, index]:.0f} by {there[0, index]:.6g} a position in the file, "
                    f"and with {here[1, index]:.0f} by {here[0, index]:.6g} in this model"
                )
        self._put(saved.take_all(layers, "slots", (batch_size, num_heads, num_slots, head_dim), dtype))
        self._look_at_sinks()
        self._sinks_are_new, self._sinks_are_at = new, at
        if self._moves_sinks:
            sinks = saved.take_all(layers, "sinks", (batch_size, num_heads, num_sinks, head_dim), torch.float32)
            self._sinks = torch.stack(self.rotation.with_partners(torch.stack(sinks).to(device)))
            self._set_turns(turn)

    def _intact(self) -> list[torch.Tensor]:
        """What is kept as it came, of each layer: `[batch, heads, at most num_intact, head_dim]`."""
        return self.slots

    def _put(self, intact: list[torch.Tensor]) -> None:
        """Take it back, from the memory of the host."""
        self.slots = [held.to(self.slots[0].device, copy=True) for held in intact]

    def move_back(self, num_positions: list[int]) -> None:
        """Turn what is held of each row back by so many positions, but for the sinks: those follow when a pass begins."""
        if self.rotation.is_identity:
            return
        angles = self._angles_back(num_positions)
        for held in self.slots:
            recent = held[:, :, self.window.num_sinks :]
            recent.copy_(self.rotation.turn(recent, angles))
        for rows, _, _, overwritten in self.log:
            for old in overwritten:
                old.copy_(self.rotation.turn(old, angles[0] if len(angles) == 1 else angles[rows, 0]))

    def _angles_back(self, num_positions: list[int]) -> torch.Tensor:
        """What turns the states of each row back by so many positions: `[rows, 1, 1, head_dim]`."""
        start = torch.tensor(num_positions, device=self.slots[0].device)[:, None, None]
        return self.rotation.angles(start, torch.zeros_like(start))

    def undo(self, num_tokens: list[int]) -> None:
        """Put back what the passes in the log have overwritten, for all tokens of each row from `num_tokens` on."""
        self._put_back(self.log, num_tokens)

    def _put_back(self, log: list[tuple], num_tokens: list[int]) -> None:
        for rows, slots, undone, overwritten in _undone(log, num_tokens):
            for held, old in zip(self.slots, overwritten):
                held[rows, :, slots] = old[undone]

    def select_rows(self, index: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        index = index.to(self.slots[0].device)
        self.slots = [_selected(held, 0, index) for held in self.slots]
        self._look_at_sinks()
        if self._moves_sinks:
            self._sinks = _selected(self._sinks, 2, index)
        if len(self._sinks_are_at) > 1:
            self._sinks_are_at = [self._sinks_are_at[row] for row in index.tolist()]

    def _reserve(self, num_slots: int) -> None:
        """Make room, at least doubling it each time, so that a short text does not pay for the whole window."""
        batch_size, num_heads, capacity, head_dim = self.slots[0].shape
        if num_slots > capacity:
            wider = min(self.window.length, max(num_slots, 2 * capacity, MIN_SLOTS, self.window.num_sinks))
            for index, held in enumerate(self.slots):
                self.slots[index] = held.new_zeros(batch_size, num_heads, wider, head_dim)  # not left as it comes: 0 * NaN is NaN
                self.slots[index][:, :, :capacity] = held
            self._look_at_sinks()

    def _look_at_sinks(self) -> None:
        self._sink_slots = [held[:, :, : self.window.num_sinks] for held in self.slots]

    def _keep_sinks(self) -> None:
        """Those that are in the slots as they came: `[2, layers, batch, heads, num_sinks, head_dim]`, with their partners."""
        sinks = torch.stack(self._sink_slots)
        if any(self._sinks_are_at):
            is_moved = torch.tensor(self._sinks_are_at, device=sinks.device).bool()
            sinks = torch.where(is_moved[:, None, None, None], self._sinks[0], sinks)
        self._sinks.copy_(torch.stack(self.rotation.with_partners(sinks)))

    def _move_sinks(self, shifts: list[int]) -> None:
        """Bring the sinks in the slots to `shifts` positions from where they came."""
        if shifts != self._sinks_are_at or self.cursor is not None:
            sinks = turned(self._sinks, self._sink_turn(shifts)).to(self.slots[0].dtype)
            torch._foreach_copy_(self._sink_slots, sinks.unbind())
            self._sinks_are_at = shifts

    def _sink_turn(self, shifts: list[int]) -> torch.Tensor:
        """What turns the sinks for a pass over one token, `[2, rows, 1, num_sinks, head_dim]`; for the next ones in one go with it."""
        if len(shifts) > 1:
            return self._turn_by(torch.tensor(shifts)[:, None])
        if not 0 <= shifts[0] - self._first_turn < NUM_TURNS_AT_ONCE:
            self._set_turns(shifts[0])
        return self._turns[:, shifts[0] - self._first_turn]

    def _set_turns(self, first: int) -> None:
        self._first_turn, self._turns = first, self._turn_by(torch.arange(first, first + NUM_TURNS_AT_ONCE)[:, None, None])

    def _turn_by(self, shift: torch.Tensor) -> torch.Tensor:
        """Cosines and sines that move the sinks by `shift` positions: `[...]` -> `[2, ..., num_sinks, head_dim]`."""
        position = torch.arange(self.window.num_sinks, device=self.slots[0].device)
        angles = self.rotation.angles(position, position + shift.to(position.device)[..., None])
        return torch.stack([angles.cos(), angles.sin()])


class StoredStates(States):
    """States that are kept elsewhere than where attention reads them: of each layer, `slots` are those of the sinks and no more.

    For its pass a layer gets slots that are let go afterwards. `_fetch` makes of what is kept what they held before the pass, and
    `_store` keeps what the pass brought. All else, what a pass sees and how sinks move, is as for states that stay in their slots.

    Attributes:
        kept: the names of all tensors that hold what was seen, beside those of the sinks.
        turned: the name of the one that holds states as they came, `[layers, batch, heads, ...]`: turned back when positions are lowered.
    """

    kept: tuple[str, ...]
    turned: str

    def __init__(self, window: Window, shape: tuple[int, ...], rotation: Rotation, dtype: torch.dtype, device: torch.device):
        super().__init__(window, shape, rotation, dtype, device)
        self.slots = [held.new_zeros(*held.shape[:2], window.num_sinks, held.shape[3]) for held in self.slots]
        self._look_at_sinks()

    def update(self, index: int, new: torch.Tensor) -> torch.Tensor:
        sinks = self.slots[index]
        try:
            self.slots[index] = torch.cat([sinks, self._fetch(index)], dim=2)
            handed_out = super().update(index, new)
            if self.step.writes_sinks:
                sinks.copy_(self.slots[index][:, :, : self.window.num_sinks])
        finally:
            self.slots[index] = sinks
        self._store(index, new)
        return handed_out

    def _fetch(self, index: int) -> torch.Tensor:
        """What the slots behind the sinks hold before the pass, all that it needs: `[batch, heads, num_slots, head_dim]`."""
        raise NotImplementedError

    def _store(self, index: int, new: torch.Tensor) -> None:
        """Keep the new states of one layer, `[batch, heads, num_columns, head_dim]`, but for those of sinks."""
        raise NotImplementedError

    def _intact(self) -> list[torch.Tensor]:
        turned = getattr(self, self.turned)
        return [torch.cat([sinks.to(recent.device), recent], dim=2) for sinks, recent in zip(self.slots, turned)]

    def _put(self, intact: list[torch.Tensor]) -> None:
        num_sinks = self.window.num_sinks
        super()._put([held[:, :, :num_sinks] for held in intact])
        recent = torch.stack([held[:, :, num_sinks:] for held in intact])
        setattr(self, self.turned, recent.to(getattr(self, self.turned).device))

    def _reserve(self, num_slots: int) -> None:
        """Sinks have their room from the start."""

    def _remember(self, rows: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor, *names: str) -> None:
        """Log what a pass will overwrite in tensors `[layers, batch, heads, slots, ...]`, to be put back if these tokens are undone."""
        self.log.append((rows, slots, tokens, {name: getattr(self, name)[:, rows, :, slots] for name in names}))

    def _put_back(self, log: list[tuple], num_tokens: list[int]) -> None:
        for rows, slots, undone, overwritten in _undone(log, num_tokens):
            for name, old in overwritten.items():
                getattr(self, name)[:, rows, :, slots] = old[undone]

    def move_back(self, num_positions: list[int]) -> None:
        if self.rotation.is_identity:
            return
        device, angles = self.slots[0].device, self._angles_back(num_positions)
        for held in getattr(self, self.turned):
            held.copy_(self.rotation.turn(held.to(device), angles))
        for rows, _, _, overwritten in self.log:
            old = overwritten.get(self.turned)
            if old is not None:  # [entries, layers, heads, head_dim]
                old.copy_(self.rotation.turn(old.to(device), angles if len(angles) == 1 else angles[rows]))


class QuantizedStates(StoredStates):
    """States of which only the most recent are kept as they came, and older ones quantized, in blocks of `q_group_size` tokens.

    A block is quantized once, by the pass after which `residual_length` tokens have come since its last one, and with the positions that
    its keys have then. If positions are lowered later, it is turned when it is read. So a pass sees the tokens that it brings, and at
    least the `residual_length` before them, as they came.

    Number the tokens behind the sinks 0, 1, 2, ...: token t is in slot t mod `num_whole` of the whole ones, or in block
    t // `q_group_size`, which is in slot block mod `num_blocks`. Together there is room for less than two blocks more than the window.

    Attributes:
        whole: `[layers, batch, heads, num_whole, head_dim]`.
        codes, scales, offsets: `[layers, batch, heads, num_blocks, ...]`, as `Quantization.quantize` makes them.
        moved: int64 `[batch]`, by how much the positions of each row have been lowered so far.
        moved_at: int64 `[1, batch, 1, num_blocks]`, by how much they had been when each block was quantized.
    """

    blocks = ("codes", "scales", "offsets")  # what is kept of them, layer by layer
    kept = ("whole", *blocks, "moved_at", "moved")
    turned = "whole"

    def __init__(self, *arguments, quantization: "Quantization", by_channel: bool):
        super().__init__(*arguments)
        self.quantization, self.by_channel = quantization, by_channel
        self.block_length, self.residual_length = quantization.q_group_size, quantization.residual_length
        self.num_whole = self.residual_length + self.block_length
        self.num_blocks = -(-(self.window.num_recent - self.residual_length) // self.block_length)
        sinks = self.slots[0]
        batch_size, num_heads, _, head_dim = sinks.shape
        shape = len(self.slots), batch_size, num_heads
        self.whole = sinks.new_zeros(*shape, self.num_whole, head_dim)
        self.codes = sinks.new_zeros(*shape, 0, head_dim, quantization.num_bytes, dtype=torch.uint8)
        self.scales = sinks.new_zeros(*shape, 0, head_dim, 1)
        self.offsets = sinks.new_zeros(*shape, 0, head_dim, quantization.has_offsets)
        self.moved = torch.zeros(batch_size, dtype=torch.long, device=sinks.device)
        self.moved_at = self.moved[None, :, None, None][..., :0]
        self._turns_until = -1  # as long as a row has not seen more tokens, there may be blocks to be turned

    @property
    def num_intact(self) -> int:
        return self.window.num_sinks + self.num_whole

    def can_undo(self, step: Step) -> bool:
        """Not if tokens that the pass brought have gone from the whole ones, and might have to be there again."""
        is_short = step.num_columns <= self.num_whole or max(step.num_after) <= self.num_intact
        return super().can_undo(step) and is_short

    def state(self) -> tuple[list[dict[str, torch.Tensor]], dict]:
        tensors, numbers = super().state()
        moved_at = (self.moved_at - self.moved[:, None, None])[0, :, 0]  # only differences count
        for index, each in enumerate(tensors):
            each |= {name: getattr(self, name)[index].clone() for name in self.blocks} | {"moved_at": moved_at.clone()}
        return tensors, numbers

    def restore(self, saved: "Saved", layers: list[str], batch_size: int, min_slots: int) -> None:
        super().restore(saved, layers, batch_size, self.num_intact)
        num_blocks = saved.num_slots(layers[0], "codes")
        if num_blocks > self.num_blocks:
            raise saved.refusal(f"{layers[0]}.codes has room for {num_blocks} blocks, and the window has {self.num_blocks}")
        for name in self.blocks:
            empty = getattr(self, name)
            of_layers = saved.take_all(layers, name, (batch_size, empty.shape[2], num_blocks, *empty.shape[4:]), empty.dtype)
            setattr(self, name, torch.stack(of_layers).to(empty.device))
        moved_at = saved.take_all(layers, "moved_at", (batch_size, num_blocks), torch.long)[0]
        self.moved = self.moved.new_zeros(batch_size)
        self.moved_at = moved_at[None, :, None].to(self.moved.device, copy=True)
        self._turns_until = float("inf") if bool(moved_at.any()) else -1

    def begin(self, step: Step, is_recording: bool, at_cursor: bool) -> None:
        super().begin(step, False, at_cursor)
        self._make_room(min(self._num_quantized(max(step.num_after)), self.num_blocks))
        self._locate(step)
        if is_recording:
            self._remember(*self._new_whole[:3], "whole")
            self._remember(*self._new_blocks[:3], *self.blocks, "moved_at")
        self._angles = None
        self._turns_until = min(self._turns_until, max(step.num_before) + self.window.length)
        if min(step.num_before) <= self._turns_until:
            back = self.moved[:, None, None] - self.moved_at[0]
            self._angles = self.rotation.angles(back, torch.zeros_like(back))[..., None, :]  # [batch, 1, num_blocks, 1, head_dim]

    def _num_quantized(self, num_seen: int) -> int:
        """Blocks that are quantized of a text of so many tokens, held or evicted."""
        return max(0, num_seen - self.window.num_sinks - self.residual_length) // self.block_length

    def _make_room(self, num_blocks: int) -> None:
        """At least doubling it each time."""
        capacity = self.codes.shape[3]
        if num_blocks > capacity:
            num_more = min(max(num_blocks, 2 * capacity), self.num_blocks) - capacity
            for name in (*self.blocks, "moved_at"):
                kept = getattr(self, name)
                setattr(self, name, torch.cat([kept, kept.new_zeros(*kept.shape[:3], num_more, *kept.shape[4:])], dim=3))

    def _locate(self, step: Step) -> None:
        """Where the slots of a pass come from, which of the new tokens stay whole, and which blocks are quantized of what."""
        num_sinks, length, device = self.window.num_sinks, self.block_length, self.whole.device
        num_seen = torch.tensor(step.num_before, device=device)[:, None]
        token = self.window.token(torch.arange(num_sinks, max(step.num_held, num_sinks), device=device), num_seen) - num_sinks
        first_whole = (num_seen - num_sinks - self.residual_length).clamp(min=0) // length * length
        in_block = token // length % self.num_blocks * length + token % length
        in_whole = self.codes.shape[3] * length + token % self.num_whole
        # [rows, slots], of all blocks and then the whole ones
        self._sources = torch.where(token < first_whole, in_block, in_whole)

        whole, blocks = [], []
        rows = list(zip(step.num_before, step.num_after)) * (len(self.slots[0]) // len(step.num_before))
        for row, (before, after) in enumerate(rows):
            first_block, end_block = self._num_quantized(before), self._num_quantized(after)
            before, after = before - num_sinks, after - num_sinks
            column = step.num_columns - after  # of token 0
            for token in range(max(before, after - self.num_whole, 0), after):
                whole.append([row, token % self.num_whole, token + num_sinks, token + column])
            for block in range(max(first_block, end_block - self.num_blocks), end_block):
                tokens = range(block * length, (block + 1) * length)
                places = [token % self.num_whole if token < before else self.num_whole + token + column for token in tokens]
                blocks.append([row, block % self.num_blocks, tokens.stop - 1 + self.residual_length + num_sinks, *places])
        # One line each: rows, slots and the tokens with which they are written. Then the columns they come from, or where the states of
        # a block are: among the whole ones and then the columns.
        self._new_whole = torch.tensor(whole, dtype=torch.long).view(-1, 4).T.to(device)
        self._new_blocks = torch.tensor(blocks, dtype=torch.long).view(-1, 3 + length).T.to(device)

    def _fetch(self, index: int) -> torch.Tensor:
        blocks = self.quantization.dequantize(self.codes[index], self.scales[index], self.offsets[index], self.by_channel)
        if self._angles is not None:
            blocks = self.rotation.turn(blocks, self._angles)
        return _take_slots(torch.cat([blocks.flatten(2, 3), self.whole[index]], dim=2), self._sources)

    def _store(self, index: int, new: torch.Tensor) -> None:
        rows, slots, places = self._new_blocks[0], self._new_blocks[1], self._new_blocks[3:]
        if len(rows):
            states = torch.cat([self.whole[index], new], dim=2)[rows[:, None], :, places.T].transpose(1, 2)
            parts = self.quantization.quantize(states, self.by_channel)
            for kept, part in zip((self.codes, self.scales, self.offsets), parts):
                kept[index][rows, :, slots] = part
        rows, slots, _, columns = self._new_whole
        self.whole[index][rows, :, slots] = new[rows, :, columns]

    def end(self) -> None:
        super().end()
        rows, slots = self._new_blocks[:2]
        self.moved_at[:, rows, :, slots] = self.moved[rows, None, None]
        self._sources = self._new_whole = self._new_blocks = self._angles = None

    def move_back(self, num_positions: list[int]) -> None:
        super().move_back(num_positions)
        if not self.rotation.is_identity:
            self.moved += torch.tensor(num_positions, device=self.moved.device)
            self._turns_until = float("inf")  # made a number when the pass begins

    def select_rows(self, index: torch.Tensor) -> None:
        super().select_rows(index)
        for name in self.kept:
            rows_dim = 0 if name == "moved" else 1
            setattr(self, name, _selected(getattr(self, name), rows_dim, index.to(self.moved.device)))


class OffloadedStates(StoredStates):
    """States that are kept in the memory of the host: all but the sinks, `[layers, num_slots, batch, heads, head_dim]`.

    When a layer is through with what was copied for it, the copy is let go; and while it works, what the next one needs is copied on a
    stream of its own. Of what a pass brought, only that is copied back. As in transformers' offloaded caches each stream waits for what
    the other has begun: copies to the device for those back, and the layer for its copy.

    On a CPU, all this happens in one memory, with the same copies. (That is how it was tested: the stream was not.)
    """

    kept = ("host",)
    turned = "recent"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.host = self._room(0, len(self.slots[0]))
        self._ahead: dict[int, torch.Tensor] = {}  # layers that have been copied to the device and not yet been read

    @property
    def recent(self) -> torch.Tensor:
        """As `[layers, batch, heads, num_slots, head_dim]`."""
        return self.host.permute(0, 2, 3, 1, 4)

    @recent.setter
    def recent(self, states: torch.Tensor) -> None:
        self.host = self._room(states.shape[3], states.shape[1])
        self.recent.copy_(states)

    @property
    def num_bytes_on_host(self) -> int:
        return self.host.nbytes

    def begin(self, step: Step, is_recording: bool, at_cursor: bool) -> None:
        super().begin(step, False, at_cursor)
        num_sinks = self.window.num_sinks
        self._num_slots = max(step.num_held - num_sinks, 0)
        self._make_room(self._num_slots)
        if is_recording:
            rows, slots, tokens = (x.cpu() for x in step.written(len(self.slots[0])))
            is_recent = slots >= num_sinks
            self._finish_copies()
            self._remember(rows[is_recent], slots[is_recent] - num_sinks, tokens[is_recent], "recent")
        if isinstance(step.slots, slice):
            start, stop = (max(slot, num_sinks) for slot in (step.slots.start, step.slots.stop))
            self._new = slice(None), slice(start - num_sinks, stop - num_sinks), slice(step.num_columns - (stop - start), None)
        else:
            is_recent = step.slots >= num_sinks
            rows = step.rows if step.is_uniform else step.rows[is_recent].cpu()
            self._new = rows, (step.slots[is_recent] - num_sinks).cpu(), step.columns[is_recent].cpu()
        self._ahead.clear()
        self._fetch_ahead(0)

    def _room(self, num_slots: int, batch_size: int) -> torch.Tensor:
        """Pinned where another device reads it: only from there can it be copied while that computes."""
        sinks = self.slots[0]
        shape = len(self.slots), num_slots, batch_size, sinks.shape[1], sinks.shape[3]
        return torch.zeros(shape, dtype=sinks.dtype, device="cpu", pin_memory=sinks.device.type == "cuda")

    def _make_room(self, num_slots: int) -> None:
        """As `States._reserve`."""
        capacity = self.host.shape[1]
        if num_slots > capacity:
            self._finish_copies()
            wider = self._room(min(self.window.num_recent, max(num_slots, 2 * capacity, MIN_SLOTS)), self.host.shape[2])
            wider[:, :capacity] = self.host
            self.host = wider

    def _fetch_ahead(self, index: int) -> None:
        """Begin to copy what a layer needs to the device."""
        if index < len(self.slots):
            with _while_computing(self.slots[0].device):
                self._ahead[index] = self.host[index, : self._num_slots].to(self.slots[0].device, non_blocking=True, copy=True)

    def _fetch(self, index: int) -> torch.Tensor:
        if index not in self._ahead:
            self._fetch_ahead(index)
        _wait_for_copies(self.slots[0].device)
        states = self._ahead.pop(index)
        self._fetch_ahead(index + 1)
        return states.permute(1, 2, 0, 3)

    def _store(self, index: int, new: torch.Tensor) -> None:
        rows, slots, columns = self._new
        if isinstance(slots, slice):
            self.host[index, slots].copy_(new[:, :, columns].permute(2, 0, 1, 3), non_blocking=True)
        else:
            self.recent[index][rows, :, slots] = new[rows, :, columns].cpu()

    def end(self) -> None:
        super().end()
        self._new = None

    def state(self) -> tuple[list[dict[str, torch.Tensor]], dict]:
        self._finish_copies()
        return super().state()

    def _put_back(self, log: list[tuple], num_tokens: list[int]) -> None:
        self._finish_copies()
        super()._put_back(log, num_tokens)

    def move_back(self, num_positions: list[int]) -> None:
        self._finish_copies()
        super().move_back(num_positions)

    def select_rows(self, index: torch.Tensor) -> None:
        super().select_rows(index)
        self._finish_copies()
        self.recent = self.recent.index_select(1, index.cpu())

    def _finish_copies(self) -> None:
        """Before the host itself reads or changes what it keeps."""
        if self.slots[0].device.type == "cuda":
            torch.cuda.synchronize(self.slots[0].device)

    def __getstate__(self) -> dict:
        self._finish_copies()
        return vars(self) | {"_ahead": {}}


@functools.cache
def _copy_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _while_computing(device: torch.device):
    """Copies begun in here wait for all that was begun before, and what is computed then does not wait for them."""
    if device.type != "cuda":
        yield
        return
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def _wait_for_copies(device: torch.device) -> None:
    """What is computed from now on waits for the copies begun so far."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_copy_stream(device))


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

    The states of a block of tokens, `[heads, q_group_size, head_dim]`, are quantized in groups of `q_group_size` numbers of a head: each
    channel over the tokens of the block (https://arxiv.org/abs/2402.02750), or else the numbers of one token, and of the next if
    `head_dim` is smaller. No other block, row or layer has a part in it. Number = code * scale + offset.

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
        backend = self.backend.lower() if isinstance(self.backend, str) else self.backend  # "HQQ" before transformers 4.56
        if backend not in [*BACKENDS]:  # a list: no hash is asked for
            raise ValueError(f"backend={self.backend!r} does not quantize caches. Use one of {', '.join(BACKENDS)}.")
        allowed_bits, axes, module, _ = BACKENDS[backend]
        for name, allowed in (("nbits", allowed_bits), ("axis_key", axes), ("axis_value", axes)):
            value = getattr(self, name)
            if value is None and allowed:
                object.__setattr__(self, name, 4 if name == "nbits" else 0)
            elif value is not None and (type(value) is not int or value not in allowed):
                choice = f"Use one of {', '.join(map(str, allowed))}" if allowed else "Leave it out"
                raise ValueError(f"{name}={value!r} can't be used with backend={backend!r}. {choice}.")
        for name, step in (("q_group_size", 8), ("residual_length", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value % step or value < (name == "q_group_size"):
                kind = "a positive multiple of 8" if step > 1 else "an int of at least 0"
                raise ValueError(f"{name} must be {kind}, got {value!r}.")
        object.__setattr__(self, "backend", backend)
        if module is not None:
            _backend_module(backend)

    @classmethod
    def of(cls, cache_config) -> "Quantization":
        """From a dict, or from the `QuantizedCacheConfig` of transformers before 4.56."""
        options = cache_config if isinstance(cache_config, dict) else getattr(cache_config, "__dict__", None)
        if options is None:
            raise ValueError(
                f"cache_config (quantized= of a SinkCache) must be a dict, got {cache_config!r} ({type(cache_config).__name__})."
            )
        names = [option.name for option in fields(cls)]
        unknown = [name for name in options if name not in (*names, "compute_dtype", "device", "cache_implementation")]
        if unknown:
            raise ValueError(f"cache_config has no option {unknown[0]}. It takes {', '.join(names)}.")
        return cls(**{name: options[name] for name in names if options.get(name) is not None})

    @property
    def min_recent(self) -> int:
        """Tokens behind the sinks from which on there is something to quantize."""
        return self.residual_length + self.q_group_size

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

    def by_channel(self, axis: int | None) -> bool:
        return axis is not None and BACKENDS[self.backend][1][axis]

    def quantize(self, states: torch.Tensor, by_channel: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Blocks `[blocks, heads, q_group_size, head_dim]` -> codes uint8 `[blocks, heads, head_dim, num_bytes]`, and scales and offsets
        `[blocks, heads, head_dim, 1]` (or 0, without offsets): one of each for each of the `head_dim` groups."""
        groups = states.transpose(2, 3) if by_channel else states.flatten(2).unflatten(2, (states.shape[3], states.shape[2]))
        if self.backend == "fp8":
            scales = (groups.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=torch.finfo(groups.dtype).tiny)
            return (groups / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales, scales[..., :0]
        codes, scales, offsets = (_quantize_with_quanto if self.backend == "quanto" else _quantize_with_hqq)(groups, self.nbits)
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


def _quantize_with_quanto(groups: torch.Tensor, nbits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (uint8), scales and offsets of the groups `[..., q_group_size]`."""
    quanto = _backend_module("quanto")
    flat, qtype = groups.flatten(0, -2), quanto.qint4 if nbits == 4 else quanto.qint2
    scales, shifts = quanto.MaxOptimizer()(flat, qtype, 0, flat.shape[1])
    codes = torch.ops.quanto.quantize_affine(flat, nbits, 0, flat.shape[1], scales, shifts)
    return tuple(part.unflatten(0, groups.shape[:-1]) for part in (codes, scales, -shifts))


def _quantize_with_hqq(groups: torch.Tensor, nbits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, block by block: hqq looks at all groups that it is given when it decides how long to search."""
    quantizer, dtype = _backend_module("hqq").Quantizer, groups.dtype
    options = {"group_size": groups.shape[-1], "axis": 1, "bitpack": False, "compute_dtype": dtype, "device": str(groups.device)}
    blocks = []
    for block in groups:
        codes, meta = quantizer.quantize(block.flatten(0, -2), nbits, **options)
        parts = codes.to(torch.uint8), meta["scale"].to(dtype), (-meta["zero"] * meta["scale"]).to(dtype)
        blocks.append([part.unflatten(0, block.shape[:-1]) for part in parts])
    return tuple(torch.stack(parts) for parts in zip(*blocks))


def _backend_module(backend: str):
    module, package = BACKENDS[backend][2:]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"backend={backend!r} quantizes by means of {package}: pip install {package}") from error


class LayerGroup:
    """The states of all layers that are alike: same window, rotations, shapes, dtype and device."""

    def __init__(
        self, window: Window, traits: LayerTraits, layers: list[int], quantization: Quantization | None, is_offloaded: bool
    ):
        self.window, self.traits, self.layers = window, traits, layers
        self.quantization, self.is_offloaded = quantization, is_offloaded
        self.states: tuple[States, ...] = ()
        self.cursor: Cursor | None = None  # in static mode
        self.record_past = False

    def allocate(self, batch_size: int, mask_dtype: torch.dtype, is_static: bool, saved: "Saved | None" = None) -> None:
        """Make room for so many rows, or take them from a file; in static mode, in the place that was made for as many before."""
        if is_static and self.cursor is not None and len(self.cursor.rows) == batch_size:
            return
        traits = self.traits
        num_rows = batch_size if saved is None else 0  # a file gets no room for rows that it only speaks of
        self.states = tuple(
            new_states(self.window, (len(self.layers), num_rows, *shape), rotation, traits.dtype, traits.device)
            for new_states, shape, rotation in zip(self._kinds(), traits.shapes, traits.rotations)
        )
        for kind, states in zip(KINDS, self.states if saved is not None else ()):
            layers = [f"layers.{index}.{kind}" for index in self.layers]
            states.restore(saved, layers, batch_size, self.window.length if is_static else 1)
        if is_static:
            self.set_cursor(batch_size, mask_dtype)

    def _kinds(self) -> list[Callable[..., States]]:
        """What makes the keys, and the values."""
        if self.is_offloaded:
            return [OffloadedStates] * 2
        quantization = self.quantization
        if quantization is None or self.window.num_recent < quantization.min_recent:
            return [States] * 2
        axes = quantization.axis_key, quantization.axis_value
        by_channel = [quantization.by_channel(axis) for axis in axes]
        return [functools.partial(QuantizedStates, quantization=quantization, by_channel=each) for each in by_channel]

    def set_cursor(self, batch_size: int, mask_dtype: torch.dtype) -> None:
        self.cursor = Cursor(self.window, batch_size, mask_dtype, self.traits.device)
        for states in self.states:
            states.follow(self.cursor)

    @property
    def num_intact(self) -> int:
        return min(states.num_intact for states in self.states)

    def select_rows(self, index: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        for states in self.states:
            states.select_rows(index)
        if self.cursor is not None and len(self.cursor.rows) != len(index):
            self.set_cursor(len(index), self.cursor.visible.dtype)

    def clear(self) -> None:
        """As before the first token."""
        self.record_past = False
        if self.cursor is None:
            self.states = ()
        for states in self.states:
            states.clear()


def _selected(states: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """These rows of what has its rows in dimension `dim`; in the same place, if there are as many as before."""
    selected = states.index_select(dim, index)
    return states.copy_(selected) if selected.shape == states.shape else selected


def _undone(log: list[tuple], num_tokens: list[int]):
    """What is put back if only the first `num_tokens` of each row stand, the last pass first: rows and slots of it, which entries of a
    pass these are, and what that has overwritten."""
    for rows, slots, tokens, overwritten in reversed(log):
        first = torch.tensor(num_tokens, device=tokens.device)
        undone = tokens >= (first if len(first) == 1 else first[rows])
        yield rows[undone], slots[undone], undone, overwritten


def _tensors_in(*values) -> list[torch.Tensor]:
    """Those among the values, and those in lists and tuples among them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors_in(*value)
    return found


def _take_slots(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The states `[batch, heads, slots, head_dim]` in the slots `[rows, num]`, in that order."""
    if len(slots) == 1:
        return states.index_select(2, slots[0])
    return states.take_along_dim(slots[:, None, :, None], dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


SUPPORTED_ATTENTION = ("eager", "sdpa")


# Who uses a cache stands in its `__dict__`: `setdefault` there takes it in one step, whatever other threads do. A call of `generate`
# has it from begin to end, and what changes it, a pass among others, as long as it takes.
USERS = ("_call", "_change")


def _one_thread_at_a_time(method):
    """Of a method that changes or copies the cache: refuse while another thread uses it."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        thread = threading.get_ident()
        if vars(self).setdefault("_change", thread) != thread:
            raise _in_use()
        try:
            self._check_not_in_use(thread)
            return method(self, *args, **kwargs)
        finally:
            vars(self).pop("_change", None)

    return guarded


def _in_use() -> ValueError:
    return ValueError(
        "This SinkCache is in use by another thread or call, and would mix two texts. Give each text a cache of its own, "
        "SinkCache.from_model(model, ...), or wait until the other is done. (A pass that was begun in another thread and interrupted is "
        "for that thread to repeat.)"
    )


@dataclass
class Pass:
    """A forward pass that was begun and has not reached the last layer."""

    steps: dict[Window, Step]
    num_columns: int
    num_parts: int  # rows of the batch that come for each row of the cache (`Step`)
    num_seen_after: list[int]
    can_be_repeated: bool  # nothing that a second try would need is overwritten
    is_at_cursor: bool  # one token a row, in static mode
    input_ids: torch.Tensor | None = None
    layers_done: set[int] = field(default_factory=set)
    thread: int = field(default_factory=threading.get_ident)  # which began it

    @property
    def part_length(self) -> int:
        return self.num_columns // self.num_parts


class SinkLayer:
    """One layer of a `SinkCache`: the slots it has in a group of layers."""

    is_croppable = True

    def __init__(self, group: LayerGroup, index: int, is_sliding: bool):
        self.group, self.index, self.is_sliding = group, index, is_sliding

    @property
    def record_past(self) -> bool:
        """Whether passes keep what they evict: `SinkCache.activate_past_recording`."""
        return self.group.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.group.record_past = value

    @property
    def keys(self) -> torch.Tensor | None:
        return self._held(0)

    @property
    def values(self) -> torch.Tensor | None:
        return self._held(1)

    def _held(self, number: int) -> torch.Tensor | None:
        """What is in the slots; None if they are empty, or kept in another form."""
        states = self.group.states
        return states[number].slots[self.index] if states and not isinstance(states[number], StoredStates) else None


class RecurrentSinkLayer(SinkLayer, LinearAttentionLayer):
    """A layer that has both, keys and values and a recurrent or convolutional state of transformers' own."""

    is_croppable = False

    def __init__(self, group: LayerGroup, index: int, is_sliding: bool, own: LinearAttentionLayer):
        vars(self).update(vars(own))  # as transformers made it for this model
        SinkLayer.__init__(self, group, index, is_sliding)


class SinkCache(NotesRecurrentLayers, Cache):
    """A key/value cache that holds the first `num_sink_tokens` and the most recent tokens, `window_length` in all.

    A layer whose native sliding window is not longer than `window_length` keeps that window as it is, without sinks: the model
    was trained so. Every other attention layer gets sinks and window. Recurrent and convolutional states stay as they are.

    To move the sinks, the cache has to know how the model encodes positions. `generate` tells it; in a loop of one's own,

        cache = SinkCache.from_model(model, window_length=256, num_sink_tokens=4)
        logits = model(**cache.prepare(input_ids)).logits        # any number of new tokens, padded batches too
        logits = model(input_ids, past_key_values=cache).logits  # one row; one token at a time once the window is full

    does. With the second form, as with the model's own `generate(past_key_values=cache)`, the model counts positions by itself,
    without an end; `prepare` keeps them small, and so exact in float32 for texts of any length.

    Args:
        window_length: tokens held, the sinks and the newest token included.
        num_sink_tokens: how many of the first tokens are never evicted. 0 makes a plain sliding window.
        static: room for the whole window is made at once and never moves, and what a pass over one token has to know stands in
            tensors: `torch.compile` makes one graph of it, which serves the whole stream. The pass must have been prepared.
        quantized: a dict of options (see `Quantization`, {} for the defaults): but for the sinks and the most recent tokens, what is
            held is quantized. Layers with native windows too short for that stay as they are.
        offloaded: but for the sinks, what is held is kept in the memory of the host.

    Raises:
        ValueError: the numbers make no window, or the options don't go together.
        ImportError: what quantizes is not installed.
    """

    def __init__(
        self,
        window_length: int = DEFAULT_WINDOW_LENGTH,
        num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
        static: bool = False,
        quantized: dict | None = None,
        offloaded: bool = False,
    ):
        _check_numbers(window_length, num_sink_tokens)
        modes = {"static": static, "quantized": quantized is not None, "offloaded": offloaded}
        modes = [name for name, is_asked in modes.items() if is_asked]
        if len(modes) > 1:
            raise ValueError(f"A window can't be {' and '.join(modes)} at once: it is kept in one way. Choose one.")
        self.quantization = None if quantized is None else Quantization.of(quantized)
        self.is_offloaded = offloaded
        if quantized is not None and window_length - num_sink_tokens < self.quantization.min_recent:
            raise ValueError(
                f"window_length={window_length} with num_sink_tokens={num_sink_tokens} leaves nothing to quantize: residual_length="
                f"{self.quantization.residual_length} tokens stay as they are, and a block has q_group_size="
                f"{self.quantization.q_group_size}. Use a longer window, or smaller ones of these."
            )
        self.layers = []
        if HAS_LAYERS_BY_CONFIG:
            super().__init__(layers=self.layers)
        self.window_length = window_length
        self.num_sink_tokens = num_sink_tokens
        self.is_static = static
        self._window = Window(window_length, num_sink_tokens)
        self._traits: ModelTraits | None = None
        self._groups: list[LayerGroup] = []
        self._pass: Pass | None = None
        self._idle_rows: list[tuple] = []  # recurrent states that the last pass must leave alone: layer, name, rows, states
        self.reset()

    # What it holds

    def __repr__(self) -> str:
        mode = ", static=True" if self.is_static else ", offloaded=True" if self.is_offloaded else ""
        if self.quantization is not None:
            mode = f", quantized={self.quantization.backend!r}, nbits={self.quantization.nbits or 8}"
        on_host = f", bytes_on_host={self.num_bytes_on_host}" if self.is_offloaded else ""
        return (
            f"{type(self).__name__}(window_length={self.window_length}, num_sink_tokens={self.num_sink_tokens}{mode}, "
            f"tokens_seen={self.num_tokens_seen}, tokens_held={self.num_tokens_held}, bytes_held={self.num_bytes_held}{on_host})"
        )

    @property
    def num_tokens_seen(self) -> int:
        """Tokens that went through the cache, held or evicted: those of the row that has the most."""
        return max(self._num_seen)

    @property
    def num_tokens_seen_by_row(self) -> list[int]:
        """Tokens that went through the cache, row by row: padding is not counted."""
        return self._num_seen if len(self._num_seen) > 1 else self._num_seen * max(self._batch_size, 1)

    @property
    def num_tokens_held(self) -> int:
        """Tokens whose keys and values are held: those of the row that has the most. Never more than `window_length`."""
        return min(self.num_tokens_seen, self.window_length)

    @property
    def num_bytes_held(self) -> int:
        """Bytes of all tensors of the cache: their storages, each once."""
        tensors = [tensor for states in self._states for tensor in states.tensors]
        tensors += [tensor for group in self._groups if group.cursor for tensor in _tensors_in(*vars(group.cursor).values())]
        tensors += [state for layer in self._recurrent_layers.values() for state in _named_states(layer).values()]
        tensors += _tensors_in(self._token_ids, self._token_log, self._idle_rows)
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def num_bytes_on_host(self) -> int:
        """Those of `num_bytes_held` that are offloaded."""
        return sum(states.num_bytes_on_host for states in self._states)

    def get_seq_length(self, layer_idx: int | None = None, *args, **kwargs) -> int:
        """Tokens seen, as for every cache of transformers: what `generate` continues from.

        For a layer that asks in the middle of a prepared pass, the position of its first column: Llama 4 scales queries by it.
        """
        if self._is_at_cursor and is_torchdynamo_compiling():
            # The slots before the query: a graph takes numbers for constants, and has been given its positions.
            return self.window_length - 1
        current = self._pass
        if layer_idx is not None and current is not None and self._done_at_cursor is None:
            last = max(after - start for after, start in zip(current.num_seen_after, self._base))
            return max(last - current.num_columns, 0)
        return self.num_tokens_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens held at most: by any layer, or by the given one."""
        if layer_idx is None or not self.layers:
            return self.window_length
        return self._window_at(layer_idx).length

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """`get_max_length` under its name before transformers 5."""
        return self.get_max_length(layer_idx)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first pass."""
        return self._batch_size

    @property
    def _states(self) -> list[States]:
        return [states for group in self._groups for states in group.states]

    @property
    def _recurrent_layers(self) -> dict[int, LinearAttentionLayer]:
        """By their numbers, those with a recurrent or convolutional state."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, LinearAttentionLayer)}

    @property
    def _num_seen(self) -> list[int]:
        """Tokens seen: one number for each row, or a single one where all rows are alike."""
        done = self._done_at_cursor
        if done is None:
            return self._num_seen_before
        if done.thread == threading.get_ident():  # others may look, but not touch
            self._finish(done)
        return done.num_seen_after

    @property
    def _done_at_cursor(self) -> Pass | None:
        """The last pass, if it was one over one token, in static mode, and has been through all layers: nothing in it could say so."""
        current = self._pass
        return current if current is not None and current.is_at_cursor and not self._is_at_cursor else None

    @_num_seen.setter
    def _num_seen(self, value: list[int]) -> None:
        self._num_seen_before = value

    # The model

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module,
        window_length: int = DEFAULT_WINDOW_LENGTH,
        num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
        static: bool = False,
        quantized: dict | None = None,
        offloaded: bool = False,
    ) -> "SinkCache":
        """A cache for this model.

        Raises:
            ValueError: the numbers make no window, or the rules can't be kept for this model.
        """
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"SinkCache.from_model takes a loaded model, got {model!r} ({type(model).__name__}).")
        cache = cls(window_length, num_sink_tokens, static, quantized, offloaded)
        cache.bind(model)
        return cache

    def empty_like(self) -> "SinkCache":
        """A new cache of the same window and kind, which serves no model yet."""
        return type(self)(**self._arguments)

    @property
    def _arguments(self) -> dict:
        """Those with which it was made."""
        return {
            "window_length": self.window_length,
            "num_sink_tokens": self.num_sink_tokens,
            "static": self.is_static,
            "quantized": self.quantization and vars(self.quantization),
            "offloaded": self.is_offloaded,
        }

    def bind(self, model: torch.nn.Module) -> None:
        """Tell the cache which model it serves: once, before its first token.

        Raises:
            ValueError: the rules can't be kept for this model, or the cache serves another one.
        """
        model = _unwrapped(model)
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation not in SUPPORTED_ATTENTION:
            raise ValueError(
                f"SinkCache makes masks for {' and '.join(SUPPORTED_ATTENTION)} attention, and this model uses "
                f'{config._attn_implementation}. Load it with from_pretrained(..., attn_implementation="sdpa"), or call '
                'model.set_attn_implementation("sdpa").'
            )
        _check_mode(model)
        if self._traits is None:
            traits = model_traits(model, self.window_length)
        elif self._model() is not model:
            raise ValueError(
                f"This cache was made for another model, and its keys mean nothing to this {type(model).__name__}. Make a new one "
                "with SinkCache.from_model(model, ...)."
            )
        else:
            if self._bound_as != (model.dtype, model.device):
                dtype, device = self._bound_as
                raise ValueError(
                    f"The model is now in {model.dtype} on {model.device}, and this cache was made for it in {dtype} on {device}. Make "
                    "a new one with SinkCache.from_model(model, ...)."
                )
            return
        if self.is_static and traits.is_ordered:
            raise ValueError(
                f"The static mode can't serve {type(model).__name__}, which depends on the order of the keys. Leave it out."
            )
        windows = [layer and self._window_of(layer) for layer in traits.layers]
        mask_names = traits.layer_types or ["" if window else None for window in windows]
        masks = {(name, window) for name, window in zip(mask_names, windows) if window is not None}
        if not traits.is_ordered and len(masks) > len({name for name, _ in masks}):
            raise ValueError(
                f"SinkCache gives one mask to all layers of a type, and layers of {type(model).__name__} that share a mask have windows of "
                "different lengths."
            )
        self._traits = traits
        self._model = weakref.ref(model)
        self._bound_as = model.dtype, model.device
        self._config = config
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        members: dict[tuple, list[int]] = {}
        for index, (layer, window) in enumerate(zip(traits.layers, windows)):
            if layer is not None:
                keeps_native = layer.native_window == window.length
                alike = (window, keeps_native, layer.shapes, layer.dtype, layer.device, *(r.fingerprint for r in layer.rotations))
                members.setdefault(alike, []).append(index)
        self._groups = [
            LayerGroup(alike[0], traits.layers[indices[0]], indices, self.quantization, self.is_offloaded)
            for alike, indices in members.items()
        ]
        holding_keys = [index for group in self._groups for index in group.layers]
        self._windows = {group.window for group in self._groups} | {self._window}
        self._num_layers, self._last_layer = len(holding_keys), max(holding_keys)
        self._make_layers()

    def _make_layers(self) -> None:
        """One object a layer: ours for its keys and values, transformers' own for any other state."""
        layers = _own_layers(self._config)
        for group in self._groups:
            for number, index in enumerate(group.layers):
                is_sliding = self._traits.layers[index].native_window == group.window.length
                if isinstance(layers[index], LinearAttentionLayer):
                    layers[index] = RecurrentSinkLayer(group, number, is_sliding, layers[index])
                else:
                    layers[index] = SinkLayer(group, number, is_sliding)
        self.layers = layers

    def _make_room_for_recurrent(self, batch_size: int) -> None:
        """In static mode, for all states of that kind: in the place that was made for as many rows before."""
        layers = self._recurrent_layers.values()
        rows = {len(state) for layer in layers for state in _named_states(layer).values()}
        if rows == {batch_size}:
            for layer in layers:
                LinearAttentionLayer.reset(layer)
        elif layers:
            self._make_layers()
            for index, states in self._traits.recurrent_states.items():
                layer = self.layers[index]
                states = {name: state.new_zeros(batch_size, *state.shape[1:]) for name, state in states.items()}
                _restore_recurrent(layer, states, [False] * len(_has_previous_state(layer)))

    def _window_of(self, layer: LayerTraits) -> Window:
        keeps_native = layer.native_window is not None and layer.native_window <= self.window_length
        return Window(layer.native_window, 0) if keeps_native else self._window

    # One forward pass

    def prepare(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_parts: int = 1,
    ) -> dict:
        """The arguments with which the model takes the next tokens: `model(**cache.prepare(input_ids))`.

        Args:
            input_ids: the new tokens, `[batch, num_columns]`. Rows may go on by different numbers of tokens, padded on the left.
            attention_mask: 1 for a token and 0 for padding, for the new columns or for all so far: only the last ones are read.
            inputs_embeds: embeddings in place of ids, `[batch, num_columns, hidden]`.
            num_parts: for long passes over a full window, which are faster if the model takes each row as so many: its logits then are
                `[batch * num_parts, num_columns / num_parts, vocab]`. `num_parts_of` says how many are best.

        Raises:
            ValueError: what is passed does not fit to the cache or can't be processed exactly. The cache is as before.
        """
        tokens, num_dims = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != num_dims or 0 in tokens.shape[:2]:
            shape = f"shape {tuple(tokens.shape)}" if isinstance(tokens, torch.Tensor) else f"{tokens!r:.50}"
            raise ValueError(
                f"No tokens: pass input_ids [batch, num_columns], or inputs_embeds [batch, num_columns, hidden], with at least one column; "
                f"got {shape}."
            )
        batch_size, num_columns = tokens.shape[:2]
        num_new = [num_columns]
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor):
                raise ValueError(
                    f"attention_mask must be a Tensor, got {attention_mask!r:.50} ({type(attention_mask).__name__})."
                )
            if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < num_columns:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, and must have {(batch_size, num_columns)}, or more columns "
                    "for tokens that the cache has seen."
                )
            num_new = count_tokens(attention_mask[:, -num_columns:])
        if num_parts != 1:
            self._check_parts(num_columns, num_new, num_parts)
        self._begin(batch_size, num_columns, num_new, num_parts=num_parts)
        if self._is_at_cursor:  # a graph is made for one layout, and this pass stays on record until the next one
            tokens = tokens.clone(memory_format=torch.contiguous_format)
        self._pass.input_ids = tokens if inputs_embeds is None else input_ids
        if num_parts > 1:
            tokens = tokens.unflatten(1, (num_parts, -1)).flatten(0, 1)
        inputs = {"input_ids" if inputs_embeds is None else "inputs_embeds": tokens}
        inputs |= {_cache_name(self._accepted): self, "use_cache": True, "attention_mask": self._attention_mask(tokens.device)}
        if "position_ids" in self._accepted:
            inputs["position_ids"] = self._position_ids(tokens.device)
        if "cache_position" in self._accepted and (self._is_at_cursor or self._traits.is_chunked):
            inputs["cache_position"] = inputs["position_ids"][0]  # else the model makes it of numbers
        return inputs

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the attention layers call. `[batch, heads, num_columns, head_dim]` in, `[batch, heads, kv_length, head_dim]` out."""
        if torch.is_grad_enabled():  # what is held has no history: gradients end here
            key_states, value_states = key_states.detach(), value_states.detach()
        if not self.layers:  # before 4.53 nothing was asked before
            self._require_model()
        layer = self.layers[layer_idx]
        if self._is_at_cursor:
            keys, values = layer.group.states
            self._is_at_cursor, self._kv_length = layer_idx != self._last_layer, layer.group.window.length
            return keys.update_at_cursor(layer.index, key_states), values.update_at_cursor(layer.index, value_states)
        if self._pass is None or self._pass.is_at_cursor or layer_idx in self._pass.layers_done:  # at the cursor, it is done
            self._begin_unprepared(key_states.shape[0], key_states.shape[2])
        current = self._pass
        is_first = not current.layers_done
        num_rows = self._batch_size * current.num_parts
        if is_first and (key_states.shape[2] != current.part_length or key_states.shape[0] != num_rows):
            raise ValueError(
                f"The pass was prepared for {num_rows} rows of {current.part_length} tokens, and the model brings "
                f"{key_states.shape[0]} rows of {key_states.shape[2]}. Call the model with exactly what `prepare` returns."
            )
        if not key_states.dtype == value_states.dtype == layer.group.traits.dtype:
            raise ValueError(
                f"The model brings keys in {key_states.dtype} and values in {value_states.dtype}, and this cache was made for "
                f"{layer.group.traits.dtype}. Put the model into one dtype, model.to(dtype), in place of autocast; if that was done after "
                "the cache was made, make a new one."
            )
        if current.num_parts > 1:
            step = current.steps[layer.group.window]
            key_states, value_states = step.joined(key_states), step.joined(value_states)
        keys, values = layer.group.states
        held = keys.update(layer.index, key_states), values.update(layer.index, value_states)
        self._kv_length = held[0].shape[2]
        current.layers_done.add(layer_idx)
        if len(current.layers_done) == self._num_layers:
            self._finish(current)
        return held

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """What a layer calls behind `update` to choose what it attends to. `[batch, num_columns, dim]` in, `[batch, kv_length, dim]` out.

        It may choose as many keys as the window holds, and so takes all that are visible, whatever they look like to it: none is kept.
        """
        batch_size, _, dim = indexer_key_states.shape
        return indexer_key_states.new_zeros(1).expand(batch_size, self._kv_length, dim)

    def _finish(self, finished: "Pass") -> None:
        self._pass = None
        for states in self._states:
            states.end()
        self._record(finished.input_ids, finished.steps[self._window])
        if self._is_recording:
            self._num_recorded += min(after - seen for after, seen in zip(finished.num_seen_after, self._num_seen))
            if not all(states.can_undo(finished.steps[states.window]) for states in self._states):
                self._forget_recorded()
        self._num_seen = finished.num_seen_after

    def _begin_unprepared(self, batch_size: int, num_columns: int) -> None:
        """A pass whose positions and masks the model makes by itself, from what `get_seq_length` and `get_mask_sizes` say."""
        self._require_model()
        if batch_size > 1:
            raise ValueError(
                f"Without `prepare`, several rows (here {batch_size}) can't be served: this cache can't tell padding of a batch from its "
                "tokens, and padding would become the sinks. Call model(**cache.prepare(input_ids, attention_mask)), or generate with "
                "custom_generate."
            )
        self._check_unprepared(num_columns)
        self._begin(batch_size, num_columns, [num_columns], is_prepared=False)

    def _check_unprepared(self, num_columns: int) -> None:
        num_after = self.num_tokens_seen + num_columns
        length = min(group.window.length for group in self._groups)
        reason = None
        if num_columns > 1 and num_after > length:
            reason = f"{num_columns} tokens at once go past the window of {length}, and need a mask of their own"
        elif self._traits.is_ordered:
            reason = "the scores of this model depend on the order of the keys, which it takes from the mask"
        elif self._traits.has_local_attention and not MODELS_ASK_FOR_QUERY_OFFSET:
            reason = "this release of transformers makes a mask for layers with native windows or chunks that does not fit to the cache"
        elif self._traits.is_recurrent:
            reason = "the recurrent layers of this model are told by `prepare` what is padding, and positions by nobody else"
        elif any(self._base):
            reason = "the keys so far stand at positions that `prepare` chose"
        elif num_after > min(self._traits.num_positions or MAX_EXACT_POSITION, MAX_EXACT_POSITION):
            reason = f"position {num_after - 1} is more than this model can tell apart"
        if reason is not None:
            raise ValueError(
                f"This pass can't be exact as it is: {reason}. Call model(**cache.prepare(input_ids)), or generate with "
                "custom_generate."
            )

    @contextlib.contextmanager
    def in_one_call(self):
        """For a call that runs many passes: meanwhile, no other call and no other thread may use the cache."""
        call = threading.get_ident(), object()
        if vars(self).setdefault("_call", call) is not call:
            raise _in_use()
        try:
            self._check_not_in_use(call[0])
            yield
        finally:
            if self._done_at_cursor is not None:
                self._finish(self._pass)
            elif self._pass is not None and self._pass.can_be_repeated and self._pass.thread == call[0]:
                # Interrupted, and nothing is lost: whoever comes next begins it anew.
                self._pass, self._is_at_cursor = None, False
            vars(self).pop("_call")

    def _check_not_in_use(self, thread: int) -> None:
        """Refuse if another thread is in a call, a change or a pass. What is done of a pass is put on record."""
        call, change, current, done = vars(self).get("_call"), vars(self).get("_change"), self._pass, self._done_at_cursor
        if (call or (thread,))[0] != thread or change not in (None, thread):
            raise _in_use()
        if current is not None and current is not done and current.thread != thread:
            raise _in_use()
        if done is not None:
            self._finish(done)
        if self._idle_rows and self._pass is None:
            self._put_back_idle_rows()

    def _require_model(self) -> None:
        if self._traits is None:
            raise ValueError(
                "This SinkCache does not know how the model moves keys. Make it with SinkCache.from_model(model, "
                f"window_length={self.window_length}, num_sink_tokens={self.num_sink_tokens}), or generate with custom_generate."
            )

    @_one_thread_at_a_time
    @torch.inference_mode(False)  # what is made here may be changed in any mode
    def _begin(self, batch_size: int, num_columns: int, num_new: list[int], is_prepared: bool = True, num_parts: int = 1) -> None:
        """Decide all that a pass does. Nothing is changed before everything has been checked."""
        self._require_model()
        model = self._model()
        if model is not None and model.training:
            _check_mode(model)
        if self._has_lost_states:
            raise ValueError(
                f"The last pass was interrupted before it had been through all {len(self.layers)} layers, when some had already let go of "
                "what a second try needs. Call reset(), or go on from a copy that was made before."
            )
        if self._batch_size not in (-1, batch_size):
            raise ValueError(
                f"This cache holds {self._batch_size} rows, and {batch_size} are passed. Pass as many, or a new cache."
            )
        num_seen, base = self._num_seen, self._base
        if len(num_new) > 1 or len(num_seen) > 1:
            num_new, num_seen, base = (x if len(x) == batch_size else x * batch_size for x in (num_new, num_seen, base))
        num_seen_after = [seen + new for seen, new in zip(num_seen, num_new)]
        self._check_padding(num_seen, num_new, num_columns)

        evicts = num_columns > 1 and any(max(num_seen_after) > window.length for window in self._windows)
        if evicts and self._traits.is_ordered:
            raise ValueError(
                f"{num_columns} tokens at once go past the window of {self.window_length}, and the scores of this model depend on "
                "the order of the keys. Feed them one by one."
            )
        back = self._positions_back(num_seen, num_seen_after, base) if is_prepared else [0] * len(base)
        base = [start + amount for start, amount in zip(base, back)]
        limit = self._traits.num_positions
        if limit is not None and max(num_columns, *(after - start for after, start in zip(num_seen_after, base))) > limit:
            raise ValueError(f"{num_columns} tokens at once go past the {limit} positions of this model. Feed fewer at once.")

        self.unseen_token_ids = None
        if self._batch_size == -1:
            self._batch_size = batch_size
            for group in self._groups:
                group.allocate(batch_size, self._mask_dtype(group), self.is_static)
            if self.is_static:
                self._make_room_for_recurrent(batch_size)
        if any(back):
            for states in self._states:
                states.move_back(back)
        if len(set(zip(num_seen, num_new, base))) == 1:  # all rows alike: one number serves them all
            num_seen, num_new, num_seen_after, base = num_seen[:1], num_new[:1], num_seen_after[:1], base[:1]
        self._num_seen, self._base = num_seen, base
        device = self._groups[0].traits.device
        arguments = num_seen, num_new, num_columns, base, device, self._traits.is_ordered, num_parts
        steps = {window: Step(window, *arguments) for window in self._windows}
        at_cursor = self.is_static and is_prepared and num_columns == min(num_new) == 1
        is_recording = self._is_recording
        for group in self._groups:
            if at_cursor and group.cursor.visible.dtype != self._mask_dtype(group):  # after model.set_attn_implementation
                group.set_cursor(batch_size, self._mask_dtype(group))
            step = steps[group.window].to(group.traits.device)
            for states in group.states:
                states.begin(step, is_recording, at_cursor)
        if at_cursor:
            for group in self._groups:
                group.cursor.move(num_seen)
        if self._traits.is_recurrent:
            self._keep_idle_rows(num_new)
        self._is_at_cursor, self.layers_reached = at_cursor, set()
        quantizes = self.quantization is not None and num_columns > 1
        can_be_repeated = not evicts and not quantizes and not self._traits.is_recurrent
        self._pass = Pass(steps, num_columns, num_parts, num_seen_after, can_be_repeated, at_cursor)

    def _check_padding(self, num_seen: list[int], num_new: list[int], num_columns: int) -> None:
        for row, (seen, new) in enumerate(zip(num_seen, num_new) if self._traits.is_recurrent else ()):
            if seen > 0 and 0 < new < num_columns:
                raise ValueError(
                    f"Row {row} of the batch goes on by {new} tokens and another one by {num_columns}: the padding between would change "
                    "its recurrent states as if it were text. Split the pass so that in each part a row has tokens in all columns or in "
                    "none, or generate with custom_generate, which does."
                )

    def _keep_idle_rows(self, num_new: list[int]) -> None:
        """Recurrent layers go on over padding, too: the states of rows that bring nothing else are put back after the pass."""
        rows = [row for row in range(self._batch_size) if num_new[row % len(num_new)] == 0]
        layers = self._recurrent_layers if rows and any(self._num_seen) else {}
        named = ((index, *item) for index, layer in layers.items() for item in _named_states(layer).items())
        self._idle_rows = [(index, name, rows, state[rows]) for index, name, state in named]

    def _put_back_idle_rows(self) -> None:
        with torch.inference_mode():  # where the model may have made them
            for index, name, rows, states in self._idle_rows:
                _named_states(self.layers[index])[name][rows] = states
        self._idle_rows = []

    @property
    def _has_lost_states(self) -> bool:
        """Whether the last pass was interrupted, and can't be repeated. In static mode it may have been compiled, and says nothing before
        its end."""
        noted, reached = self._traits.noted_layers, self.layers_reached
        if self._pass is None:  # through all layers that hold keys
            return any(self._num_seen) and not noted <= reached
        has_begun = self._pass.is_at_cursor or len(self._pass.layers_done) > 0 or not noted.isdisjoint(reached)
        return not self._pass.can_be_repeated and has_begun

    def _positions_back(self, num_seen: list[int], num_seen_after: list[int], base: list[int]) -> list[int]:
        """By how much the positions of each row are lowered before a pass: rarely, and then to `window_length`.

        Positions stay small, so that float32 angles are exact and the frequencies of all RoPE types are those of short texts; and a
        key is turned back, and so rounded, at most once in `window_length` tokens.
        """
        limit = self._traits.num_positions
        back = []
        for seen, after, start in zip(num_seen, num_seen_after, base):
            is_due = seen - start >= self._traits.turns_at or (limit is not None and after - start > limit)
            lowest = min(seen, self.window_length)  # else sinks would stand before position 0; met only after a roll-back
            back.append(seen - start - lowest if is_due or seen - start < lowest else 0)
        return back

    def num_parts_of(self, num_columns: int) -> int:
        """In how many parts the next pass should come, if it is one of so many columns and none of them is padding: the divisor of
        `num_columns` that makes parts nearest to the best length. 1 while a window is not full."""
        if not isinstance(num_columns, int) or num_columns < 1:
            raise ValueError(f"num_columns must be an int of at least 1, got {num_columns!r} ({type(num_columns).__name__}).")
        best = num_columns / self.best_part_length if self.takes_parts else 1
        divisors = (num for num in range(1, num_columns + 1) if num_columns % num == 0)
        return min(divisors, key=lambda num: abs(math.log(num / best))) if best > 1 else 1

    @property
    def best_part_length(self) -> int:
        """Columns of a part that `num_parts_of` aims at."""
        return self._window.part_length

    @property
    def takes_parts(self) -> bool:
        """Whether the next pass may come in parts: all rows have full windows, and the model looks at nothing but positions, masks and
        what it is handed to tell where in its row a token is."""
        self._require_model()
        traits = self._traits
        is_plain = not (traits.is_recurrent or traits.is_ordered or traits.is_chunked or traits.is_indexed)
        return is_plain and min(self._num_seen) >= self.window_length

    def _check_parts(self, num_columns: int, num_new: list[int], num_parts: int) -> None:
        self._require_model()
        reason = None
        if not isinstance(num_parts, int) or num_parts < 1:
            reason = "it must be an int of at least 1. Take num_parts_of(num_columns)"
        elif num_columns % num_parts:
            reason = f"{num_columns} tokens can't be divided into so many parts of one length. Take num_parts_of({num_columns})"
        elif min(num_new) < num_columns:
            reason = "a row has padding. Leave it out"
        elif not self.takes_parts:
            reason = (
                "the window of a row is not full yet, or layers of the model have to go through a row in one piece. Leave it out"
            )
        if reason is not None:
            raise ValueError(f"num_parts={num_parts!r} can't be used for this pass: {reason}.")

    @property
    def num_columns_at_once(self) -> int:
        """The longest next pass that does not cross an edge: of the window while it is filling, then of the small positions."""
        columns = []
        for seen, start in zip(self._num_seen, self._base):
            if seen < self.window_length:
                columns.append(self.window_length - seen)
            elif self._traits.is_ordered:
                columns.append(1)
            else:
                room = self._traits.turns_at - (seen - start)
                columns.append(room if room > 0 else self._traits.turns_at - self.window_length)
        return min(columns)

    def _attention_mask(self, device: torch.device):
        """The mask for a prepared pass, in the form in which the model takes it; None for a plain causal one."""
        steps = self._pass.steps
        if self._is_at_cursor:
            masks = {name: group.cursor.visible for group in self._groups for name in self._mask_names(group)}
            return self._by_type(masks, None)
        if self._traits.is_ordered:
            step = steps[self._window]
            held = step.is_held.long()
            return held.expand(self._batch_size, -1).to(device)
        padding = self._padding(device)
        is_causal = all(steps[group.window].is_causal for group in self._groups) and (
            padding is None or not self._traits.is_recurrent
        )
        if is_causal and self._model_makes_this_mask():
            return None
        masks = {}
        for group in self._groups:
            names = [name for name in self._mask_names(group) if name not in masks]
            if names:  # else made for such layers on another device
                mask = _as_mask(steps[group.window].visible()[:, None].to(device), self._mask_dtype(group))
                masks |= dict.fromkeys(names, mask.expand(self._batch_size * self._pass.num_parts, -1, -1, -1))
        return self._by_type(masks, padding)

    def _by_type(self, masks: dict[str | None, torch.Tensor], padding: torch.Tensor | None) -> dict | torch.Tensor:
        """Masks by the names of `_mask_names`, in the form in which the model takes them."""
        if self._traits.is_recurrent:
            # Under all names under which these models look for them.
            full = next((masks[name] for name in (None, *FULL_MASKS) if name in masks), None)
            sliding = next((masks[name] for name in SLIDING_MASKS if name in masks), None)
            masks |= dict.fromkeys(FULL_MASKS, full) | dict.fromkeys(SLIDING_MASKS, sliding)
            return masks | dict.fromkeys(PADDING_MASKS, padding)
        return masks if self._traits.layer_types else masks[None]

    def _mask_names(self, group: LayerGroup) -> list[str | None]:
        """The names under which the model looks for the mask of these layers."""
        return [self._traits.layer_types[index] for index in group.layers] if self._traits.layer_types else [None]

    def _mask_dtype(self, group: LayerGroup) -> torch.dtype:
        """Whether masks say what is visible, or are added to the scores (before 5.17, also by indexers)."""
        takes_numbers = self._traits.has_old_masks or self._traits.is_indexed
        is_bool = self._config._attn_implementation == "sdpa" and not takes_numbers
        return torch.bool if is_bool else group.traits.dtype

    def _model_makes_this_mask(self) -> bool:
        """Whether the mask that the model makes by itself is right, where each token sees all that is handed out before it."""
        if self._traits.is_indexed:  # before 5.17, it takes the position of a query for its slot
            return False
        if self._traits.has_old_masks:  # only if it makes none
            makes_none = self._pass.num_columns == 1 or not any(self._num_seen)
            makes_none &= (
                getattr(self._config, "sliding_window", None) is None
            )  # else one of the whole text, even if it is not used
            return self._config._attn_implementation == "sdpa" and makes_none and not self._traits.has_local_attention
        return MODELS_ASK_FOR_QUERY_OFFSET or not self._traits.has_local_attention

    def _padding(self, device: torch.device) -> torch.Tensor | None:
        """The mask of the columns of this pass, `[batch, num_columns]`; None if none is padding."""
        num_columns, num_seen_after = self._pass.num_columns, self._pass.num_seen_after
        num_new = [after - seen for after, seen in zip(num_seen_after, self._num_seen)]
        if min(num_new) == num_columns:
            return None
        column = torch.arange(num_columns, device=device)
        mask = column >= num_columns - torch.tensor(num_new, device=device)[:, None]
        return mask.long().expand(self._batch_size, -1)

    def _position_ids(self, device: torch.device) -> torch.Tensor:
        """`[batch, num_columns]`, or in parts: token numbers less the base of the row; padding stands at 0."""
        num_columns = self._pass.num_columns
        stop = [after - start for after, start in zip(self._pass.num_seen_after, self._base)]
        if len(stop) == num_columns == 1:
            return torch.full((self._batch_size, 1), stop[0] - 1, device=device)
        if len(stop) == 1:
            positions = torch.arange(stop[0] - num_columns, stop[0], device=device)[None]
        else:
            positions = torch.arange(-num_columns, 0, device=device) + torch.tensor(stop, device=device)[:, None]
            positions = positions.clamp(min=0)
        positions = positions.expand(self._batch_size, -1).reshape(-1, self._pass.part_length)
        return positions.contiguous()  # of one layout, whatever the rows are

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that a pass will be handed, for the mask that a model makes by itself.

        `query_length` is what it says, or the positions of the queries (before transformers 5).
        """
        num_columns = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        window = self._window_at(layer_idx)
        if self._is_at_cursor:
            return window.length, 0
        if self._pass is not None and not self._pass.layers_done:
            return self._pass.steps[window].kv_length, 0
        self._check_unprepared(num_columns)
        return min(self.num_tokens_seen + num_columns, window.length), 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the queries of a pass stand among the keys they are handed: at their end."""
        window = self._window_at(layer_idx)
        if self._pass is not None and not self._pass.layers_done:
            return self._pass.steps[window].kv_length - self._pass.part_length
        return min(self.num_tokens_seen, window.length - 1)

    def _window_at(self, layer_idx: int) -> Window:
        """The window of a layer; for one without keys, that of the first which has some, as for the caches of transformers."""
        self._require_model()
        layer = self.layers[layer_idx]
        return layer.group.window if isinstance(layer, SinkLayer) else self._groups[0].window

    @property
    def is_linear(self) -> list[bool]:
        return [isinstance(layer, LinearAttentionLayer) and not isinstance(layer, SinkLayer) for layer in self.layers]

    @property
    def is_initialized(self) -> bool:
        return self._batch_size != -1

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model's forward pass, as it does on a GPU."""
        return self.is_static

    # Which tokens it holds

    @torch.inference_mode(False)
    def _record(self, input_ids: torch.Tensor | None, step: Step) -> None:
        """Remember the ids of the tokens held, so that a history passed again can be told from new tokens."""
        if input_ids is None or (self._token_ids is None and any(self._num_seen)):
            self._token_ids = None
            return
        if self._token_ids is None:
            size = (self._batch_size, self.window_length)
            self._token_ids = torch.full(size, -1, dtype=input_ids.dtype, device=input_ids.device)
        step, input_ids = step.to(self._token_ids.device), input_ids.to(self._token_ids.device)
        if self._is_recording:
            rows, slots, tokens = step.written(self._batch_size)
            self._token_log.append((rows, slots, tokens, self._token_ids[rows, slots]))
        self._token_ids[step.rows, step.slots] = input_ids[step.rows, step.columns]

    def known_token_ids(self, row: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The ids of the first and of the most recent tokens held of a row, each in order; None if they are not known."""
        if self._token_ids is None:
            return None
        num_seen = self.num_tokens_seen_by_row[row]
        num_recent = num_seen if num_seen <= self.window_length else self._window.num_recent
        ids = self._token_ids[row].long().cpu()
        return ids[: min(num_seen, self.num_sink_tokens)], ids[self._window.slot(torch.arange(num_seen - num_recent, num_seen))]

    # The batch

    @_one_thread_at_a_time
    def reset(self) -> None:
        """As new: no tokens, any batch size."""
        self._batch_size = -1
        self._num_seen, self._base = [0], [0]  # one number for each row, or a single one where all rows are alike
        self._pass: Pass | None = None
        self._kv_length = 0  # of what was handed out last
        self._is_at_cursor = False  # until the last layer has been through a pass over one token, in static mode
        self.layers_reached: set[int | None] = set()  # by the last pass, of the recurrent ones
        self._token_ids: torch.Tensor | None = None
        self.unseen_token_ids: list[int] | None = None  # what `generate` returned last: chosen, but not yet processed
        self._idle_rows = []
        self._num_recorded = 0
        self._num_other_columns = 0  # of the text that `generate` has, less tokens seen, while it takes drafts back
        self._token_log: list[tuple] = []
        for group in self._groups:
            group.clear()
        if self._traits is not None and not self.is_static:
            self._make_layers()

    @_one_thread_at_a_time
    @torch.inference_mode(False)
    def _select_rows(self, index: torch.Tensor) -> None:
        if self._batch_size == -1:
            return
        if len(self._num_seen) > 1:
            rows = index.tolist()
            self._num_seen, self._base = [self._num_seen[row] for row in rows], [self._base[row] for row in rows]
        for group in self._groups:
            group.select_rows(index)
        for layer in self._recurrent_layers.values():
            if self.is_static and len(index) == self._batch_size:
                for state in _named_states(layer).values():
                    _selected(state, 0, index.to(state.device))
            else:
                LinearAttentionLayer.reorder_cache(layer, index)
        if self._token_ids is not None:
            self._token_ids = self._token_ids.index_select(0, index.to(self._token_ids.device))
        if self.unseen_token_ids is not None:
            self.unseen_token_ids = [self.unseen_token_ids[row] for row in index.tolist()]
        self._batch_size = len(index)
        self._forget_recorded()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (numbers, or a mask), in this order."""
        self._select_rows(torch.arange(max(self._batch_size, 0), device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows that stand together."""
        self._select_rows(torch.arange(max(self._batch_size, 0)).repeat_interleave(repeats))

    # Roll-back

    def activate_past_recording(self) -> None:
        """Keep what passes evict from now on, until `crop` says which of their tokens stand."""
        self._set_recording(True)

    def _set_recording(self, value: bool) -> None:
        for group in self._groups:
            group.record_past = value
        self._num_other_columns = 0
        self._forget_recorded()

    @property
    def _is_recording(self) -> bool:
        return any(group.record_past for group in self._groups)

    @_one_thread_at_a_time
    def crop(self, num_tokens: int) -> None:
        """Take the last tokens back, as if they had never been seen: `-num_tokens` of them if negative, else all but the first so
        many (as before transformers 5.14, where `generate` counts all columns of its text). What was recorded until then is let go.

        Raises:
            ValueError: the tokens that those ones evicted were not recorded, or there are not so many. The cache is as before.
        """
        num_tokens = int(num_tokens)  # a tensor, where `generate` has counted what it takes back (since 5.14)
        removed = -num_tokens if num_tokens <= 0 else max(0, self.num_tokens_seen + self._num_other_columns - num_tokens)
        num_left = [seen - removed for seen in self._num_seen]
        if removed and self._traits is not None and self._traits.is_recurrent:
            raise ValueError(f"Can't take back {removed} tokens: this model has recurrent states, and they can't be turned back.")
        if removed and min(num_left) < 0:
            raise ValueError(f"Can't take back {removed} tokens: a row of the cache has seen only {min(self._num_seen)}.")
        for group in self._groups if removed else ():
            if max(self._num_seen) > group.num_intact and self._num_recorded < removed:
                raise ValueError(
                    f"Can't take back {removed} tokens: what the last {self._num_recorded} evicted was recorded, no more. Call "
                    "activate_past_recording() before the passes that may be taken back."
                )
        if removed:
            for states in self._states:
                states.undo(num_left)
            for rows, slots, undone, old in _undone(self._token_log, num_left):
                self._token_ids[rows, slots] = old[undone]
            self._num_seen, self.unseen_token_ids = num_left, None
        self._forget_recorded()

    # On disk

    @_one_thread_at_a_time
    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a file, from which `load` goes on as this one would, to the last bit.

        The file is there whole or not at all, and one that was there before is replaced. Recorded drafts (`activate_past_recording`)
        are not saved: load a cache, and what it has seen stands.

        Raises:
            ValueError: a pass was begun and has not reached the last layer, or the cache has no model.
            FileNotFoundError: there is no such folder.
        """
        self._require_model()
        if self._pass is not None or self._has_lost_states:
            raise ValueError(
                "Can't save in the middle of a pass: it has not been through all layers. Save after the model's forward pass. If it was "
                "interrupted, run it again first, model(**cache.prepare(...)), or save a copy that was made before."
            )
        model = self._model()
        if model is None:
            raise ValueError("Can't save a cache whose model is gone: the file has to say which model can go on from it.")
        tensors, states, has_previous_state = {}, {}, {}
        for group in self._groups:
            for kind, (of_layers, numbers) in zip(KINDS, [each.state() for each in group.states]):
                for index, named in zip(group.layers, of_layers):
                    states[f"layers.{index}.{kind}"] = numbers
                    tensors |= {f"layers.{index}.{kind}.{name}": tensor for name, tensor in named.items()}
        for index, layer in self._recurrent_layers.items():
            has_previous_state[str(index)] = _has_previous_state(layer)
            tensors |= {f"layers.{index}.recurrent.{name}": tensor for name, tensor in _named_states(layer).items()}
        if self._token_ids is not None:
            tensors["token_ids"] = self._token_ids
        numbers = self._arguments | {"batch_size": self._batch_size, "num_seen": self._num_seen, "base": self._base}
        numbers |= {"unseen_token_ids": self.unseen_token_ids, "states": states, "has_previous_state": has_previous_state}
        Saved(tensors, numbers | {"model": _identity(model)}).write(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: torch.nn.Module,
        window_length: int | None = None,
        num_sink_tokens: int | None = None,
        static: bool | None = None,
        quantized: dict | None = None,
        offloaded: bool | None = None,
    ) -> "SinkCache":
        """The cache that `save` has written to a file, on the device of the model. Nothing in the file is executed.

        Args:
            model: the one it was made for: same weights, settings and dtype.
            window_length, num_sink_tokens, static, quantized, offloaded: what you count on; else they are those in the file.

        Raises:
            ValueError: the file was cut off or changed, or it holds a cache for another model or dtype, or of another window or kind. Both
                sides are named.
            ImportError: what quantizes is not installed.
        """
        saved = Saved.read(path)
        expected = {"window_length": window_length, "num_sink_tokens": num_sink_tokens, "static": static, "offloaded": offloaded}
        expected["quantized"] = None if quantized is None else vars(Quantization.of(quantized))
        saved.check_made_for(model, expected)
        cache = cls.from_model(model, **{name: saved.number(name) for name in expected})
        cache._restore(saved)
        return cache

    @torch.inference_mode(False)
    def _restore(self, saved: "Saved") -> None:
        batch_size, num_seen, base = saved.number("batch_size"), saved.number("num_seen"), saved.number("base")
        if not (
            isinstance(batch_size, int)
            and (batch_size > 0 or batch_size == -1)
            and _are_counts(num_seen, batch_size)
            and _are_counts(base, batch_size)
            and len(num_seen) == len(base)
        ):
            raise saved.refusal(f"{batch_size} rows that have seen {num_seen!r:.50} tokens, counted from {base!r:.50}, can't be")
        for group in self._groups if batch_size != -1 else ():
            group.allocate(batch_size, self._mask_dtype(group), self.is_static, saved)
        for index, layer in self._recurrent_layers.items():
            saved.restore_recurrent(index, layer, batch_size, self._bound_as[1])
        if "token_ids" in saved.tensors:
            ids = saved.take("token_ids", (batch_size, self.window_length), None)
            self._token_ids = ids.to(self._bound_as[1], copy=True)
        unseen = saved.number("unseen_token_ids")
        if unseen is not None and not (
            isinstance(unseen, list) and len(unseen) == batch_size and _are_counts(unseen, batch_size)
        ):
            raise saved.refusal(f"{unseen!r:.50} can't be the last tokens of {batch_size} rows")
        saved.check_all_was_taken()
        self._batch_size, self._num_seen, self._base, self.unseen_token_ids = batch_size, num_seen, base, unseen
        self.layers_reached = set(self._traits.noted_layers)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "A SinkCache can't be pickled: it belongs to a model. Use cache.save(path) and SinkCache.load(path, model), or "
            "copy.deepcopy(cache) in one process."
        )

    @_one_thread_at_a_time
    def __deepcopy__(self, memo) -> "SinkCache":
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy({name: each for name, each in vars(self).items() if name not in USERS}, memo))
        return copied

    def _forget_recorded(self) -> None:
        self._num_recorded, self._token_log = 0, []
        for states in self._states:
            states.log = []


def _check_mode(model: torch.nn.Module) -> None:
    if model.training and model.is_gradient_checkpointing:
        raise ValueError(
            "The model is in training mode with gradient checkpointing, where its layers pass by the cache. Call model.eval() first "
            "(or model.gradient_checkpointing_disable())."
        )
    device = _input_device(model).type
    if _is_autocast_enabled(device):
        raise ValueError(
            "SinkCache can't be used under autocast: a model then computes its keys in one dtype and its values in another. Leave "
            f"autocast, with torch.autocast({device!r}, enabled=False), or put the model into one dtype, model.to(dtype)."
        )


def _check_numbers(window_length, num_sink_tokens) -> None:
    for name, value in (("window_length", window_length), ("num_sink_tokens", num_sink_tokens)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be an int, got {value!r} ({type(value).__name__}).")
    if window_length < 1:
        raise ValueError(f"window_length must be at least 1, got {window_length}: no token could attend even to itself.")
    if not 0 <= num_sink_tokens < window_length:
        raise ValueError(
            f"num_sink_tokens must be at least 0 and less than window_length={window_length}, got {num_sink_tokens}: the window "
            "holds the sinks and at least the token being processed."
        )


def count_tokens(attention_mask: torch.Tensor) -> list[int]:
    """The tokens of each row of a left-padded mask `[batch, length]`.

    Raises:
        ValueError: it is no such mask.
    """
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, length], got shape {tuple(attention_mask.shape)}.")
    is_token = attention_mask.bool()
    rows = (is_token[:, :-1] & ~is_token[:, 1:]).any(dim=1)  # padding after a token
    if bool(rows.any()):
        row = int(rows.nonzero()[0])
        raise ValueError(
            f"attention_mask of row {row} has padding on the right or a hole: tokens after it would be numbered wrongly. Pad on the "
            'left, tokenizer(..., padding=True, padding_side="left").'
        )
    return is_token.sum(dim=1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# On disk
# ---------------------------------------------------------------------------------------------------------------------


KINDS = ("keys", "values")
SAVED_FORMAT = 1
# Where a file has its checksum: first in its metadata, whatever the format. It is of the whole file with zeros in this place.
BEFORE_CHECKSUM, NO_CHECKSUM = b'"sink_cache":"', b"0" * 64
# What a config says that does not change what a model computes, or that is told otherwise.
NOT_SETTINGS = frozenset(
    "dtype torch_dtype transformers_version attn_implementation use_cache output_attentions output_hidden_states return_dict "
    "bos_token_id eos_token_id pad_token_id".split()
)
NUM_WEIGHTS_LOOKED_AT = 64  # of each parameter


@dataclass
class Saved:
    """A cache on disk: a safetensors file with its tensors and, in the metadata, its numbers as JSON.

    The checksum tells accidents from what was written, not a forger from its author: but a forged file can't do more than put wrong
    numbers into keys and values. Nothing of it is executed, and no more memory is asked for than a few times its size.
    """

    tensors: dict[str, torch.Tensor]
    numbers: dict
    path: str | os.PathLike = ""

    def write(self, path: str | os.PathLike) -> None:
        """In a file beside it first, so that there is never half of one under this name."""
        beside = Path(f"{os.fspath(path)}.{os.getpid()}-{threading.get_ident()}.tmp")
        if not beside.parent.is_dir():
            raise FileNotFoundError(f"Can't save to {os.fspath(path)}: there is no folder {beside.parent}. Make it first.")
        numbers = json.dumps({"format": SAVED_FORMAT} | self.numbers)
        try:
            save_file(self.tensors, beside, metadata={"sink_cache": NO_CHECKSUM.decode() + numbers})
            with open(beside, "r+b") as file:
                _, checksum, place = _checksums(file)
                file.seek(place)
                file.write(checksum)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Saved":
        saved = cls({}, {}, path)
        with open(path, "rb") as file:
            written, checksum, _ = _checksums(file)
        if written is None:
            raise saved.refusal("it has no checksum, so SinkCache.save has not written it, or it was cut off in its first bytes")
        if written != checksum:
            sides = f"its checksum is {written[:16]!r}..., and that of its content {checksum[:16]!r}..."
            raise saved.refusal(f"it was cut off or changed since it was written: {sides}")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                saved.numbers = json.loads(file.metadata()["sink_cache"][len(NO_CHECKSUM) :])
                saved.tensors = {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:
            raise saved.refusal(f"SinkCache.save has not written it ({type(error).__name__}: {error})") from error
        if saved.number("format") != SAVED_FORMAT:
            raise saved.refusal(
                f"it has format {saved.number('format')}, and this code reads format {SAVED_FORMAT}. Update sink_cache"
            )
        return saved

    def number(self, *names: str):
        """What stands under this name in the numbers."""
        value = self.numbers
        for name in names:
            if not isinstance(value, dict) or name not in value:
                raise self.refusal(f"it does not say {'.'.join(names)}")
            value = value[name]
        return value

    def num_slots(self, layer: str, name: str) -> int:
        tensor = self.tensors.get(f"{layer}.{name}")
        return 0 if tensor is None or tensor.ndim < 3 else tensor.shape[2]

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        """A tensor that must have this shape and dtype (None: any whole numbers)."""
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise self.refusal(f"it has no {name}, which this model needs")
        is_right = not tensor.dtype.is_floating_point if dtype is None else tensor.dtype == dtype
        if tensor.shape != shape or not is_right:
            raise self.refusal(
                f"{name} is {tensor.dtype} {list(tensor.shape)} in the file, and {dtype or 'of whole numbers'} {list(shape)} here"
            )
        return tensor

    def take_all(self, layers: list[str], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        return [self.take(f"{layer}.{name}", shape, dtype) for layer in layers]

    def restore_recurrent(self, index: int, layer, batch_size: int, device: torch.device) -> None:
        """The recurrent states of a layer, whose shapes only the model knows."""
        prefix = f"layers.{index}.recurrent."
        expected = {f"{prefix}{kind}.{key}" for kind in ("conv_states", "recurrent_states") for key in range(_num_states(layer))}
        states = {name.removeprefix(prefix): self.tensors.pop(name) for name in [*self.tensors] if name in expected}
        flags = self.number("has_previous_state", str(index))
        if not isinstance(flags, list) or len(flags) != _num_states(layer) or not all(isinstance(flag, bool) for flag in flags):
            raise self.refusal(f"layer {index} has {flags!r:.50} states in the file, and {_num_states(layer)} in this model")
        for name, state in states.items():
            if state.shape[:1] != (batch_size,):
                raise self.refusal(f"{prefix}{name} is {list(state.shape)} in the file, and has {batch_size} rows here")
        _restore_recurrent(layer, {name: state.to(device) for name, state in states.items()}, flags)

    def check_all_was_taken(self) -> None:
        if self.tensors:
            raise self.refusal(f"it has {min(self.tensors)}, and this model has nothing of that kind")

    def check_made_for(self, model: torch.nn.Module, expected: dict) -> None:
        for name, value in expected.items():
            if value is not None and value != self.number(name):
                raise self.refusal(f"{name} is {self.number(name)} in the file, and {value} was asked for")
        here, there = _identity(model), self.number("model")
        settings = self.number("model", "settings")
        for name in ("dtype", *sorted(here["settings"].keys() & (settings if isinstance(settings, dict) else {}))):
            sides = (there.get("dtype"), here["dtype"]) if name == "dtype" else (settings[name], here["settings"][name])
            if sides[0] != sides[1]:
                raise self.refusal(
                    f"it was made for another model: {name} is {sides[0]!r:.80} in the file, and {sides[1]!r:.80} here"
                )
        if here["weights"] != there.get("weights"):
            sides = f"their checksum is {there.get('weights')!r:.18}... in the file, and {here['weights'][:16]!r}... here"
            raise self.refusal(f"it was made for a model with other weights: {sides}")

    def refusal(self, reason: str) -> ValueError:
        return ValueError(f"Can't load {os.fspath(self.path)!r} as a SinkCache: {reason}.")


def _checksums(file) -> tuple[str | None, bytes | str, int]:
    """The checksum that stands in a file (None if there is no place for it), that of its content, and the place."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), size))  # not more than there is, whatever it says
    place = head.find(BEFORE_CHECKSUM)
    if place < 0:
        return None, "", 0
    place += len(BEFORE_CHECKSUM)
    end = place + len(NO_CHECKSUM)
    checksum = hashlib.sha256(head[:place] + NO_CHECKSUM + head[end:])
    while chunk := file.read(2**20):
        checksum.update(chunk)
    return head[place:end], checksum.hexdigest().encode(), place


def _identity(model: torch.nn.Module) -> dict:
    """What tells a model from others: its dtype, the settings of its config, and a checksum over a few numbers of each parameter.

    It does not see what is not in there: a change to single numbers between those that are looked at, parameters that are elsewhere
    (offloaded), hooks, and code. Rotations and shapes are compared with those of the layers.
    """
    settings = model.config.get_text_config(decoder=True).to_dict()
    settings = {
        name: value
        for name, value in settings.items()
        if isinstance(value, bool | int | float | str) and name not in NOT_SETTINGS and not name.startswith("_")
    }
    checksum = hashlib.sha256()
    for parameter in model.parameters():
        checksum.update(repr(tuple(parameter.shape)).encode())
        if not parameter.is_meta:
            numbers = parameter.detach().flatten()
            numbers = numbers[:: max(1, len(numbers) // NUM_WEIGHTS_LOOKED_AT)][:NUM_WEIGHTS_LOOKED_AT]
            checksum.update(repr(numbers.float().tolist()).encode())
    return {"dtype": str(model.dtype), "settings": settings, "weights": checksum.hexdigest()}


def _are_counts(numbers, num_rows: int) -> bool:
    """Whether this is a list of whole numbers from 0 on, one for each row or a single one."""
    return (
        isinstance(numbers, list)
        and len(numbers) in (1, num_rows)
        and all(type(number) is int and 0 <= number < 2**62 for number in numbers)
    )


# ---- names of the new house (scaffold, not to be kept)

CACHE_CLASS = SinkCache
SinkCache.traits = property(lambda self: self._traits)
SinkCache.windows = property(lambda self: set(self._windows))
SinkCache.num_recorded = property(lambda self: self._num_recorded)
SinkCache.num_tokens_after_pass = property(lambda self: max(self._pass.num_seen_after))
SinkCache.stop_recording = lambda self: self._set_recording(False)
SinkCache.num_padding_columns = property(
    lambda self: self._num_other_columns, lambda self, value: setattr(self, "_num_other_columns", value)
)
_prepare = SinkCache.prepare


@functools.wraps(_prepare)
def _prepare_and_forget(self, *args, **kwargs):
    inputs = _prepare(self, *args, **kwargs)
    self.unseen_token_ids = None
    return inputs


SinkCache.prepare = _prepare_and_forget
check_is_decoder = _check_is_decoder
shallow_copy, uncompiled_copy, input_device, unwrapped, stop_counting = _shallow_copy, _as_written, _input_device, _unwrapped, _stop_counting
