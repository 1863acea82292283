"""What a model says of itself, without being run: frequencies, limits of its positions, the mode that it is in."""

import torch

from .releases import input_device, is_autocast_enabled


def inverse_frequencies(model: torch.nn.Module, config) -> list[torch.Tensor]:
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


def limits_time_steps(model: torch.nn.Module) -> bool:
    """Whether layers of the Mamba 2 kind limit their time steps, which transformers does in passes of several tokens only."""
    limits = [getattr(module, "time_step_limit", None) for module in model.modules()]
    return any(limit is not None and tuple(limit) != (0.0, float("inf")) for limit in limits)


def check_is_decoder(model: torch.nn.Module) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"SinkCache serves decoder-only models, and {type(model).__name__} is an encoder-decoder model.")


def dropout_of(model: torch.nn.Module) -> str | None:
    """A dropout that is at work in a model in training mode, as `name=probability`; None if there is none."""
    for name, module in model.named_modules():
        if module.training and isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name}.p={module.p}"
        for option, value in vars(module).items() if module.training else ():
            if "drop" in option and isinstance(value, float) and value > 0:
                return f"{name}.{option}={value}"
    return None


def check_mode(model: torch.nn.Module) -> None:
    """Refuse a model in a mode in which it passes by the cache, or computes something else each time."""
    if model.training and model.is_gradient_checkpointing:
        raise ValueError(
            "The model is in training mode with gradient checkpointing, where its layers pass by the cache. Call model.eval() first "
            "(or model.gradient_checkpointing_disable())."
        )
    if model.training and (dropout := dropout_of(model)) is not None:
        raise ValueError(
            f"The model is in training mode with dropout ({dropout}), where each pass computes something else, and no cache can keep what "
            "a text was computed to. Call model.eval() first."
        )
    device = input_device(model).type
    if is_autocast_enabled(device):
        raise ValueError(
            "SinkCache can't be used under autocast: a model then computes its keys in one dtype and its values in another. Leave "
            f"autocast, with torch.autocast({device!r}, enabled=False), or put the model into one dtype, model.to(dtype)."
        )
