"""The logits that the rules demand, from the model alone.

The sinks are a causal prefix of their own. So under any relative position encoding, their keys at shifted positions are what the
model itself computes when it runs them at those positions. Token by token: for t >= W the first S tokens are run at positions
d .. d+S-1, d = t-W+1, in a fresh cache; their keys and values are put in front of the last W-S-1 stored ones; and token t is run
at position t on that. The keys of the window are never touched, and no rotation is computed here.

A layer with a native window of at most W sees its last tokens only, and no sinks; one that attends within chunks sees all, as long as
W tokens fit into a chunk. A recurrent state goes on from token to token.
Each token gets a cache of transformers' own layers, so the model makes its masks by itself; but before 5.16, where it can't for
caches with native windows, it is given one in which all that is cached is visible.
"""

import copy
import inspect

import torch
import transformers
from packaging import version
from transformers import Cache, DynamicCache, cache_utils

# Largest difference from the oracle that counts as equal, in standard deviations of the logits.
TOLERANCE = 1e-3

MODELS_ASK_FOR_QUERY_OFFSET = hasattr(Cache, "get_query_offset")  # since 5.16
# Before, under sdpa they take the position of a query for its place among the keys.
INDEXERS_MAKE_MASKS = version.parse(transformers.__version__) >= version.parse("5.17")


def native_windows(model, window_length: int) -> list[int | None]:
    """The native window of each layer, None for full attention, for chunks and for windows that are longer than the window."""
    config = model.config.get_text_config(decoder=True)
    lengths = [getattr(layer, "sliding_window", None) for layer in own_cache(config).layers]
    is_chunked = [kind == "chunked_attention" for kind in getattr(config, "layer_types", None) or [None] * len(lengths)]
    assert not any(is_chunked) or window_length <= config.attention_chunk_size
    return [
        None if chunked or length is None or length > window_length else length for length, chunked in zip(lengths, is_chunked)
    ]


def own_cache(config) -> DynamicCache:
    """The cache that the model's own `generate` would make."""
    return DynamicCache(config=config)


def named(model, cache: DynamicCache) -> dict:
    """The cache under the name by which the model takes it: `cache` in models of 5.24; code from the Hub keeps the older name."""
    accepted = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in accepted and "past_key_values" not in accepted else "past_key_values": cache}


def new_cache(model, windows: list[int | None]) -> DynamicCache:
    """The model's own, with full attention in place of native windows that are longer than the window."""
    cache = DynamicCache()
    layers = own_cache(model.config.get_text_config(decoder=True)).layers
    is_longer = [window is None and hasattr(layer, "sliding_window") for layer, window in zip(layers, windows)]
    cache.layers = [cache_utils.DynamicLayer() if longer else layer for layer, longer in zip(layers, is_longer)]
    cache.layer_class_to_replicate = None
    return cache


def states_of(cache: DynamicCache, index: int) -> tuple[torch.Tensor, ...] | None:
    """Keys and values of one layer, `[batch, heads, tokens, dim]`, and if there is an indexer, the keys by which it chooses."""
    layer = cache.layers[index]
    keys, indexer_keys = (getattr(layer, name, None) for name in ("keys", "indexer_keys"))
    if keys is None or not keys.numel():
        return None
    return (keys, layer.values) + (() if indexer_keys is None else (indexer_keys[:, None],))


def by_token(cache: DynamicCache, num_layers: int) -> list[list[tuple]]:
    """The states of each token, by layer: of the last tokens only, where a layer holds no more."""
    return [list(zip(*(each.split(1, dim=2) for each in states_of(cache, index) or ()))) for index in range(num_layers)]


def put(kept: list[tuple], cache: DynamicCache, index: int) -> None:
    """States of tokens, of the kind that `states_of` finds, into one layer of a new cache."""
    keys, values, *indexer_keys = (torch.cat(states, 2) for states in zip(*kept))
    cache.update(keys, values, index)
    for states in indexer_keys:
        cache.update_indexer(states[:, 0], index)


def causal_mask(model, num_tokens: int) -> torch.Tensor | None:
    """For tokens at any positions in a new cache: None where the model makes it right by itself."""
    if INDEXERS_MAKE_MASKS or not hasattr(model.config.get_text_config(decoder=True), "index_topk"):
        return None
    return torch.full((1, 1, num_tokens, num_tokens), torch.finfo(model.dtype).min).triu(1)


