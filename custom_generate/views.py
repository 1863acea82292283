"""A view of a model for a `SinkCache`, where the model's own attention takes no mask for each query.

A model may be loaded with flash attention, flex attention, a kernel from the Hub or any function that was registered. In its
view, attention is sdpa, or eager where the model has no sdpa. Nothing is left on the model, and it keeps its own attention.
"""

import functools
import types
import weakref

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .releases import shallow_copy, unwrapped

SUPPORTED_ATTENTION = ("eager", "sdpa")
# In place of each module of a model, a shallow copy: one for each, so that a module that is used twice is one in the view too.
_copies: "weakref.WeakKeyDictionary[torch.nn.Module, torch.nn.Module]" = weakref.WeakKeyDictionary()
# Likewise the configs of each model, with their copies, by their identity.
_configs: "weakref.WeakKeyDictionary[torch.nn.Module, dict[int, tuple]]" = weakref.WeakKeyDictionary()


def check_attention(config: PretrainedConfig) -> None:
    """Refuse a model that is called with masks that its attention does not take. `config`: that of the text."""
    if config._attn_implementation not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"SinkCache makes masks for eager and sdpa attention, and this model uses {config._attn_implementation}. Call a view "
            "of it in its place, model = SinkCache.model_for(model), which shares its weights; or load it with "
            'attn_implementation="sdpa".'
        )


def viewed(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, of a model or of a view."""
    return vars(model).get("viewed_model", model)


def view_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself where its attention takes a mask for each query, else its view, as the model is now.

    Raises:
        ValueError: its attention can't be chosen any more, because its layers are of a class for each implementation.
    """
    model = viewed(model)
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation in SUPPORTED_ATTENTION:
        return model
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"SinkCache makes masks for eager and sdpa attention, and {type(model).__name__} was loaded with "
            f'{config._attn_implementation}, which is fixed then. Load it with from_pretrained(..., attn_implementation="sdpa").'
        )
    has_sdpa = all(part._supports_sdpa for part in model.modules() if isinstance(part, PreTrainedModel))
    view = shallow_copy(_copied(model, "sdpa" if has_sdpa else "eager", _configs.setdefault(model, {})))
    vars(view)["viewed_model"] = model  # not in `_copies`: it would keep the model for good
    return view


def model_for(model: torch.nn.Module) -> torch.nn.Module:
    """What to call in a loop of one's own. The model itself, if its attention takes masks (eager, sdpa); else a view of it that
    attends with sdpa, shares all weights, and leaves the model as it is: `model = SinkCache.model_for(model)`.

    Raises:
        ValueError: the attention of this model can't be chosen once it is loaded.
    """
    inner = unwrapped(model)
    view = view_of(inner)
    return model if view is inner else view


def _copied(module: torch.nn.Module, attention: str, configs: dict) -> torch.nn.Module:
    """The copy of a module, brought up to date. It shares everything but its submodules and configs, which are copies, too."""
    copied = _copies.setdefault(module, shallow_copy(module))

    def in_copy(value):
        """Methods that hooks keep, and have put in the place of others, are those of the copy."""
        if isinstance(value, PretrainedConfig):
            return _copied_config(value, attention, configs)
        value = getattr(value, "_torchdynamo_orig_callable", value)
        if isinstance(value, types.MethodType) and value.__self__ is module:
            return types.MethodType(value.__func__, copied)
        if isinstance(value, functools.partial) and value.args and value.args[0] is module:
            rebound = functools.partial(value.func, copied, *value.args[1:], **value.keywords)
            vars(rebound).update({name: in_copy(each) for name, each in vars(value).items()})  # its signature
            return rebound
        return value

    values = {name: in_copy(value) for name, value in vars(module).items()}
    for name in {"_attn_implementation", "attn_implementation"} & values.keys():  # some layers remember it
        values[name] = values[name] if values[name] in SUPPORTED_ATTENTION else attention
    parts = module._modules.items()
    values["_modules"] = {name: None if part is None else _copied(part, attention, configs) for name, part in parts}
    values["_compiled_call_impl"] = None  # compiled for the model itself
    vars(copied).update(values)
    return copied


def _copied_config(config: PretrainedConfig, attention: str, configs: dict) -> PretrainedConfig:
    """Modules that share a config do so in the view."""
    _, copied = configs.setdefault(id(config), (config, shallow_copy(config)))
    parts = {name: value for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    values = vars(config) | {name: _copied_config(part, attention, configs) for name, part in parts.items()}
    if config._attn_implementation not in (None, *SUPPORTED_ATTENTION):
        values["_attn_implementation_internal"] = attention
    vars(copied).update(values)
    return copied
