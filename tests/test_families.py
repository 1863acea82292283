"""Every family and kind of position embedding against the oracle: the rules hold for all tokens, however they are fed."""

import functools

import pytest
import torch

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, assert_same, difference, feed, left_padded, random_ids
from custom_generate.generate import SinkCache
from families import EAGER_ONLY, FAMILIES, ORDERED, REFUSED_BEFORE, ROTATIONS_ONLY, build_model, is_refused
from oracle import TOLERANCE, known_oracle_logits, native_windows, oracle_logits, own_cache


def marks_of(name: str, implementation: str) -> list:
    if implementation != "eager" or name in EAGER_ONLY:
        return []
    return [pytest.mark.also_eager, *([pytest.mark.slow] if name in ROTATIONS_ONLY else [])]


CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}", marks=marks_of(name, implementation))
    for name in FAMILIES
    for implementation in ("eager", "sdpa")
    if implementation == "eager" or name not in EAGER_ONLY
]
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]  # of weights and texts
# Cases at W-1, W, W+1, chunks over every edge, and one pass far longer than the window.
SPLITS = {
    "one-by-one": [1] * 80,
    "chunks": [7] * 11 + [3],
    "over-the-edge": [3, 30, 1, 1, 40, 5],
    "at-the-edge": [15, 1, 1, 63],
    "one-pass": [80],
    "in-parts": [16, (8, 2), 1, (40, 5), (15, 15)],
}


@functools.cache
def shared_model(name: str, implementation: str, seed: int = 0) -> torch.nn.Module:
    """Of all tests below that change nothing about it."""
    return build_model(name, implementation, seed=seed)


# What they compute with sdpa differs from what they compute with eager attention, in transformers itself.
DIFFERS_BY_IMPLEMENTATION = {"falcon-alibi"}


def judged_model(name: str, implementation: str = "sdpa") -> torch.nn.Module:
    """The one of a family that the oracle runs: with another attention implementation the logits have to be the same."""
    if name in EAGER_ONLY or name in DIFFERS_BY_IMPLEMENTATION and implementation == "eager":
        return shared_model(name, "eager")
    return shared_model(name, "sdpa")


def expected_logits(name: str, implementation: str, input_ids: torch.Tensor) -> torch.Tensor:
    return known_oracle_logits(judged_model(name, implementation), input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)


@pytest.mark.parametrize("name, implementation", CASES)
def test_logits_equal_the_oracle_however_the_tokens_are_fed(name, implementation):
    """Exactness, parity and feeding at once. A pass can't be luck: see the test of the oracle below, and the floor for flat logits."""
    model = shared_model(name, implementation)
    input_ids = random_ids()
    expected = expected_logits(name, implementation, input_ids)
    with torch.no_grad():
        full = model(input_ids, past_key_values=own_cache(model.config)).logits
    assert_same(full[:, :WINDOW_LENGTH], expected[:, :WINDOW_LENGTH])
    for sizes in [[9, 7] + [1] * 64] if name in ORDERED else SPLITS.values():
        cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
        assert_same(feed(model, cache, input_ids, sizes), expected)
        assert cache.num_tokens_seen == 80 and cache.num_tokens_held == WINDOW_LENGTH


@pytest.mark.parametrize("name", [name for name in REFUSED_BEFORE if is_refused(name)])
def test_families_that_this_release_can_not_serve_are_refused(name):
    with pytest.raises(ValueError, match=REFUSED_BEFORE[name][1]):
        SinkCache.from_model(build_model(name, even_if_refused=True), WINDOW_LENGTH, NUM_SINK_TOKENS)


@pytest.mark.parametrize("name, implementation", CASES)
def test_a_row_does_not_depend_on_padding_or_other_rows(name, implementation):
    """Rows of 30, 2 (less than the sinks) and 19 tokens: before, at and past the edge at the same step, then three windows more.

    Would catch padding that becomes a sink, and positions or slots counted in columns.
    """
    model = shared_model(name, implementation)
    stream = random_ids()
    prompts = [stream[:, 5 : 5 + length] for length in (30, 2, 19)]
    input_ids, mask = left_padded(prompts)
    rest = stream[:, 32:].expand(3, -1)
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    feed(model, cache, input_ids, [16] + [1] * 14 if name in ORDERED else [30], mask)
    logits = feed(model, cache, rest, [1] * 48 if name in ORDERED else [1] * 14 + [(6, 2), 9, (19, 1)])
    for row, prompt in enumerate(prompts):
        alone = torch.cat([prompt, stream[:, 32:]], dim=1)
        expected = expected_logits(name, implementation, alone)
        assert_same(logits[row : row + 1], expected[:, prompt.shape[1] :])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ORDERED])
def test_the_oracle_notices_wrong_sinks_and_sinks_left_unmoved(name):
    """A test of the test: other sinks, or sinks at their first positions, must be far from the rules."""
    model = judged_model(name)
    if all(native_windows(model, WINDOW_LENGTH)):
        pytest.skip("all layers have short windows of their own, and no sinks")
    input_ids = random_ids(40)  # the first of those above
    expected = known_oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    others = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS, sinks=random_ids(NUM_SINK_TOKENS, seed=9))
    unmoved = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS, shift=False)
    assert difference(others, expected) > 100 * TOLERANCE
    assert difference(unmoved, expected) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-j", "deepseek-v3", "bloom"])
@pytest.mark.parametrize("seed", SEEDS)
def test_zero_sinks_is_a_plain_sliding_window(name, seed):
    """Compared with Mistral-like masking done by hand: the model itself over exactly the tokens in the window, where layers are one."""
    model = build_model(name, seed=seed)
    input_ids = random_ids(seed=seed)
    expected = oracle_logits(model, input_ids, WINDOW_LENGTH, 0)
    cache = SinkCache.from_model(model, WINDOW_LENGTH, 0)
    assert_same(feed(model, cache, input_ids, [10, 6] + [1] * 64), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "window_length, num_sink_tokens", [(1, 0), (2, 1), (5, 4), (16, 15), (16, 1), (17, 4), (64, 4), (79, 4), (80, 4)]
)
def test_every_shape_of_window(window_length, num_sink_tokens, seed):
    """The smallest windows, rings of one slot, and windows that the stream just reaches or just misses."""
    model = shared_model("qwen3", "sdpa", seed)
    input_ids = random_ids(seed=seed)
    expected = oracle_logits(model, input_ids, window_length, num_sink_tokens)
    for sizes in ([1] * 80, [11] * 7 + [3]):
        cache = SinkCache.from_model(model, window_length, num_sink_tokens)
        assert_same(feed(model, cache, input_ids, sizes), expected)


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_that_all_rows_have_alike(name, num_rows):
    """Would catch padding that is stored as text where no row differs from another: in one padded row, and in rows that are alike."""
    if is_refused(name):
        pytest.skip("refused with this release")
    model, text = judged_model(name), random_ids(40)
    cache, logits = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS), []
    for part in text.split([5, 4, 1, 0, 4, 26], dim=1):  # also of padding alone, and of padding over the edge
        mask = torch.tensor([[0] * 3 + [1] * part.shape[1]]).expand(num_rows, -1)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), part], 1).expand(num_rows, -1)
        if name in ORDERED:
            with pytest.raises(ValueError, match="All rows begin with 3 columns of padding.*Leave these columns out"):
                cache.prepare(padded, mask)
            return
        logits.append(model(**cache.prepare(padded, mask)).logits[:, 3:])
    assert cache.num_tokens_seen == 40
    assert_same(torch.cat(logits, 1), expected_logits(name, "sdpa", text).expand(num_rows, -1, -1))
