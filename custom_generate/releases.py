"""What differs between releases of transformers and torch, and what wrappers hold. The oldest release is transformers 4.57.

A release is recognised by what it has, not by its number, so that the next release has a chance to just work. What transformers
passes to methods of a cache in one form or another (`update`, `get_mask_sizes`, `crop`) is taken in either form by the method.
"""

import inspect

import torch
import transformers
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel, cache_utils


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


if release(transformers.__version__) < (4, 57) or release(torch.__version__) < (2, 2):
    raise ImportError(
        "sink_cache needs transformers 4.57 and torch 2.2, or newer: pip install -U transformers torch. With transformers 4.52 "
        'to 4.56, pass revision="v1" to `generate`, which loads the last version that they can use.'
    )

# Models ask the cache where the queries of a pass stand among its keys (since 5.16). Before, they take the number of tokens seen,
# which hides all keys behind a native window.
MODELS_ASK_FOR_QUERY_OFFSET = hasattr(Cache, "get_query_offset")
# The names of the argument that takes a cache; the first one is the name in this release (`cache` since 5.24).
CACHE_NAMES = ("cache", "past_key_values")
if "cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    CACHE_NAMES = CACHE_NAMES[::-1]
CACHE_NAME = CACHE_NAMES[0]
OUT_OF_MEMORY = MemoryError, torch.cuda.OutOfMemoryError  # since torch 2.5 also torch.OutOfMemoryError


def cache_name(accepted) -> str:
    """The name under which a model with these arguments takes its cache: code from the Hub keeps the name it was written with."""
    return next((name for name in CACHE_NAMES if name in accepted), CACHE_NAME)


def layer_class(name: str) -> type:
    """A class of cache layers; an empty class, of which nothing is an instance, where the release does not have it."""
    return getattr(cache_utils, name, None) or type(name, (), {})


IndexedLayer = layer_class("DynamicIndexedLayer")
LinearAttentionLayer = layer_class("LinearAttentionLayer")
DummyLayer = layer_class("DummyLayer")
FULL_ATTENTION = layer_class("DynamicLayer"), layer_class("LinearAttentionAndFullAttentionLayer")
SLIDING_ATTENTION = layer_class("DynamicSlidingWindowLayer"), layer_class("LinearAttentionAndSlidingWindowAttentionLayer")


class NotesRecurrentLayers:
    """A cache that records in `layers_reached` the index of each recurrent layer whose state was read or written in this pass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.layers_reached: set[int] = set()

    def get_conv_state(self, layer_idx, *args, **kwargs):
        self.layers_reached.add(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states, layer_idx, *args, **kwargs):
        self.layers_reached.add(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx, *args, **kwargs):
        self.layers_reached.add(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states, layer_idx, *args, **kwargs):
        self.layers_reached.add(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def has_previous_state(self, layer_idx=None, *args, **kwargs):
        self.layers_reached |= set() if layer_idx is None else {layer_idx}
        return super().has_previous_state(layer_idx, *args, **kwargs)


class NotingCache(NotesRecurrentLayers, DynamicCache):
    """One of transformers' own caches that records which recurrent layers a pass has reached."""


def named_states(layer) -> dict[str, torch.Tensor]:
    """The recurrent and convolutional states of a layer, by names that say where they belong: `conv_states.0`."""
    kinds = {name: getattr(layer, name) for name in ("conv_states", "recurrent_states")}
    kinds = {name: states if isinstance(states, dict) else {0: states} for name, states in kinds.items()}
    return {f"{name}.{key}": state for name, states in kinds.items() for key, state in states.items() if state is not None}


def has_previous_state(layer) -> list[bool]:
    """For each convolutional state of a layer (several since 5.14), whether any token has been through it."""
    flags = layer.has_previous_state
    return list(flags.values()) if isinstance(flags, dict) else [flags]


def restore_recurrent(layer, states: dict[str, torch.Tensor], flags: list[bool]) -> None:
    """Put named states, and what `has_previous_state` said of them, into a new layer of transformers."""
    for name, state in states.items():
        kind, key = name.split(".")
        which = {"state_idx": int(key)} if isinstance(getattr(layer, kind), dict) else {}
        layer.lazy_initialization(**{kind: state}, **which)
        named_states(layer)[name].copy_(state)
    layer.has_previous_state = dict(enumerate(flags)) if isinstance(layer.has_previous_state, dict) else flags[0]


