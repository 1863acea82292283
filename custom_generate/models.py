"""What the cache has to know of a model, and as much of it as can be read off the model without running it."""

import functools
from dataclasses import dataclass

import torch
from transformers.utils import logging

from .releases import input_device, is_autocast_enabled
from .rotation import Rotation
from .window import Window

logger = logging.get_logger(__name__)

# The names under which models with recurrent layers look for the masks of layers that see all, of layers with a native window,
# and of layers that have to know only what is padding.
FULL_MASKS, SLIDING_MASKS = ("full_attention", "hybrid"), ("sliding_attention", "hybrid_sliding")
PADDING_MASKS = "linear_attention", "conv"


@dataclass(frozen=True)
class LayerTraits:
    """What the cache has to know of one attention layer. Pairs are for what the layer caches: keys and values.

    (Most models rotate keys. Models with latent attention cache a latent as their keys, and the rotated part as their values.)

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
        rebase_at: when positions reach this, all are lowered and keys re-rotated once.
        max_positions: first position that the model can't encode exactly (None: unlimited).
        is_ordered: scores depend on the order in which keys are handed out (ALiBi), and keys do not depend on positions.
        recurrent_states: the recurrent and convolutional states of each layer that has any, by their names, with no rows.
        noted_layers: layers with such states that a pass can be seen to reach (`NotesRecurrentLayers`).
        splits_exactly: logits do not depend on how a text is split into passes. If not, passes of several tokens agree among
            each other, but not with passes of a single token.
        is_chunked: layers attend within chunks of the text (Llama 4), and the window fits into one.
        is_indexed: layers choose what they attend to (DeepSeek Sparse Attention), and may choose a whole window.
        layer_types: one name a layer, where the model takes one mask for each type of layer. Else None.
        has_old_masks: `makes_masks_itself`.
    """

    layers: tuple[LayerTraits | None, ...]
    rebase_at: int
    max_positions: int | None
    is_ordered: bool
    recurrent_states: dict[int, dict[str, torch.Tensor]]
    noted_layers: frozenset[int]
    splits_exactly: bool
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


