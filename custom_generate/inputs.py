"""What a model is called with for a pass: positions, and masks in the form in which the model takes them."""

import inspect

import torch

from .models import FULL_MASKS, PADDING_MASKS, SLIDING_MASKS, ModelTraits, mask_dtype
from .plan import Pass, last_columns
from .releases import MODELS_ASK_FOR_QUERY_OFFSET, cache_name
from .stream import Stream


class ModelInputs:
    """The arguments of a model, made from the plans of a pass.

    Attributes:
        own_config: the model's own config (of its text).
        config: that of what is called, the model or its view (`view_of`). It says which form the masks have.
    """

    def __init__(self, model: torch.nn.Module, config, traits: ModelTraits, stream: Stream):
        self.own_config, self.config = model.config.get_text_config(decoder=True), config
        self.traits, self.stream = traits, stream
        self.accepted = frozenset(inspect.signature(model.forward).parameters)
        self.cache_name = cache_name(self.accepted)
        self.masked_layers = {}  # under each name of a mask, a layer that takes it (None: one mask for all layers)
        for index, layer in stream.layers.items():
            self.masked_layers.setdefault(traits.layer_types[index] if traits.layer_types else None, layer)

    def of_pass(self, tokens: torch.Tensor, name: str) -> dict:
        """Everything but the cache, for the open pass. `tokens` are ids or embeddings, `[batch, num_columns, ...]`."""
        current = self.stream.current
        if current.num_parts > 1:
            tokens = tokens.unflatten(1, (current.num_parts, -1)).flatten(0, 1)
        inputs = {name: tokens, "use_cache": True, "attention_mask": self._attention_mask(current, tokens.device)}
        if "position_ids" in self.accepted:
            inputs["position_ids"] = position_ids(current, tokens.device)
        if "cache_position" in self.accepted and (self.traits.is_chunked or self.stream.plans[0].is_in_tensors):
            inputs["cache_position"] = inputs["position_ids"][0]  # else the model makes it of numbers, constants for a graph
        return inputs

    def _attention_mask(self, current: Pass, device: torch.device):
        """None where the model itself makes the right mask: a plain causal one."""
        if self.traits.is_ordered:  # which keys are tokens: the model derives their order from this mask (ALiBi)
            num_held = [min(after, self.stream.ids.window.length) for after in current.num_after]
            return last_columns(num_held, max(num_held), device).long().expand(current.batch_size, -1)
        padding = None
        if min(current.num_new) < current.num_columns:
            padding = last_columns(current.num_new, current.num_columns, device).long().expand(current.batch_size, -1)
        is_causal = padding is None or not self.traits.is_recurrent
        for layer in self.masked_layers.values():
            is_causal = is_causal and layer.plan.is_causal
        if is_causal and self._model_makes_this_mask(current):
            return None
        num_rows, takes_numbers = current.batch_size * current.num_parts, self.traits.has_old_masks or self.traits.is_indexed
        masks = {}
        for name, layer in self.masked_layers.items():
            dtype = mask_dtype(self.config, takes_numbers, layer.rings[0].slots.dtype)
            masks[name] = layer.plan.mask(dtype).to(device).expand(num_rows, -1, -1, -1)
        if self.traits.is_recurrent:
            # Models with recurrent layers look for their masks under different names: give each mask under all of them.
            full = next((masks[name] for name in (None, *FULL_MASKS) if name in masks), None)
            sliding = next((masks[name] for name in SLIDING_MASKS if name in masks), None)
            masks |= dict.fromkeys(FULL_MASKS, full) | dict.fromkeys(SLIDING_MASKS, sliding)
            return masks | dict.fromkeys(PADDING_MASKS, padding)
        return masks if self.traits.layer_types else masks[None]

    def _model_makes_this_mask(self, current: Pass) -> bool:
        """Whether the mask that the model makes by itself is right, where each token sees all that is handed out before it."""
        if self.traits.is_indexed:  # before 5.17, such a model takes the position of a query for its slot
            return False
        if self.traits.has_old_masks:  # right only if the model makes none; a mask of its own would cover the whole text
            makes_none = self.config._attn_implementation == "sdpa" and getattr(self.config, "sliding_window", None) is None
            return makes_none and not self.traits.has_local_attention and (current.num_columns == 1 or not any(current.num_seen))
        return MODELS_ASK_FOR_QUERY_OFFSET or not self.traits.has_local_attention


def position_ids(current: Pass, device: torch.device) -> torch.Tensor:
    """Token numbers less the base of the row, `[batch * parts, part_length]`. Padding stands at 0."""
    stop = [after - start for after, start in zip(current.num_after, current.base)]
    if len(stop) == current.num_columns == 1:
        return torch.full((current.batch_size, 1), max(stop[0] - 1, 0), device=device)
    positions = torch.arange(-current.num_columns, 0, device=device) + torch.tensor(stop, device=device)[:, None]
    positions = positions.clamp(min=0).expand(current.batch_size, -1).reshape(-1, current.part_length)
    return positions.contiguous()  # a graph is made for one memory layout
