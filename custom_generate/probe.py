"""Asks a model how it treats positions, by running it on a few short texts; and refuses one for which the rules can't be kept."""

import contextlib
import copy
import inspect
import weakref

import torch
from transformers import DynamicCache

from .models import (
    FULL_MASKS,
    PADDING_MASKS,
    SLIDING_MASKS,
    LayerTraits,
    ModelTraits,
    check_mode,
    find_max_positions,
    frequency_buffers,
    inverse_frequencies,
    limits_time_steps,
    mask_dtype,
    put_back_frequencies,
    warn_of,
)
from .plan import as_mask
from .releases import (
    FULL_ATTENTION,
    OUT_OF_MEMORY,
    SLIDING_ATTENTION,
    DummyLayer,
    IndexedLayer,
    LinearAttentionLayer,
    NotingCache,
    cache_name,
    input_device,
    makes_masks_itself,
    named_states,
    uncompiled_copy,
)
from .rotation import Rotation, candidate_rotations
from .views import view_of

# How far keys may be from a rotation that explains them, relative to the length of a pair: in the first layer, and behind it,
# where in 16 bits the rounding of scores comes on top of that of cosines, sines and products.
ROTATION_TOLERANCE = {torch.float64: (2e-3, 2e-3), torch.float32: (2e-3, 2e-3)}
ROTATION_TOLERANCE |= {torch.float16: (4e-3, 4e-2), torch.bfloat16: (1.5e-2, 0.15)}

