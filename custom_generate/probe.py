"""Asks a model how it treats positions: what the cache has to know of it, or why the cache can't serve it."""

import contextlib
import copy
import functools
import inspect
import weakref
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from .releases import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    DummyLayer,
    IndexedLayer,
    LinearAttentionLayer,
    NotingCache,
    cache_name,
    input_device,
    is_autocast_enabled,
    makes_masks_itself,
    named_states,
    own_cache,
    own_layers,
    uncompiled_copy,
)
from .rotation import Rotation, candidate_rotations


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
        rebase_at: the position at which held keys are turned back.
        max_positions: positions from here on are not computed as those below. None: there is no such limit.
        is_ordered: scores depend on the order in which keys are handed out (ALiBi), and keys do not depend on positions.
        recurrent_states: those of each layer that has any, by their names: recurrent or convolutional ones, with no rows.
        noted_layers: those of them that say when a pass has reached them (`NotesRecurrentLayers`).
        is_chunked: layers attend within chunks of the text (Llama 4), and the window fits into one.
        is_indexed: layers choose what they attend to (DeepSeek Sparse Attention), and the window is not more than they may choose.
        layer_types: one name a layer, where the model takes one mask for each type of layer. Else None.
        has_old_masks: `makes_masks_itself`.
    """

    layers: tuple[LayerTraits | None, ...]
    rebase_at: int
    max_positions: int | None
    is_ordered: bool
    recurrent_states: dict[int, dict[str, torch.Tensor]]
    noted_layers: frozenset[int]
    is_chunked: bool
    is_indexed: bool
    layer_types: tuple[str, ...] | None
    has_old_masks: bool

    @functools.cached_property
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
        known[key] = _find_model_traits(uncompiled_copy(model), window_length)
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
        rebase_at=probe.rebase_at,
        max_positions=probe.max_positions,
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
        check_is_decoder(model)
        self.device = input_device(model)
        self.config = model.config.get_text_config(decoder=True)
        self.has_old_masks = makes_masks_itself(model)
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
        self.max_positions = find_max_positions(model, self.config) if "position_ids" in self.accepted else None
        if self.max_positions is not None and 2 * window_length > self.max_positions:
            raise ValueError(
                f"window_length={window_length} is too long for {self.name}: what it computes of positions changes or ends at position "
                f"{self.max_positions}, and the cache needs positions up to twice the window. Use a window_length of at most "
                f"{self.max_positions // 2}."
            )
        rebase_at = max(2 * window_length, MIN_TURN_IN_16_BITS if model.dtype.itemsize == 2 else 0)
        self.rebase_at = min(rebase_at, self.max_positions or rebase_at)
        with self._looking():
            layers = own_layers(self.config)
        self.native_windows = [self._native_window(index, layer) for index, layer in enumerate(layers)]
        self.is_recurrent = any(isinstance(layer, LinearAttentionLayer) for layer in layers)
        self.is_indexed = any(isinstance(layer, IndexedLayer) for layer in layers)
        # Indexers take one mask for all layers, and none by type, before 5.14.
        takes_one_mask = self.is_indexed and len(set(self.layer_types or ())) <= 1
        self.takes_masks_by_type = not (self.has_old_masks or takes_one_mask)

        self.positions = torch.tensor(sorted({0, 1, window_length, 2 * window_length - 3, self.rebase_at - 3} - {-1}))
        with self._looking():
            embeddings = model.get_input_embeddings()
            # ZeRO-3 leaves a weight of no rows.
            vocab_size = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
            a, b = vocab_size // 3, 2 * vocab_size // 3
            self.texts = torch.tensor([[a, a, b], [b, b, a], [a, a, (a + b) // 2]])
            # Keys are compared, and must not be cut to a native window: a cache of full attention, unless layers need others.
            needs_own = self.is_recurrent or self.is_indexed or any(isinstance(layer, DummyLayer) for layer in layers)
            self.cache = own_cache(self.config) if needs_own else DynamicCache()
            # Without one, they take the position of a query for its slot, before 5.17.
            mask = torch.full((1, 1, 3, 3), torch.finfo(model.dtype).min, dtype=model.dtype).triu(1) if takes_one_mask else None
            self.logits = self._ask(self.cache, slice(0, 3), mask)

    def layers(self) -> tuple[LayerTraits | None, ...]:
        """What there is to know of each layer: how its keys move, and its shapes."""
        cached = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in self.cache.layers]
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
            index: {name: state[:0].clone() for name, state in named_states(layer).items()} for index, layer in layers.items()
        }

    def check_that_no_token_sees_later_ones(self) -> None:
        """The first and the last text begin alike."""
        layers = [layer for layer, window in zip(self.cache.layers, self.native_windows) if window != NO_KEYS]
        for states in (layers[-1].keys, layers[-1].values):
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
        cache = own_cache(self.config, NotingCache)
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
            cache_name(self.accepted): cache,
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


def check_is_decoder(model: torch.nn.Module) -> None:
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


def find_max_positions(model: torch.nn.Module, config) -> int | None:
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


def check_mode(model: torch.nn.Module) -> None:
    if model.training and model.is_gradient_checkpointing:
        raise ValueError(
            "The model is in training mode with gradient checkpointing, where its layers pass by the cache. Call model.eval() first "
            "(or model.gradient_checkpointing_disable())."
        )
    device = input_device(model).type
    if is_autocast_enabled(device):
        raise ValueError(
            "SinkCache can't be used under autocast: a model then computes its keys in one dtype and its values in another. Leave "
            f"autocast, with torch.autocast({device!r}, enabled=False), or put the model into one dtype, model.to(dtype)."
        )
