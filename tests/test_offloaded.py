"""An offloaded window: what is handed out is copied from where it is kept, and what is new is copied back. Nothing else differs.

Here both are the memory of the CPU. The copies are made all the same: what is handed out never shares memory with what is kept.
"""

import copy

import pytest
import torch
from checks import NUM_SINK_TOKENS, WINDOW, WINDOW_LENGTH, assert_same, feed, interrupted_at, left_padded, random_ids
from families import EAGER_ONLY, ORDERED, build_model, first_served
from oracle import oracle_logits

from custom_generate.generate import SinkCache, generate
from custom_generate.options import OFFLOADED

FEEDINGS = {
    "singly": [1] * 80,
    "chunks": [2, 1, 9, 1, 30, 1, 20, 1, 15],
    "one prompt": [70] + [1] * 10,
    "in parts": [17, (20, 4), 1, (36, 3), (6, 6)],
}


@pytest.fixture(scope="module")
def model():
    return build_model(first_served("gemma3", "qwen3"), "sdpa", num_hidden_layers=4)


def new_cache(model, **numbers) -> SinkCache:
    return SinkCache.from_model(model, **WINDOW | numbers, offloaded=True)


@pytest.mark.parametrize("sizes", FEEDINGS.values(), ids=FEEDINGS)
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "deepseek-v3", "falcon-alibi", "bloom", "gpt-j", "llama-dynamic"])
def test_it_is_exact(name, sizes):
    if name in ORDERED and sizes[0] != 1:
        sizes = [WINDOW_LENGTH] + [1] * 64
    model, ids = build_model(name, "eager" if name in EAGER_ONLY else "sdpa"), random_ids()
    logits = feed(model, new_cache(model), ids, sizes)
    assert_same(logits, oracle_logits(model, ids, WINDOW_LENGTH, NUM_SINK_TOKENS))


@pytest.mark.parametrize("num_sink_tokens", [0, 1])
def test_other_numbers_of_sinks(model, num_sink_tokens):
    ids = random_ids()
    logits = feed(model, new_cache(model, num_sink_tokens=num_sink_tokens), ids, FEEDINGS["chunks"])
    assert_same(logits, oracle_logits(model, ids, WINDOW_LENGTH, num_sink_tokens))


def test_what_is_handed_out_is_a_copy(model, monkeypatch):
    """And only what is new is written back: the slots of one token for each row."""
    cache, written = new_cache(model), []
    feed(model, cache, random_ids(40, num_rows=2), [40])
    update, store = OffloadedStates.update, OffloadedStates._store

    def checked_update(self, index, new):
        handed_out = update(self, index, new)
        kept, handed_over = self.host.untyped_storage().data_ptr(), handed_out.untyped_storage().data_ptr()
        assert kept != handed_over
        handed_out.fill_(float("nan"))  # nobody may see it but the layer it is for
        return update(self, index, new)

    def counting_store(self, index, new):
        before = self.host[index].clone()
        store(self, index, new)
        written.append(int((self.host[index] != before).any(-1).any(-1).sum()))

    monkeypatch.setattr(OffloadedStates, "update", checked_update)
    monkeypatch.setattr(OffloadedStates, "_store", counting_store)
    streams = random_ids(60, num_rows=2)
    logits = feed(model, cache, streams, [1] * 60)
    assert logits.isfinite().all() and set(written) == {0, 2}


def test_it_says_where_its_bytes_are(model):
    cache, plain = new_cache(model), SinkCache.from_model(model, **WINDOW)
    for each in (cache, plain):
        feed(model, each, random_ids(40), [39, 1])
    assert plain.num_bytes_on_host == 0 and "host" not in repr(plain)
    windows = [states.window for states in cache._states]
    slots = sum(len(states.slots) * window.num_recent for states, window in zip(cache._states, windows))
    assert cache.num_bytes_on_host == slots * 2 * 8 * 4  # heads, dimensions, bytes of a float32
    assert cache.num_bytes_held == plain.num_bytes_held
    assert f"offloaded=True, tokens_seen=40, tokens_held=16, bytes_held={cache.num_bytes_held}" in repr(cache)
    assert f"bytes_on_host={cache.num_bytes_on_host})" in repr(cache)


@pytest.mark.parametrize("num_seen", [2, 10, 16, 50])
def test_rows_come_and_go(model, num_seen):
    streams = random_ids(num_seen + 40, num_rows=3)
    cache = new_cache(model)
    feed(model, cache, streams[:, :num_seen], [num_seen])
    branch = copy.deepcopy(cache)
    feed(model, branch, random_ids(30, num_rows=3), [30])
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    logits = feed(model, cache, streams[[2, 0], num_seen:], [1] * 28 + [12])
    for row, before in enumerate([2, 0]):
        expected = oracle_logits(model, streams[before][None], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, num_seen:]
        assert_same(logits[row : row + 1], expected)


@pytest.mark.parametrize("sizes", [[5], [1] * 5])
def test_roll_back_of_rows_of_different_lengths(model, sizes):
    """Past the position at which keys are turned back, too: row 1 gets there with the drafts."""
    prompts = [random_ids(length, seed=length) for length in (3, 30, 60)]
    ids, mask = left_padded(prompts)
    cache = new_cache(model)
    feed(model, cache, ids, [50, 10], mask)
    cache.activate_past_recording()
    feed(model, cache, random_ids(5, seed=77).expand(3, -1), sizes)
    cache.crop(-5)
    rest = random_ids(20, seed=3)
    logits = feed(model, cache, rest.expand(3, -1), [1] * 15 + [5])
    for row, prompt in enumerate(prompts):
        expected = oracle_logits(model, torch.cat([prompt, rest], 1), WINDOW_LENGTH, NUM_SINK_TOKENS)[:, prompt.shape[1] :]
        assert_same(logits[row : row + 1], expected)


def test_an_interrupted_pass_can_be_repeated(model):
    cache, ids = new_cache(model), random_ids(60)
    feed(model, cache, ids[:, :40], [40])
    with interrupted_at(model.model.layers[2]):
        feed(model, cache, ids[:, 40:41], [1])
    expected = oracle_logits(model, ids, WINDOW_LENGTH, NUM_SINK_TOKENS)[:, 40:]
    assert_same(feed(model, cache, ids[:, 40:], [1] * 20), expected)


@pytest.mark.parametrize("name", OFFLOADED)
def test_generate(model, name):
    arguments = {**WINDOW, "max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    expected = generate(random_ids(30), model=model, **arguments)
    outputs = generate(random_ids(30), model=model, cache_implementation=name, **arguments)
    assert outputs.sequences.equal(expected.sequences)
    assert outputs.past_key_values.is_offloaded and outputs.past_key_values.num_bytes_on_host > 0