# A model's noise is what rounding does to the logits of a text that is moved by single positions: each position has other angles,
# and each model amplifies their rounding in its own way. Far away, a text may have logits that differ from those at the first
# positions by so many standard errors of the noise. Measured at windows of 16 to 16,384 in float32, bfloat16 and float16: at
# most 1.7 where they depend on distances only (SmolLM2, Gemma 3, all families, deep random models), 2.9 or more elsewhere.
MAX_STANDARD_ERRORS = 2.4
# In standard deviations of the logits: a difference too small to matter; noise too large to tell anything; how far two ways to
# compute one thing (a recurrence by steps or in chunks) may be apart, if not by a few times the noise.
NEGLIGIBLE = {torch.float64: 3e-5, torch.float32: 3e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MAX_NOISE = {torch.float64: 0.03, torch.float32: 0.03, torch.float16: 0.5, torch.bfloat16: 0.5}
SAME = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
MAX_COMPARED_LOGITS = 4096  # from all over a large vocabulary
NUM_NEIGHBOURS = 6  # neighbouring positions at which a text is shown, near and far
NUM_COMPARED, NUM_SPLIT = 3, 8  # tokens of a text of which keys are compared, and of one that is split into passes

# Held keys are rotated back when positions reach twice the window; but in 16 bits, where that costs a rounding, not before here:
# the float32 angles of such positions are still many times finer than the cosines of the model.
MIN_REBASE_IN_16_BITS = 2**14
MAX_EXACT_POSITION = 2**24  # float32 holds every whole number up to here
NO_KEYS = "no keys"  # in place of the length of a native window
CHUNKED = "chunked_attention"  # the type of layers that attend within chunks of the text
# The rules, as refusals name them.
EXACT = "the sinks are moved as the model itself encodes their new positions"
SHIFT = "logits do not depend on how many tokens have gone by"
FEEDING = "logits do not depend on how a text is fed"
BOUNDED = "every layer holds at most window_length tokens, in this cache"
CAUSAL = "a token sees no later ones"

# What was found out, so that a model is asked once for each window length.
_known_traits: "weakref.WeakKeyDictionary[torch.nn.Module, dict]" = weakref.WeakKeyDictionary()


def model_traits(model: torch.nn.Module, window_length: int) -> ModelTraits:
    """Finds out what the cache has to know of a model, at first by passes over 390 tokens (2,500 with recurrent layers).

    Raises:
        ValueError: the rules can't be kept for this model. The message says what stands in the way.
    """
    check_mode(model)
    known = _known_traits.setdefault(model, {})
    key = window_length, model.dtype, model.device
    if key not in known:
        traits = _find_model_traits(uncompiled_copy(view_of(model)), window_length)
        warn_of(model, window_length, traits, known)
        known[key] = traits
    return known[key]


@torch.no_grad()
def _find_model_traits(model: torch.nn.Module, window_length: int) -> ModelTraits:
    probe = Probe(model, window_length)
    layers = probe.layers()
    probe.check_that_no_token_sees_later_ones()
    probe.check_that_logits_depend_on_distances_only()
    has_rotation = any(not rotation.is_identity for layer in layers if layer for rotation in layer.rotations)
    noted_layers, splits_exactly = probe.check_that_texts_can_be_split() if probe.is_recurrent else (frozenset(), True)
    is_ordered = not has_rotation and not probe.is_recurrent
    if not is_ordered:
        probe.check_that_the_mask_alone_says_what_is_seen()
    probe.check_lengths(has_rotation)
    recurrent_states = {
        index: {name: state[:0].clone() for name, state in named_states(layer).items()}
        for index, layer in enumerate(probe.cache.layers)
        if isinstance(layer, LinearAttentionLayer)
    }
    return ModelTraits(
        layers=layers,
        rebase_at=probe.rebase_at,
        max_positions=probe.max_positions,
        is_ordered=is_ordered,
        recurrent_states=recurrent_states,
        noted_layers=noted_layers,
        splits_exactly=splits_exactly,
        is_chunked=probe.is_chunked,
        is_indexed=probe.is_indexed,
        layer_types=probe.layer_types if probe.takes_masks_by_type else None,
        has_old_masks=probe.has_old_masks,
    )


class Probe:
    """A model that is asked how it treats positions.

    It is shown texts a a b, each at several positions. The first token sees only itself, the second itself and its copy: they go
    through all layers alike wherever they stand and whatever the third is, so that their keys differ by what the model does to
    positions, and by nothing else. The third has to choose what to attend to, and must choose alike wherever the text stands.

    Raises:
        ValueError: from every method, when the answer is that the rules can't be kept.
    """

    def __init__(self, model: torch.nn.Module, window_length: int):
        self.model, self.name, self.window_length = model, type(model).__name__, window_length
        self.device, self.dtype = input_device(model), model.dtype
        self.config = model.config.get_text_config(decoder=True)
        self.accepted = inspect.signature(model.forward).parameters
        self.layer_types = tuple(getattr(self.config, "layer_types", None) or ())
        self.is_chunked = CHUNKED in self.layer_types
        self.has_old_masks = makes_masks_itself(model)
        self._check_old_models()
        self.max_positions = find_max_positions(model, self.config) if "position_ids" in self.accepted else None
        self.rebase_at = self._rebase_at()
        with self._looking():
            own = DynamicCache(config=self.config).layers  # as the model's own `generate` would make them
        self.native_windows = [self._native_window(index, layer) for index, layer in enumerate(own)]
        self.is_recurrent = any(isinstance(layer, LinearAttentionLayer) for layer in own)
        self.is_indexed = any(isinstance(layer, IndexedLayer) for layer in own)
        # Indexers take one mask for all layers, and none by type, before 5.14.
        takes_one_mask = self.is_indexed and len(set(self.layer_types)) <= 1
        self.takes_masks_by_type = bool(self.layer_types) and not (self.has_old_masks or takes_one_mask)
        self.positions = self._positions()
        # Keys are compared, and must not be cut to a native window: a cache of full attention, unless layers need others.
        needs_own = self.is_recurrent or self.is_indexed or any(isinstance(layer, DummyLayer) for layer in own)
        with self._looking():
            self.texts = self._texts()
            self.cache = DynamicCache(config=self.config) if needs_own else DynamicCache()
            # Without a mask, models with indexers take the position of a query for its slot, before 5.17.
            causal = torch.ones(1, 1, NUM_COMPARED, NUM_COMPARED, dtype=torch.bool).tril()
            mask = self._masks(causal) if takes_one_mask else None
            if self.max_positions is not None:  # the frequencies of a long text that was read before would be taken for its own
                self.model(input_ids=self.texts[:1, :1].to(self.device), use_cache=False)
            frequencies = {name: buffer.clone() for name, buffer in frequency_buffers(model).items()}
            self.logits = self._ask(self.cache, slice(0, NUM_COMPARED), mask)
        self.with_keys = [layer for layer, window in zip(self.cache.layers, self.native_windows) if window != NO_KEYS]
        # The standard deviation of the logits of each text at neighbouring large positions.
        self.noise = rms(self.logits[:, -NUM_NEIGHBOURS:].std(1))
        if (changed := put_back_frequencies(model, frequencies)) is not None:
            raise self._refusal(f"it changes its frequencies ({changed}) at long texts. Try float32, or a shorter window", SHIFT)

    def _check_old_models(self) -> None:
        if self.has_old_masks and any(getattr(module, "is_sliding", False) for module in self.model.modules()):
            raise self._refusal("its layers change the mask they are given. In newer releases they don't", BOUNDED)
        if any(hasattr(module, "_cached_keys") for module in self.model.modules()):  # GLM MoE DSA, until 5.10
            raise self._refusal("its layers hold keys outside of the cache. With transformers 5.11 or newer they don't", BOUNDED)

    def _rebase_at(self) -> int:
        length = 2 * self.window_length
        if length > MAX_EXACT_POSITION:
            raise self._refusal(f"it can't tell positions up to {length} apart, which it needs: try a shorter one", SHIFT)
        if self.max_positions is not None and length > self.max_positions:
            raise self._too_long(
                f": what it computes of positions changes or ends at position {self.max_positions}, and the cache needs "
                f"positions up to twice the window. Use a window_length of at most {self.max_positions // 2}."
            )
        rebase_at = max(length, MIN_REBASE_IN_16_BITS if self.dtype.itemsize == 2 else 0)
        return min(rebase_at, self.max_positions or rebase_at)

    def _positions(self) -> torch.Tensor:
        """Where texts begin: at the first positions, behind a window, and so that they end at the largest positions."""
        length = NUM_SPLIT if self.is_recurrent else NUM_COMPARED
        end = min(max(self.rebase_at, 2 * NUM_NEIGHBOURS + length), self.max_positions or MAX_EXACT_POSITION)
        last = max(end - length, 0)
        far = range(last - NUM_NEIGHBOURS + 1, last + 1)
        return torch.tensor([*range(NUM_NEIGHBOURS), self.window_length, *far]).clamp(0, last)

    def _texts(self) -> torch.Tensor:
        """Six texts `[texts, tokens]`, of tokens from all over the vocabulary."""
        embeddings = self.model.get_input_embeddings()
        vocab_size = getattr(embeddings, "num_embeddings", None) or len(embeddings.weight)  # ZeRO-3 leaves a weight of no rows
        starts = torch.tensor([[3, 3, 6], [6, 6, 3], [3, 3, 5], [2, 2, 7], [1, 1, 4], [7, 7, 1]]) * vocab_size // 9
        rest = torch.arange(6)[:, None] * 5 + torch.arange(NUM_SPLIT - NUM_COMPARED) * 7 + 2
        return torch.cat([starts, rest * vocab_size // 61], dim=1)

    def layers(self) -> tuple[LayerTraits | None, ...]:
        """What there is to know of each layer: how its keys move, and its shapes."""
        are_missing = [getattr(layer, "keys", None) is None for layer in self.with_keys]
        if not are_missing or any(are_missing) or len(self.cache.layers) != len(self.native_windows):
            raise self._refusal("attention layers do not put their keys and values into its cache", BOUNDED)
        tables = inverse_frequencies(self.model, self.config)
        traits = []
        for index, (layer, native_window) in enumerate(zip(self.cache.layers, self.native_windows)):
            if native_window == NO_KEYS:
                traits.append(None)
                continue
            keys, values = layer.keys, layer.values
            if keys.dtype != values.dtype:
                dtypes = f"keys in {keys.dtype} and values in {values.dtype}"
                raise self._refusal(f"it has {dtypes}. Put it into one dtype, model.to(dtype)", BOUNDED)
            rotations = tuple(self._rotation(index, each.cpu(), tables).to(each.device) for each in (keys, values))
            shapes = tuple((each.shape[1], each.shape[3]) for each in (keys, values))
            traits.append(LayerTraits(native_window, rotations, shapes, keys.dtype, keys.device))
        return tuple(traits)

    def check_that_no_token_sees_later_ones(self) -> None:
        """Texts 0 and 2 differ only in their third token; if earlier keys differ, the model is not causal."""
        for states in filter(torch.numel, (self.with_keys[-1].keys, self.with_keys[-1].values)):
            _, tolerance = ROTATION_TOLERANCE[states.dtype]
            states = self._by_position(states[:, :, :2]).float()
            differences = (states[0] - states[2]).flatten(1).abs().amax(1)
            if differences.median() > tolerance * states.std():
                raise self._refusal("a token sees others that come after it", CAUSAL)

    def check_that_logits_depend_on_distances_only(self) -> None:
        """The same text at large positions has the logits that it has at small ones, but for the model's own noise."""
        near, far = self.logits[:, :NUM_NEIGHBOURS].mean(1), self.logits[:, -NUM_NEIGHBOURS:].mean(1)
        difference, noise, scale = rms(far - near), self.noise, self.logits.std()
        if median(difference) <= NEGLIGIBLE[self.dtype] * scale:
            return
        if median(difference / noise) * (NUM_NEIGHBOURS / 2) ** 0.5 > MAX_STANDARD_ERRORS:
            raise self._refusal("its logits depend on where a text stands, not only on distances", SHIFT)
        if median(noise) > MAX_NOISE[self.dtype] * scale:
            reason = f"they change by {median(noise) / scale:.2g} standard deviations from one position to the next"
            raise self._refusal(f"its logits depend on where a text stands, if only by rounding: {reason}", SHIFT)

    def check_that_texts_can_be_split(self) -> tuple[frozenset[int], bool]:
        """Returns the recurrent layers that a pass can be seen to reach, and whether single tokens are computed as several."""
        cache = NotingCache(config=self.config)
        with self._looking("this release takes no masks for its recurrent and other layers: try a newer one", FEEDING):
            self._ask(cache, slice(0, 1), dict.fromkeys((*FULL_MASKS, *SLIDING_MASKS, *PADDING_MASKS)))
        first, cache.layers_reached = cache.layers_reached, set()
        self._ask(cache, slice(1, 3))
        noted = frozenset(first & cache.layers_reached)
        whole = self._split_into(NUM_SPLIT)
        if self._differ(self._split_into(NUM_SPLIT // 2, NUM_SPLIT // 2), whole):
            reason = "its recurrent layers forget their state in a pass of several tokens"
            raise self._refusal(f"its logits depend on how a text is split into passes: {reason}", FEEDING)
        # Single tokens after a pass, and a pass after single tokens.
        # In so few tokens, rounding may hide that time steps are limited.
        return noted, not (self._differ(self._split_into(2, 1, 1, 1, 1, 2), whole) or limits_time_steps(self.model))

    def check_that_the_mask_alone_says_what_is_seen(self) -> None:
        """One token more, on the keys as they are; and on keys in reverse, with those of another text among them, hidden."""
        mixed, num_hidden = copy.deepcopy(self.cache), 0 if self.is_indexed else 1  # indexers have keys of their own, as many
        for layer, native_window in zip(mixed.layers, self.native_windows):
            for kind in ("keys", "values") if native_window != NO_KEYS else ():
                states = getattr(layer, kind)
                others = states[:, :, :num_hidden].roll(len(self.positions), dims=0)
                setattr(layer, kind, torch.cat([states.flip(2), others], dim=2))
        last, seen, logits = slice(NUM_COMPARED - 1, NUM_COMPARED), [True] * NUM_COMPARED, []
        reason = "not the mask alone says which keys a token attends to: their order or their number counts, too"
        for cache, visible in ((mixed, [*seen, *[False] * num_hidden, True]), (self.cache, [*seen, True])):
            with self._looking(reason, FEEDING):
                logits.append(self._ask(cache, last, self._masks(torch.tensor(visible)[None, None, None])))
        if self._differ(*logits, NEGLIGIBLE if self.noise.any() else SAME):  # no noise shows if nothing has a position
            raise self._refusal(reason, FEEDING)

    def _masks(self, visible: torch.Tensor) -> dict | torch.Tensor:
        """What all rows see, `[1, 1, columns, kv_length]`, as masks in the form that the model takes."""
        mask = as_mask(visible.to(self.device), mask_dtype(self.config, self.has_old_masks or self.is_indexed, self.dtype))
        mask = mask.expand(len(self.texts) * len(self.positions), -1, -1, -1)
        if self.is_recurrent:
            return dict.fromkeys((*FULL_MASKS, *SLIDING_MASKS), mask) | dict.fromkeys(PADDING_MASKS)
        return dict.fromkeys(self.layer_types, mask) if self.takes_masks_by_type else mask

    def check_lengths(self, has_rotation: bool) -> None:
        """Refuse a window that is longer than what the model computes alike."""
        limits = [  # options of a config, whether they limit the window of this model, and why
            ("keep_window_size", True, "from there on it chooses among its keys"),  # Doge
            ("max_seq_len", not has_rotation, "its position biases end there"),  # MPT
            ("attention_chunk_size", self.is_chunked, "its layers attend within chunks of that length"),
            ("index_topk", self.is_indexed, "from there on its layers choose among their keys"),
        ]
        for option, applies, reason in limits:
            length = getattr(self.config, option, None)
            if applies and length is not None and self.window_length > length:
                raise self._too_long(f" ({option}={length}): {reason}.")

    def _ask(self, cache: DynamicCache, columns: slice, masks: dict | torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[texts, positions, vocab]` of the last of these columns of the texts, which go into the cache."""
        inputs = {
            "input_ids": self.texts.repeat_interleave(len(self.positions), dim=0)[:, columns].to(self.device),
            "position_ids": (self.positions.repeat(len(self.texts))[:, None] + torch.arange(NUM_SPLIT)[columns]).to(self.device),
            cache_name(self.accepted): cache,
            "attention_mask": masks,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        logits = self.model(**{name: value for name, value in inputs.items() if name in self.accepted}).logits[:, -1]
        return self._by_position(logits[:, :: max(logits.shape[-1] // MAX_COMPARED_LOGITS, 1)].float())

    def _split_into(self, *sizes: int) -> torch.Tensor:
        """Logits `[texts, positions, vocab]` of the last token of the texts, fed in passes of these sizes."""
        cache, start = DynamicCache(config=self.config), 0
        for size in sizes:
            logits = self._ask(cache, slice(start, start + size))
            start += size
        return logits

    def _by_position(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (len(self.texts), len(self.positions)))

    def _differ(self, logits: torch.Tensor, reference: torch.Tensor, tolerance=SAME) -> bool:
        """Whether logits `[texts, positions, vocab]`, computed in two ways, differ by more than rounding."""
        tolerance = max(tolerance[self.dtype] * reference.std(), 5 * median(self.noise))
        return rms((logits - reference).mean(1)).median() > tolerance  # the lower median: rounding chooses experts

    def _rotation(self, index: int, states: torch.Tensor, tables: list[torch.Tensor]) -> Rotation:
        """The rotation that explains the states `[texts * positions, heads, 3, head_dim]` of a layer."""
        if states.shape[0] == len(self.texts) * len(self.positions) and states.shape[2] <= NUM_COMPARED:
            tolerance, deep_tolerance = ROTATION_TOLERANCE[states.dtype]
            first, best = self._by_position(states[:, :, 0]), (float("inf"), None)
            for rotation in candidate_rotations(states.shape[3], tables):
                best = min(best, (rotation.misfit(first, self.positions), rotation), key=lambda pair: pair[0])
                if best[0] <= tolerance:
                    break
            misfit, rotation = best
            # In layer 0 the second `a` must be the first one rotated by one position, else `position_ids` are ignored.
            if index == 0 and not self.is_recurrent and misfit <= tolerance:
                step = torch.arange(2) if "position_ids" in self.accepted else torch.zeros(2)
                near = self._by_position(states[:, :, :2])[:, :NUM_NEIGHBOURS].flatten(0, 1)
                misfit = rotation.misfit(near.transpose(1, 2), step)
            if misfit <= (tolerance if index == 0 else deep_tolerance):
                return rotation
        reason = f"no known rotation explains how the keys of layer {index} change with their position"
        where = "" if tables else " (no frequencies were found: they have to stand in a buffer whose name ends in inv_freq)"
        raise self._refusal(f"{reason}. It has absolute or learned position embeddings, or a rotation of its own{where}", EXACT)

    def _native_window(self, index: int, layer) -> int | str | None:
        """The sliding window of a layer of the model's own cache: None for full attention, `NO_KEYS` for a layer without keys."""
        is_indexed = type(layer) is IndexedLayer and hasattr(self.config, "index_topk")
        if type(layer) in FULL_ATTENTION or is_indexed or self.is_chunked and self.layer_types[index] == CHUNKED:
            return None
        if type(layer) in SLIDING_ATTENTION:
            return layer.sliding_window
        if type(layer) in (LinearAttentionLayer, DummyLayer):
            return NO_KEYS
        raise self._refusal(f"layer {index} keeps another kind of state ({type(layer).__name__})", BOUNDED)

    @contextlib.contextmanager
    def _looking(self, reason: str = "a first look at how it caches keys failed", rule: str = BOUNDED):
        """Whatever goes wrong when a model is asked is a reason to refuse it; but not that memory is short."""
        try:
            yield
        except Exception as error:  # torch says it of a CPU in a RuntimeError
            if isinstance(error, OUT_OF_MEMORY) or "can't allocate memory" in str(error):
                raise
            raise self._refusal(f"{reason} ({type(error).__name__}: {error})", rule) from error

    def _too_long(self, why: str) -> ValueError:
        return ValueError(f"window_length={self.window_length} is too long for {self.name}{why}")

    def _refusal(self, reason: str, rule: str) -> ValueError:
        opening = f"SinkCache can't keep its rules for {self.name} with window_length={self.window_length}"
        return ValueError(f"{opening}: {reason}. The rule that this would break: {rule}.")


def rms(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean(-1).sqrt()


def median(values: torch.Tensor) -> float:
    """Over the texts: in 16 bits, rounding may send a token of one text to another expert, which says nothing of positions."""
    return values.float().quantile(0.5).item()
