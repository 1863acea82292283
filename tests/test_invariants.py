"""The rules that are about time: shift, precision, bounded. (Parity, exactness, feeding and batch: test_families.py.)"""

import copy

import pytest
import torch
from packaging import version

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, assert_same, difference, feed, left_padded, move_ahead, random_ids, rings_of
from common import stdlib_text
from custom_generate import probe
from custom_generate.generate import SinkCache
from custom_generate.sinks import NUM_SHIFTS_AHEAD
from families import FAMILIES, TRANSFORMERS, build_model
from oracle import native_windows, oracle_logits

BILLION = 10**9


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-j", "llama-dynamic", "phi3-longrope", "deepseek-v3", "bloom"])
def test_a_stream_at_position_ten_to_the_nine_is_as_at_its_start(name):
    """Would catch positions that grow: float32 angles of 10**9 are noise, and dynamic RoPE would change its frequencies."""
    model = build_model(name)
    input_ids = random_ids(120)
    near = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    feed(model, near, input_ids[:, :40], [16] + [1] * 24)
    far = copy.deepcopy(near)
    move_ahead(far, BILLION // 192 * 192)
    sizes = [1] * 80 if name == "bloom" else [1] * 30 + [9, 20] + [1] * 21
    expected = feed(model, near, input_ids[:, 40:], sizes)
    assert_same(feed(model, far, input_ids[:, 40:], sizes), expected)
    assert far.num_tokens_seen >= BILLION - 192


def test_no_mask_is_as_long_as_the_text():
    """Nor anything else that the model is given or makes for itself from positions: a text of so many tokens would take more bytes than
    any machine has."""
    model = build_model("qwen3", "sdpa")
    near = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    feed(model, near, random_ids(40), [40])
    far = copy.deepcopy(near)
    move_ahead(far, 192 * 2**50)
    expected = feed(model, near, random_ids(10, seed=2), [1] * 10)
    assert_same(feed(model, far, random_ids(10, seed=2), [1] * 10), expected)


def test_positions_stay_below_twice_the_window_and_keys_are_rotated_once_a_window():
    """The bound behind shift and precision. Counted on what the model is given, and on what is written to the slots."""
    model = build_model("llama")
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    rebased_at, positions = [], []
    for token in range(10 * WINDOW_LENGTH):
        base = cache.stream.base[0]
        inputs = cache.prepare(random_ids(1, seed=token))
        positions.append(int(inputs["position_ids"]))
        if cache.stream.base[0] != base:
            rebased_at.append(token)
        with torch.no_grad():
            model(**inputs)
    assert max(positions) == 2 * WINDOW_LENGTH - 1
    assert positions[: 2 * WINDOW_LENGTH] == list(range(2 * WINDOW_LENGTH))
    assert rebased_at == list(range(2 * WINDOW_LENGTH, 10 * WINDOW_LENGTH, WINDOW_LENGTH))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_a_long_text_that_the_model_reads_for_itself_changes_nothing(name):
    """It leaves the frequencies of long texts on the model: before it is looked at, and between the passes of a cache."""
    model, ids, long_text = build_model(name), random_ids(), random_ids(600)
    expected, own = oracle_logits(model, ids, WINDOW_LENGTH, NUM_SINK_TOKENS), model(ids).logits
    model(long_text)
    if not torch.equal(model(ids).logits, own):
        pytest.skip("in this release, a model with dynamic NTK never goes back to the frequencies of short texts")
    cache, start = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS), 0
    for size in (10, 1, 1, 8, 20, 1, 39):
        model(long_text)
        assert_same(feed(model, cache, ids[:, start : start + size], [size]), expected[:, start : start + size])
        start += size


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic", "llama4"])
def test_what_is_computed_for_short_texts_holds_for_ever(name):
    """RoPE types that change their frequencies with the largest position, and layers that scale queries by it, must never see one so
    large: the reference is the same model with a limit that its stream does not reach."""
    limit = {"original_max_position_embeddings": 2 * WINDOW_LENGTH}
    if name == "llama-dynamic":
        limited = build_model(name, max_position_embeddings=2 * WINDOW_LENGTH)
    elif name == "llama4":
        limited = build_model(name, floor_scale=2 * WINDOW_LENGTH + 1, attn_scale=1.0)
    elif TRANSFORMERS.major < 5:
        pytest.skip("the scale of its scores follows the limit, so there is no reference")
    else:
        parameters = FAMILIES[name][1]["rope_parameters"] | limit
        limited = build_model(name, rope_parameters=parameters, **limit)
    unlimited = build_model(name)
    unlimited.load_state_dict(limited.state_dict())
    input_ids = random_ids()
    expected = oracle_logits(unlimited, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    for sizes in ([16] + [1] * 64, [16, 16, 16, 16, 16]):
        cache = SinkCache.from_model(limited, WINDOW_LENGTH, NUM_SINK_TOKENS)
        assert_same(feed(limited, cache, input_ids, sizes), expected)
    # Rows of 30 and 5 tokens go on by 2 and 20: neither comes to the limit, but 20 columns behind position 30 would.
    cache = SinkCache.from_model(limited, WINDOW_LENGTH, NUM_SINK_TOKENS)
    for slices in ((slice(0, 30), slice(0, 5)), (slice(30, 32), slice(5, 25))):
        ids, mask = left_padded([input_ids[:, each] for each in slices])
        logits = feed(limited, cache, ids, [ids.shape[1]], mask)
    assert_same(logits[:1, -2:], expected[:, 30:32])
    assert_same(logits[1:], expected[:, 5:25])


@pytest.mark.parametrize("name", ["qwen3", "llama", "tiny"])
def test_in_bfloat16_the_error_does_not_grow_with_age(name, tiny_model, tokenizer):
    """Twenty windows on, the error against the float32 oracle is that of the oracle itself in bfloat16.

    Would catch a key that is rounded at every step: the former class lost most of the slow rotations that way.
    """
    num_tokens, window_length = 20 * WINDOW_LENGTH + 80, WINDOW_LENGTH
    if name == "tiny":
        model = tiny_model
        input_ids = tokenizer(stdlib_text(held_out=True)[0], return_tensors="pt").input_ids[:, :num_tokens]
    else:
        model = build_model(name, num_hidden_layers=2)
        input_ids = random_ids(num_tokens)
    exact = oracle_logits(model, input_ids, window_length, NUM_SINK_TOKENS)[:, -80:]
    model = model.to(torch.bfloat16)
    rounded = oracle_logits(model, input_ids, window_length, NUM_SINK_TOKENS)[:, -80:]
    cache = SinkCache.from_model(model, window_length, NUM_SINK_TOKENS)
    ours = feed(model, cache, input_ids, [1] * num_tokens)[:, -80:]
    ratio = (ours.float() - exact).abs().mean() / (rounded.float() - exact).abs().mean()
    assert ratio <= 1.1


def test_a_rebase_costs_one_rounding(monkeypatch):
    """In 16 bits, positions are rarely lowered, since the keys are rotated and rounded then. Made to happen every window here, it costs a
    rounding and no more."""
    monkeypatch.setattr(probe, "MIN_REBASE_IN_16_BITS", 0)
    model, input_ids = build_model("qwen3", num_hidden_layers=2), random_ids(400)
    exact = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -80:]
    model = model.to(torch.bfloat16)
    rounded = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -80:]
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    ours = feed(model, cache, input_ids, [1] * 400)[:, -80:]
    assert cache.stream.base[0] >= 300
    assert (ours.float() - exact).abs().mean() <= 1.25 * (rounded.float() - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_half_precision_is_near_the_float32_oracle(dtype, implementation):
    """Chunks, a batch and single steps in the small formats: off by their rounding, not by a position."""
    if dtype == torch.float16 and version.parse(torch.__version__) < version.parse("2.2"):
        pytest.skip("torch 2.1 does not multiply float16 on a CPU")
    model = build_model("qwen3", implementation)
    input_ids = random_ids()
    expected = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    unmoved = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS, shift=False)
    model = model.to(dtype)
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    ids, mask = left_padded([input_ids, input_ids[:, 70:]])
    logits = feed(model, cache, ids, [1] * 30 + [9, 20] + [1] * 21, mask)[:1]
    scale = (unmoved - expected).abs().mean()
    assert (logits.float() - expected).abs().mean() < 0.2 * scale