def frequency_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Where the model holds rotary frequencies, by name. One tensor may stand under two names: in use, and as the original."""
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name.endswith("inv_freq")}


def inverse_frequencies(model: torch.nn.Module, config) -> list[torch.Tensor]:
    """The tables of rotary frequencies that the model holds, each once, float32 on the CPU."""
    tables: list[torch.Tensor] = []
    for name, buffer in frequency_buffers(model).items():
        if "original" not in name:
            for table in buffer.float().cpu().reshape(-1, buffer.shape[-1] if buffer.ndim else 1):
                if not any(torch.equal(table, other) for other in tables):
                    tables.append(table)
    if not tables and getattr(config, "rotary_dim", None):  # GPT-J, CodeGen: they hold sines and cosines instead
        tables.append(10000.0 ** -(torch.arange(0, config.rotary_dim, 2) / config.rotary_dim))
    return tables


def put_back_frequencies(model: torch.nn.Module, frequencies: dict[str, torch.Tensor]) -> str | None:
    """Undo what a model has changed in `frequency_buffers`, of which copies are passed. Returns the name of a changed buffer."""
    now, changed = frequency_buffers(model), None
    for name, frequency in frequencies.items():
        if not torch.equal(now[name], frequency):
            module, _, changed = name.rpartition(".")
            setattr(model.get_submodule(module), changed, frequency)
    return changed


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
        if "longrope" in rope_types:
            limits += originals
    if parameters.get("llama_4_scaling_beta"):  # Ministral 3: queries are scaled from there on
        limits += originals
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4, likewise
        limits.append(config.floor_scale - 1)
    if not frequency_buffers(model):
        limits.append(getattr(config, "max_position_embeddings", None))  # tables of that length
    return min((limit for limit in limits if limit is not None), default=None)


def limits_time_steps(model: torch.nn.Module) -> bool:
    """Whether layers of the Mamba 2 kind limit their time steps, which transformers does in passes of several tokens only."""
    limits = [getattr(module, "time_step_limit", None) for module in model.modules()]
    return any(limit is not None and tuple(limit) != (0.0, float("inf")) for limit in limits)


def mask_dtype(config, takes_numbers: bool, dtype: torch.dtype) -> torch.dtype:
    """Bool where a mask says what is visible; else the mask is added to the scores (in old models, and indexers before 5.17)."""
    return torch.bool if config._attn_implementation == "sdpa" and not takes_numbers else dtype


def warn_of(model: torch.nn.Module, window_length: int, traits: ModelTraits, known: dict) -> None:
    """Say once for each model what its user should know. `known`: the traits found before."""
    name = type(model).__name__
    trained = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or window_length
    if window_length > trained and all(length <= trained for length, *_ in known):
        logger.warning(
            f"window_length={window_length} is longer than the {trained} positions that {name} was trained with "
            "(max_position_embeddings). What it writes once it sees more tokens than that may be nonsense."
        )
    if not traits.splits_exactly and not known:
        cause = " (transformers limits the time steps of recurrent layers in the former only)" if limits_time_steps(model) else ""
        logger.warning(
            f"{name} computes a pass of several tokens in another way than passes of single ones{cause}, so its logits depend "
            "on how a text is fed. SinkCache feeds it as transformers does: the prompt together, new tokens one by one."
        )


def dropout_of(model: torch.nn.Module) -> str | None:
    """A dropout at work in a model in training mode, as `name=probability`; None if there is none."""
    for name, module in model.named_modules():
        options = ["p"] if isinstance(module, torch.nn.Dropout) else [option for option in vars(module) if "drop" in option]
        for option in options if module.training else ():
            probability = getattr(module, option)
            if isinstance(probability, float) and probability > 0:
                return f"{name}.{option}={probability}"
    return None


def check_model(model: torch.nn.Module, traits: ModelTraits, windows: dict[int, Window], is_static: bool) -> None:
    """Refuse a model to which this kind of cache can't be bound. `windows`: of each layer with keys."""
    name = type(model).__name__
    if is_static and traits.is_ordered:
        raise ValueError(f"The static mode can't serve {name}, which depends on the order of the keys. Leave it out.")
    masks = {(traits.layer_types[index] if traits.layer_types else "", window) for index, window in windows.items()}
    if not traits.is_ordered and len(masks) > len({name for name, _ in masks}):
        shortest = min(window.length for window in windows.values())
        raise ValueError(
            f"SinkCache gives one mask to all layers of a type, and those of {name} differ in their windows. With "
            f"window_length={shortest - 1} or less they do not."
        )


def check_same(model: torch.nn.Module, bound: torch.nn.Module | None, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse another model than the model to which a cache is bound, or one that has changed since."""
    change = None
    if bound is not model:
        change = f"This cache was made for another model, and its keys mean nothing to this {type(model).__name__}"
    elif (dtype, device) != (model.dtype, model.device):
        change = f"The model is now in {model.dtype} on {model.device}, and this cache was made for it in {dtype} on {device}"
    if change is not None:
        raise ValueError(f"{change}. Make a new one with SinkCache.from_model(model, ...).")


def check_mode(model: torch.nn.Module) -> None:
    """Refuse a model in a mode in which it passes by the cache, or computes something else each time."""
    if model.training and model.is_gradient_checkpointing:
        raise ValueError(
            "The model is in training mode with gradient checkpointing, where its layers pass by the cache. Call model.eval() "
            "first (or model.gradient_checkpointing_disable())."
        )
    if model.training and (dropout := dropout_of(model)) is not None:
        raise ValueError(
            f"The model is in training mode with dropout ({dropout}): each pass gives other keys. Call model.eval() first."
        )
    device = input_device(model).type
    if is_autocast_enabled(device):
        raise ValueError(
            "SinkCache can't be used under autocast: a model then computes its keys in one dtype and its values in another. "
            f"Leave autocast, with torch.autocast({device!r}, enabled=False), or put the model into one dtype, model.to(dtype)."
        )