def copy_recurrent_states(before: DynamicCache, cache: DynamicCache) -> None:
    """The state goes on, without the keys of its layer if it has any."""
    mixin = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())
    not_state = {*vars(cache_utils.DynamicLayer()), "cumulative_length", "sliding_window"} if mixin else ()
    for old, new in zip(before.layers, cache.layers):
        if isinstance(new, mixin):
            vars(new).update({name: copy.deepcopy(value) for name, value in vars(old).items() if name not in not_state})


@torch.no_grad()
def oracle_logits(
    model,
    input_ids: torch.Tensor,
    window_length: int,
    num_sink_tokens: int,
    sinks: torch.Tensor | None = None,
    shift: bool = True,
    seen_as=None,
    num_at_once: int = 0,
) -> torch.Tensor:
    """Logits `[1, num_tokens, vocab]` for one row without padding.

    `sinks` (other tokens in their place) and `shift=False` (sinks left where they were) make a wrong oracle on purpose.
    `seen_as(layer, token, stored)` gives the keys and values that a token sees in the place of those stored. The first `num_at_once`
    tokens, which have to fit into the window, go through the model in one plain pass: for large models.
    """
    assert input_ids.shape[0] == 1 and num_at_once <= window_length
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    first = input_ids[:, :num_sink_tokens] if sinks is None else sinks
    num_recent = window_length - num_sink_tokens - 1
    windows = native_windows(model, window_length)
    needs_mask = any(windows) and not MODELS_ASK_FOR_QUERY_OFFSET
    stored: list[list[tuple]] = [[] for _ in windows]  # keys and values of each token, by layer

    def run(ids: torch.Tensor, first_positions: torch.Tensor, cache: DynamicCache, mask=None) -> torch.Tensor:
        positions = {"position_ids": first_positions[:, None] + torch.arange(ids.shape[1])} if has_positions else {}
        return model(ids, **named(model, cache), use_cache=True, attention_mask=mask, **positions).logits

    def last(states: list, num: int) -> list:
        return states[-num:] if num else []

    def all_visible(num_kept: list[int]):
        """One mask, or one for each type of layer."""
        masks = [torch.zeros(1, 1, 1, num + 1) for num in num_kept]
        layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
        return dict(zip(layer_types, masks)) if layer_types else masks[0]

    # The sinks where each token past the window sees them, one row for each: rows do not see each other.
    shifts = torch.arange(1, max(input_ids.shape[1] - window_length, 0) + 1) * shift
    sink_cache = new_cache(model, windows)
    if num_sink_tokens and len(shifts):
        run(first.expand(len(shifts), -1), shifts, sink_cache, causal_mask(model, num_sink_tokens))

    logits, cache = [], new_cache(model, windows)
    if num_at_once:
        logits.append(run(input_ids[:, :num_at_once], torch.tensor([0]), cache))
        stored = by_token(cache, len(windows))
    for token in range(num_at_once, input_ids.shape[1]):
        is_full = token >= window_length
        before, cache = cache, new_cache(model, windows)
        copy_recurrent_states(before, cache)
        num_kept = []
        for index, window in enumerate(windows):
            all_kept = stored[index] if seen_as is None else seen_as(index, token, stored[index])
            if window is not None:
                kept = last(all_kept, window - 1)
            elif is_full:
                kept = last(all_kept, num_recent)
                if num_sink_tokens and stored[index]:
                    row = slice(token - window_length, token - window_length + 1)
                    kept = [tuple(each[row] for each in states_of(sink_cache, index)), *kept]
            else:
                kept = all_kept
            if kept:
                put(kept, cache, index)
            num_kept.append(sum(keys.shape[2] for keys, *_ in kept))
        logits.append(
            run(input_ids[:, token : token + 1], torch.tensor([token]), cache, all_visible(num_kept) if needs_mask else None)
        )
        for index in range(len(windows)):
            states = states_of(cache, index)
            if states is not None:  # a window of one token keeps none
                stored[index].append(tuple(each[:, :, -1:] for each in states))
    return torch.cat(logits, dim=1)


class Text:
    """A text as `GrowingOracle` has seen it: its last token, what the model cached for that, the logits, and the text before it."""

    def __init__(self, before: "Text | None" = None, token: int | None = None):
        self.before, self.token = before, token
        self.length: int = 0 if before is None else before.length + 1
        self.logits: torch.Tensor | None = None  # [vocab]
        self.states: list[tuple | None] = []  # keys and values of the token, by layer
        self.cache = DynamicCache()  # with the recurrent states
        self.moved_sinks: dict[int, list] = {}  # of a text that is all sinks: block of shifts -> states by layer
        self.longer: dict[int, Text] = {}

    @property
    def tokens(self) -> list[int]:
        return [text.token for text in self.last(self.length)]

    def last(self, num: int) -> "list[Text]":
        """The texts that end in the last `num` tokens, the longest last."""
        texts, text = [], self
        while text.before is not None and len(texts) < num:
            texts.append(text)
            text = text.before
        return texts[::-1]