def test_memory_is_constant_to_the_byte_once_the_window_is_full():
    model = build_model("qwen2-half-sliding", "sdpa")
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    feed(model, cache, random_ids(WINDOW_LENGTH), [WINDOW_LENGTH])
    held = cache.num_bytes_held
    places = [ring.slots.data_ptr() for ring in rings_of(cache)]
    feed(model, cache, random_ids(200), [1] * 50 + [50] * 3)
    assert cache.num_bytes_held == held
    assert [ring.slots.data_ptr() for ring in rings_of(cache)] == places
    # Four layers, two heads of 8, float32: two layers of 6 slots, two of 16. Beside them, of the key sinks that move, as they came and
    # with partners, and cosines and sines of the next rotations.
    num_full = sum(window is None for window in native_windows(model, WINDOW_LENGTH))
    assert num_full == 2
    slots = num_full * WINDOW_LENGTH + (4 - num_full) * 6
    sinks = num_full * 2 * NUM_SINK_TOKENS + (NUM_SHIFTS_AHEAD * NUM_SINK_TOKENS)
    assert held == 4 * 8 * 2 * (2 * slots + sinks) + 8 * WINDOW_LENGTH


def test_a_short_text_does_not_pay_for_a_long_window():
    model = build_model("llama")
    cache = SinkCache.from_model(model, 4096, NUM_SINK_TOKENS)
    feed(model, cache, random_ids(40), [40])
    assert all(ring.slots.shape[2] < 100 for ring in rings_of(cache))


def test_recomputing_the_oracle_in_another_way_gives_the_same():
    """The oracle itself, for one layer, where attention over a window depends on that window alone: the model run afresh over
    the sinks and the recent tokens, numbered 0 .. W-1."""
    model = build_model("llama", num_hidden_layers=1)
    input_ids = random_ids()
    expected = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    with torch.no_grad():
        for token in (WINDOW_LENGTH, 40, 79):
            recent = input_ids[:, token - (WINDOW_LENGTH - NUM_SINK_TOKENS) + 1 : token + 1]
            seen = torch.cat([input_ids[:, :NUM_SINK_TOKENS], recent], dim=1)
            assert difference(model(seen).logits[:, -1], expected[:, token]) < 1e-4