def makes_masks_itself(model: torch.nn.Module) -> bool:
    """Whether this is a model of the old kind (Bloom, DBRX and others until 5.1), which does not leave masks to transformers: it
    takes one mask for all layers, with floats that are added to the scores, and a mask of its own covers the whole text."""
    return any(hasattr(module, "_update_causal_mask") for module in model.modules())


def stop_counting(view: torch.nn.Module) -> None:
    """Before 5.4, `generate` computes from the lengths of `input_ids` and of the text seen which tokens are new, and fails if the
    prompt is the shorter one. Nothing reads the positions that it makes of them, so a single one will do."""
    if hasattr(view, "_get_initial_cache_position"):

        def get_initial_cache_position(length, device, model_kwargs):  # in place: 5.0 to 5.2 drop what is returned
            model_kwargs["cache_position"] = torch.ones(1, dtype=torch.long, device=device)
            return model_kwargs

        vars(view)["_get_initial_cache_position"] = get_initial_cache_position


def is_left_to_model(name: str, value, own, use_model_defaults: bool | None) -> bool:
    """Whether the generation config of a call, which has this value, leaves an option to that of the model, `own`. Before 5.0 it
    does with each default value; or, if `own` is older than 4.50 or `use_model_defaults` says so, with special tokens alone."""
    defaults = vars(GenerationConfig())
    if defaults["num_beams"] is None or name not in defaults:
        return value is None
    if use_model_defaults is None:
        use_model_defaults = release(own.transformers_version) >= (4, 50)
    return value == defaults[name] and (use_model_defaults or name.endswith("_token_id"))


def input_device(model: torch.nn.Module) -> torch.device:
    """Where the model takes its inputs; if its first weights are offloaded, where they are brought to for each pass."""
    if model.device.type != "meta":
        return model.device
    devices = [device for device in getattr(model, "hf_device_map", {}).values() if device not in ("cpu", "disk")]
    return torch.device(devices[0] if devices else "cpu")


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model of transformers inside of what torch.compile, PEFT or DataParallel puts around it.

    Raises:
        ValueError: this is no model, the wrapper adds virtual tokens (prompt learning), or the model is no decoder.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"Pass a loaded model, as from_pretrained returns it, not {model!r:.50} ({type(model).__name__}).")
    wrapper = model
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod") or hasattr(model, "module"):
            model = getattr(model, "_orig_mod", None) or model.module
        else:
            break
    # PEFT replaces this method of the model, so that it leads to the wrapper.
    method = getattr(model, "prepare_inputs_for_generation", None)
    for each in (wrapper, getattr(method, "__self__", model)):
        peft_config = getattr(each, "active_peft_config", None)
        if getattr(peft_config, "is_prompt_learning", False):
            raise ValueError(
                f"SinkCache can't serve {type(each).__name__} with {peft_config.peft_type.value}: its virtual tokens would pass "
                "by the cache, which could neither count nor hold them. Adapters that change weights (LoRA) work."
            )
    if model.config.is_encoder_decoder:
        raise ValueError(f"SinkCache serves decoder-only models, and {type(model).__name__} is an encoder-decoder model.")
    return model


def is_autocast_enabled(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def shallow_copy(model: torch.nn.Module) -> torch.nn.Module:
    """As `copy.copy`, also for a class that forbids it (FSDP2), and with what model.compile() has made."""
    view = object.__new__(type(model))
    vars(view).update(vars(model))
    return view


def uncompiled_copy(model: torch.nn.Module) -> torch.nn.Module:
    """The model without torch.compile: prompt chunks have many shapes, and compiling each costs more than it saves."""
    view = shallow_copy(model)
    vars(view)["_compiled_call_impl"] = None  # model.compile()
    forward = getattr(model.forward, "_torchdynamo_orig_callable", None)  # model.forward = torch.compile(model.forward)
    if forward is not None:
        view.forward = forward
    return view
