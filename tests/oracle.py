"""The logits that the rules demand, from the model alone.

The sinks are a causal prefix of their own. So under any relative position encoding, their keys at shifted positions are what the
model itself computes when it runs them at those positions. Token by token: for t >= W the first S tokens are run at positions
d .. d+S-1, d = t-W+1, in a fresh cache; their keys and values are put in front of the last W-S-1 stored ones; and token t is run
at position t on that. The keys of the window are never touched, and no rotation is computed here.

A layer with a native window of at most W sees its last tokens only, and no sinks. A recurrent state goes on from token to token.
Each token gets a cache of transformers' own layers, so the model makes its masks by itself.
"""

import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

# Largest difference from the oracle that counts as equal, in standard deviations of the logits.
TOLERANCE = 1e-3


def own_layers(model, window_length: int) -> list:
    """The layers of the model's own cache, full attention in place of native windows that are longer than the window."""
    layers = DynamicCache(config=model.config).layers
    return [DynamicLayer() if getattr(layer, "sliding_window", 0) > window_length else layer for layer in layers]


def cache_of(layers: list) -> DynamicCache:
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    return cache


@torch.no_grad()
def oracle_logits(
    model,
    input_ids: torch.Tensor,
    window_length: int,
    num_sink_tokens: int,
    sinks: torch.Tensor | None = None,
    shift: bool = True,
) -> torch.Tensor:
    """Logits `[1, num_tokens, vocab]` for one row without padding.

    `sinks` (other tokens in their place) and `shift=False` (sinks left where they were) make a wrong oracle on purpose.
    """
    assert input_ids.shape[0] == 1
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    first = input_ids[:, :num_sink_tokens] if sinks is None else sinks
    num_recent = window_length - num_sink_tokens - 1
    layers = own_layers(model, window_length)
    stored: list[list[tuple]] = [[] for _ in layers]  # keys and values of each token, by layer

    def run(ids: torch.Tensor, position: int, cache: DynamicCache) -> torch.Tensor:
        positions = {"position_ids": torch.arange(position, position + ids.shape[1])[None]} if has_positions else {}
        return model(ids, past_key_values=cache, use_cache=True, **positions).logits

    def last(states: list, num: int) -> list:
        return states[-num:] if num else []

    logits = []
    for token in range(input_ids.shape[1]):
        is_full = token >= window_length
        if is_full and num_sink_tokens:
            sink_cache = cache_of(own_layers(model, window_length))
            run(first, token - window_length + 1 if shift else 0, sink_cache)
        before, layers = layers, own_layers(model, window_length)
        for index, layer in enumerate(layers):
            if isinstance(layer, LinearAttentionCacheLayerMixin):  # the state goes on; with keys of its own layer, if it has any
                state = {name: value for name, value in vars(before[index]).items() if name not in vars(DynamicLayer())}
                vars(layer).update(
                    {name: value for name, value in state.items() if name not in ("cumulative_length", "sliding_window")}
                )
            if not stored[index]:
                continue
            if isinstance(layer, DynamicSlidingWindowLayer):
                kept = last(stored[index], layer.sliding_window - 1)
            elif is_full:
                kept = last(stored[index], num_recent)
                if num_sink_tokens:
                    kept = [(sink_cache.layers[index].keys, sink_cache.layers[index].values), *kept]
            else:
                kept = stored[index]
            if kept:
                layer.update(torch.cat([keys for keys, _ in kept], 2), torch.cat([values for _, values in kept], 2))
        logits.append(run(input_ids[:, token : token + 1], token, cache_of(layers)))
        for index, layer in enumerate(layers):
            if getattr(layer, "keys", None) is not None and layer.keys.numel():
                # a window of one token keeps none
                stored[index].append((layer.keys[:, :, -1:], layer.values[:, :, -1:]))
    return torch.cat(logits, dim=1)