class GrowingOracle:
    """`oracle_logits` for texts that grow token by token and branch: each beginning that texts share is computed once."""

    SHIFTS_AT_ONCE = 32

    def __init__(self, model, window_length: int, num_sink_tokens: int):
        self.model, self.window_length, self.num_sinks = model, window_length, num_sink_tokens
        self.windows = native_windows(model, window_length)
        self.has_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.is_recurrent = any(hasattr(layer, "recurrent_states") for layer in new_cache(model, self.windows).layers)
        self.empty, self.num_computed = Text(), 0

    def append(self, text: Text, token: int) -> Text:
        if token not in text.longer:
            text.longer[token] = self._compute(text, token)
        return text.longer[token]

    @torch.no_grad()
    def _compute(self, text: Text, token: int) -> Text:
        grown, cache, num_kept = Text(text, token), new_cache(self.model, self.windows), []
        copy_recurrent_states(text.cache, cache)
        is_full = text.length >= self.window_length
        recent, sinks = text.last(self.window_length), None
        if is_full and self.num_sinks:
            first = text
            while first.length > self.num_sinks:
                first = first.before
            sinks = self._moved(first, text.length - self.window_length + 1)
        for index, window in enumerate(self.windows):
            num = window - 1 if window is not None else self.window_length - self.num_sinks - 1 if is_full else len(recent)
            kept = [each.states[index] for each in recent[max(len(recent) - num, 0) :] if each.states[index] is not None]
            if window is None and sinks is not None and sinks[index] is not None:
                kept = [sinks[index], *kept]
            if kept:
                put(kept, cache, index)
            num_kept.append(sum(keys.shape[2] for keys, *_ in kept))
        mask = None
        if any(self.windows) and not MODELS_ASK_FOR_QUERY_OFFSET:
            layer_types = getattr(self.model.config.get_text_config(decoder=True), "layer_types", None)
            masks = [torch.zeros(1, 1, 1, num + 1) for num in num_kept]
            mask = dict(zip(layer_types, masks)) if layer_types else masks[0]
        grown.logits = self._run([token], torch.tensor([text.length]), cache, mask)[0, -1]
        states = [states_of(cache, index) for index in range(len(self.windows))]
        grown.states = [each and tuple(state[:, :, -1:].clone() for state in each) for each in states]
        grown.cache = cache if self.is_recurrent else text.cache
        self.num_computed += 1
        return grown

    def _moved(self, sinks: Text, shift: int) -> list[tuple]:
        """The states of the sinks, by layer, as the model computes them at positions `shift` and so on."""
        block, row = divmod(shift, self.SHIFTS_AT_ONCE)
        if block not in sinks.moved_sinks:
            cache, shifts = new_cache(self.model, self.windows), torch.arange(self.SHIFTS_AT_ONCE) + block * self.SHIFTS_AT_ONCE
            self._run(sinks.tokens, shifts, cache, causal_mask(self.model, len(sinks.tokens)))
            sinks.moved_sinks[block] = [states_of(cache, index) for index in range(len(self.windows))]
        return [each and tuple(state[row : row + 1] for state in each) for each in sinks.moved_sinks[block]]

    def _run(self, tokens: list[int], first_positions: torch.Tensor, cache: DynamicCache, mask=None) -> torch.Tensor:
        positions = first_positions[:, None] + torch.arange(len(tokens))
        positions = {"position_ids": positions} if self.has_positions else {}
        ids = torch.tensor([tokens]).expand(len(first_positions), -1)
        return self.model(ids, **named(self.model, cache), use_cache=True, attention_mask=mask, **positions).logits


_oracles: dict[tuple, GrowingOracle] = {}  # each keeps its model


def known_oracle_logits(model, input_ids: torch.Tensor, window_length: int, num_sink_tokens: int) -> torch.Tensor:
    """`oracle_logits`, computed once for all tests that ask for a text or for another one that begins alike: of a model that is shared
    by tests and that nobody changes."""
    assert input_ids.shape[0] == 1
    key = id(model), window_length, num_sink_tokens
    if key not in _oracles:
        _oracles[key] = GrowingOracle(model, window_length, num_sink_tokens)
    oracle = _oracles[key]
    text, logits = oracle.empty, []
    for token in input_ids[0].tolist():
        text = oracle.append(text, token)
        logits.append(text.logits)
    return torch.stack(logits)[None]
