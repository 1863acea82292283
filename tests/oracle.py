"""The logits that the rules demand, from the model alone.

The sinks are a causal prefix of their own. So under any relative position encoding, their keys at shifted positions are what the
model itself computes when it runs them at those positions. Token by token: for t >= W the first S tokens are run at positions
d .. d+S-1, d = t-W+1, in a fresh cache; their keys and values are put in front of the last W-S-1 stored ones; and token t is run
at position t on that. The keys of the window are never touched, and no rotation is computed here.

A layer with a native window of at most W sees its last tokens only, and no sinks.
"""

import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

# Largest difference from the oracle that counts as equal, in standard deviations of the logits.
TOLERANCE = 1e-3


def native_windows(model) -> list[int | None]:
    layers = DynamicCache(config=model.config).layers
    return [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in layers]


@torch.no_grad()
def oracle_logits(
    model, input_ids: torch.Tensor, window_length: int, num_sink_tokens: int, sinks: torch.Tensor | None = None, shift: bool = True
) -> torch.Tensor:
    """Logits `[1, num_tokens, vocab]` for one row without padding.

    `sinks` (other tokens in their place) and `shift=False` (sinks left where they were) make a wrong oracle on purpose.
    """
    assert input_ids.shape[0] == 1
    windows = native_windows(model)
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    first = input_ids[:, :num_sink_tokens] if sinks is None else sinks
    stored: list[list[tuple]] = [[] for _ in windows]  # keys and values of each token, by layer

    def run(ids, position, cache, **kwargs):
        if has_positions:
            kwargs["position_ids"] = torch.arange(position, position + ids.shape[1])[None]
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits

    logits = []
    for token in range(input_ids.shape[1]):
        is_full = token >= window_length
        sink_cache = DynamicCache()
        if is_full and num_sink_tokens:
            run(first, token - window_length + 1 if shift else 0, sink_cache)
        cache = DynamicCache()
        for layer, window in enumerate(windows):
            if window is not None and window <= window_length:
                kept = stored[layer][-(window - 1) :] if window > 1 else []
            elif not is_full:
                kept = stored[layer]
            else:
                num_recent = window_length - num_sink_tokens - 1
                kept = stored[layer][-num_recent:] if num_recent else []
                if num_sink_tokens:
                    kept = [(sink_cache.layers[layer].keys, sink_cache.layers[layer].values), *kept]
            if kept:
                cache.update(torch.cat([k for k, _ in kept], 2), torch.cat([v for _, v in kept], 2), layer)
        lengths = [cache.layers[i].keys.shape[2] if i < len(cache.layers) else 0 for i in range(len(windows))]
        masks = {}
        if len(set(lengths)) > 1:  # each type of layer needs a mask of its own length: all visible
            types = model.config.layer_types
            bias = {"eager": torch.zeros, "sdpa": lambda *size: torch.ones(*size, dtype=torch.bool)}
            make = bias[model.config._attn_implementation]
            masks["attention_mask"] = {types[i]: make(1, 1, 1, lengths[i] + 1) for i in range(len(windows))}
        logits.append(run(input_ids[:, token : token + 1], token, cache, **masks))
        for layer in range(len(windows)):
            held = cache.layers[layer]
            stored[layer].append((held.keys[:, :, -1:], held.values[:, :, -1:]))
    return torch.cat(logits, dim=1)
