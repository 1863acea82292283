"""A view of a model for a `SinkCache`, where the model's own attention takes no mask for each query.

A model may be loaded with flash attention, flex attention, a kernel from the Hub or any function that was registered. In its
view, attention is sdpa, or eager where the model has no sdpa. Nothing is left on the model, and it keeps its own attention.
"""

import copy
import functools
import types

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .releases import shallow_copy, unwrapped

SUPPORTED_ATTENTION = ("eager", "sdpa")


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
    view = copied(model, "sdpa" if has_sdpa else "eager")
    vars(view)["viewed_model"] = model
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


def copied(model: torch.nn.Module, attention: str | None = None) -> torch.nn.Module:
    """A copy of a model. It shares everything but its modules and configs: each of them has one copy, wherever it stands.

    Args:
        attention: takes the place of attention that takes no mask for each query. None: it stays.
    """
    copies = {id(module): shallow_copy(module) for module in model.modules()}

    def in_copy(value):
        """Methods that hooks keep, and have put in the place of others, are those of the copy."""
        if isinstance(value, PretrainedConfig):
            if id(value) not in copies:
                copied = copies[id(value)] = shallow_copy(value)
                vars(copied).update({name: in_copy(part) for name, part in vars(value).items()})
                if attention is not None and value._attn_implementation not in (None, *SUPPORTED_ATTENTION):
                    vars(copied)["_attn_implementation_internal"] = attention
            return copies[id(value)]
        value = getattr(value, "_torchdynamo_orig_callable", value)
        if isinstance(value, types.MethodType) and id(value.__self__) in copies:
            return types.MethodType(value.__func__, copies[id(value.__self__)])
        if isinstance(value, functools.partial) and value.args and id(value.args[0]) in copies:
            rebound = functools.partial(value.func, copies[id(value.args[0])], *value.args[1:], **value.keywords)
            vars(rebound).update({name: in_copy(each) for name, each in vars(value).items()})  # its signature
            return rebound
        return value

    for module in model.modules():
        values = {name: in_copy(value) for name, value in vars(module).items()}
        for name in {"_attn_implementation", "attn_implementation"} & values.keys():  # some layers remember it
            values[name] = values[name] if values[name] in SUPPORTED_ATTENTION else attention or values[name]
        values["_modules"] = {name: copies.get(id(part)) for name, part in module._modules.items()}
        values |= {name: copy.copy(hooks) for name, hooks in values.items() if name.endswith("_hooks")}  # more may come to each
        values["_compiled_call_impl"] = None  # compiled for the model itself
        vars(copies[id(module)]).update(values)
    return copies[id(model)]
