"""`SinkCache` as an object: what it says of itself, and every operation at every fill level."""

import copy
import functools

import pytest
import torch

from checks import (
    NUM_SINK_TOKENS,
    WINDOW_LENGTH,
    assert_same,
    build_recurrent_model,
    feed,
    interrupted_at,
    left_padded,
    random_ids,
    rings_of,
)
from custom_generate.generate import SinkCache, generate
from custom_generate.plan import Pass, Plan
from custom_generate.releases import MODELS_ASK_FOR_QUERY_OFFSET
from custom_generate.static import Cursor
from custom_generate.window import Window
from families import EAGER_ONLY, build_model
from oracle import known_oracle_logits, oracle_logits

MODEL = "gemma3"  # two native windows of 6 tokens, and two layers with full attention
# Tokens seen before the operation: fewer than the sinks, filling, at the edge, past it, past several re-bases.
FILL_LEVELS = [2, 10, WINDOW_LENGTH - 1, WINDOW_LENGTH, WINDOW_LENGTH + 1, 50]


def new_cache(model, **kwargs):
    return SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS, **kwargs)


def filled(model, num_seen: int, num_rows: int = 1) -> tuple[SinkCache, torch.Tensor]:
    """A cache that has seen streams of its own in each row, and those streams with 30 tokens to come."""
    cache, streams = new_cache(model), random_ids(num_seen + 30, seed=5, num_rows=num_rows)
    feed(model, cache, streams[:, :num_seen], [num_seen])
    return cache, streams


def assert_goes_on(model, cache: SinkCache, streams: torch.Tensor, num_seen: int) -> None:
    """The rest of the streams gets the logits that it would have got without whatever was done before."""
    rest = streams.shape[1] - num_seen
    logits = feed(model, cache, streams[:, num_seen:], [1] * (rest - 12) + [12])
    for row, stream in enumerate(streams):
        assert_same(logits[row : row + 1], known_oracle_logits(model, stream[None], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, num_seen:])


@pytest.mark.parametrize("num_tokens, num_parts", [(12, 3), (12, 12), (30, 2), (5, 1), (1, 1)])
@pytest.mark.parametrize("num_seen", FILL_LEVELS[3:])
def test_a_pass_in_parts_is_a_pass_like_any_other(model, num_seen, num_tokens, num_parts):
    """Rows of its own, longer and shorter than the window, and then on: what is written is what it would be undivided."""
    cache, streams = filled(model, num_seen, num_rows=2)
    feed(model, cache, streams[:, num_seen : num_seen + num_tokens], [(num_tokens, num_parts)])
    assert cache.num_tokens_seen == num_seen + num_tokens
    undivided, _ = filled(model, num_seen, num_rows=2)
    feed(model, undivided, streams[:, num_seen : num_seen + num_tokens], [num_tokens])
    more = random_ids(20, seed=9, num_rows=2)
    assert_same(feed(model, cache, more, [1] * 20), feed(model, undivided, more, [1] * 20))


def test_how_many_parts(model):
    """None while the window is filling; then as many as make them short, and a pass of that many can be prepared."""
    cache = new_cache(model)
    assert cache.num_parts_of(100) == 1
    feed(model, cache, random_ids(15), [15])
    assert cache.num_parts_of(100) == 1
    feed(model, cache, random_ids(1), [1])
    assert [cache.num_parts_of(num) for num in (1, 4, 8, 12, 100)] == [1, 1, 2, 3, 25]
    assert [cache.num_parts_of(num) for num in (13, 14, 50, 127)] == [1, 2, 10, 127]  # divisors only
    for num_tokens in range(1, 40):
        cache.prepare(random_ids(num_tokens), num_parts=cache.num_parts_of(num_tokens))
    for value in (0, -5, 2.5, "512", None):
        with pytest.raises(ValueError, match=f"num_columns must be an int of at least 1, got {value!r}"):
            cache.num_parts_of(value)
    assert Window(256, 4).part_length == 32 and Window(4096, 4).part_length == 256 and Window(1, 0).part_length == 1


def test_what_can_not_come_in_parts_is_refused(model):
    """The message says why; and the cache is as before."""
    cache, streams = filled(model, 15, num_rows=2)
    with pytest.raises(
        ValueError, match="num_parts=2 can't be used for this pass: the window of a row is not full yet.*Leave it out"
    ):
        cache.prepare(streams[:, 15:25], num_parts=2)
    feed(model, cache, streams[:, 15:16], [1])
    with pytest.raises(ValueError, match=r"10 tokens can't be divided into so many parts of one length. Take num_parts_of\(10\)"):
        cache.prepare(streams[:, 16:26], num_parts=3)
    for num_parts in (0, -2):
        wrong = rf"num_parts must be an int of at least 1, got {num_parts} \(int\); num_parts_of\(10\) says how many are best"
        with pytest.raises(ValueError, match=wrong):
            cache.prepare(streams[:, 16:26], num_parts=num_parts)
    for num_parts in (2.0, "2", True):
        with pytest.raises(ValueError, match=f"num_parts must be an int of at least 1, got {num_parts!r}"):
            cache.prepare(streams[:, 16:26], num_parts=num_parts)
    with pytest.raises(ValueError, match="a row has padding. Leave it out"):
        cache.prepare(streams[:, 16:26], torch.tensor([[0] + 9 * [1], 10 * [1]]), num_parts=2)
    assert_goes_on(model, cache, streams, 16)
    with pytest.raises(ValueError, match="Make it with SinkCache.from_model"):
        SinkCache().num_parts_of(5)
    with pytest.raises(ValueError, match="does not know how the model moves keys"):
        SinkCache().num_columns_at_once
    assert SinkCache().positions == [0]
    model = build_recurrent_model("lfm2")
    recurrent = new_cache(model)
    feed(model, recurrent, random_ids(20), [20])
    assert recurrent.num_parts_of(100) == 1


def test_slots_of_tokens_by_hand():
    """Two sinks and a ring of three, written down: the ground truth that no formula was used for."""
    window = Window(length=5, num_sinks=2)
    by_hand = [0, 1, 2, 3, 4, 2, 3, 4, 2, 3]
    assert [window.slot(token) for token in range(10)] == by_hand
    assert window.slot(torch.arange(10)).tolist() == by_hand
    slots = torch.arange(5)
    assert window.token(slots, torch.tensor(5)).tolist() == [0, 1, 2, 3, 4]
    assert window.token(slots, torch.tensor(6)).tolist() == [0, 1, 5, 3, 4]
    assert window.token(slots, torch.tensor(10)).tolist() == [0, 1, 8, 9, 7]
    seen_by_7 = [bool(window.sees(torch.tensor(7), torch.tensor(key))) for key in range(10)]
    assert seen_by_7 == [True, True, False, False, False, True, True, True, False, False]


def pass_of(num_seen: list[int], num_columns: int) -> Pass:
    """Of rows that have seen so many tokens each, and go on by as many as there are columns. It is recorded."""
    num_rows = len(num_seen)
    num_after = [seen + num_columns for seen in num_seen]
    shape = {"batch_size": num_rows, "num_columns": num_columns}
    return Pass(num_seen, [num_columns] * num_rows, num_after, [0] * num_rows, **shape, is_recorded=True)


@pytest.mark.parametrize("num_seen", [[50], [3, 20]])
def test_no_slot_is_written_twice_in_a_pass(num_seen):
    """Which of two writes wins is not defined on a GPU: a CPU takes the last one, which would hide it."""
    plan = Plan(Window(16, 4), pass_of(num_seen, 40), torch.device("cpu"))
    rows, slots, _ = plan.written
    assert len(set(zip(rows.tolist(), slots.tolist()))) == len(slots) == (12 if num_seen == [50] else 13 + 12)


def test_no_slot_is_written_twice_in_a_compiled_pass():
    """The same: sinks are written together with the token, which may be one of them."""
    cursor = Cursor(Window(16, 4), 2, torch.device("cpu"))
    for num_seen in [0, 0], [2, 3], [3, 20], [4, 5], [1, 1], [40, 41]:
        cursor.move(pass_of(num_seen, 1))
        for row, seen in zip(cursor.slots.tolist(), num_seen):
            assert len(set(row)) == 5 and row[-1] == Window(16, 4).slot(seen)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_padding_computes_is_a_number(implementation):
    """Nobody looks at it, but where a key of padding is masked, 0 * NaN is NaN. (Before torch 2.5, to attend to nothing gives that.)"""
    model = build_model("llama", implementation)
    ids, mask = left_padded([random_ids(5), random_ids(30)])
    for sizes in [30], [12, 18], [1] * 30:
        assert feed(model, new_cache(model), ids, sizes, mask).isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("num_columns", [1, 3])
def test_a_first_pass_that_is_all_padding(implementation, num_columns):
    """In all rows: there is no slot yet, and no sink to be kept."""
    model, streams = build_model("gemma3", implementation), random_ids(30, num_rows=2)
    cache = new_cache(model)
    feed(model, cache, streams[:, :num_columns], [num_columns], torch.zeros(2, num_columns, dtype=torch.long))
    assert cache.num_tokens_seen_by_row == [0, 0]
    assert_goes_on(model, cache, streams, 0)


@pytest.mark.parametrize("static", [False, True])
def test_ids_in_32_bits(model, static):
    """As numpy has them: the model takes them, too."""
    cache, streams = new_cache(model, static=static), random_ids(40, num_rows=2)
    mask = torch.ones_like(streams)
    mask[1, :3] = 0
    logits = feed(model, cache, streams.int(), [10, 20, *[1] * 10], mask)
    assert_same(logits[:1], known_oracle_logits(model, streams[:1], WINDOW_LENGTH, NUM_SINK_TOKENS))
    assert cache.known_token_ids(1)[0].tolist() == streams[1, 3:7].tolist()


@pytest.mark.parametrize("num_seen", FILL_LEVELS)
def test_it_says_what_it_holds(model, num_seen):
    cache, _ = filled(model, num_seen)
    assert cache.get_seq_length() == cache.num_tokens_seen == num_seen
    assert cache.num_tokens_held == min(num_seen, WINDOW_LENGTH)
    assert cache.get_max_length() == cache.get_max_cache_shape() == WINDOW_LENGTH
    assert [cache.get_max_length(layer) for layer in range(4)] == [6, WINDOW_LENGTH] * 2
    assert cache.batch_size == 1 and len(cache.layers) == 4 and cache.num_bytes_on_host == 0
    expected = f"window_length=16, num_sink_tokens=4, tokens_seen={num_seen}, tokens_held={min(num_seen, 16)}, bytes_held="
    assert expected in repr(cache)


@pytest.mark.parametrize("num_seen", FILL_LEVELS)
def test_a_deep_copy_goes_on_by_itself(model, num_seen):
    """Prefill once, continue many times: neither may write into the other."""
    cache, streams = filled(model, num_seen)
    branch = copy.deepcopy(cache)
    feed(model, branch, random_ids(40, seed=8), [20, 20])
    assert_goes_on(model, cache, streams, num_seen)
    assert branch.num_tokens_seen == num_seen + 40


@pytest.mark.parametrize("options", [{}, {"static": True}, {"offloaded": True}], ids=lambda each: str(*each))
@pytest.mark.parametrize("num_seen, num_new", [(10, 1), (50, 1), (50, 5)])
def test_a_copy_made_before_a_pass_that_was_prepared_leaves_it_to_be_run(model, options, num_seen, num_new):
    """The copy is where the cache was before `prepare`."""
    cache, streams = new_cache(model, **options), random_ids(num_seen + 30, num_rows=2)
    feed(model, cache, streams[:, :num_seen], [num_seen])
    inputs = cache.prepare(streams[:, num_seen : num_seen + num_new])
    branch = copy.deepcopy(cache)
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = known_oracle_logits(model, streams[:1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, num_seen : num_seen + num_new]
    assert_same(logits[:1], expected)
    assert_goes_on(model, cache, streams, num_seen + num_new)
    assert_goes_on(model, branch, streams, num_seen)


@pytest.mark.parametrize("num_seen", FILL_LEVELS)
@pytest.mark.parametrize(
    "operation, rows",
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ],
    ids=["reorder", "repeat", "select", "select-by-mask"],
)
def test_operations_on_the_batch(model, num_seen, operation, rows):
    cache, streams = filled(model, num_seen, num_rows=3)
    operation(cache)
    assert cache.batch_size == len(rows)
    assert_goes_on(model, cache, streams[rows], num_seen)


@pytest.mark.parametrize("lengths", [(3, 20, 60), (15, 16, 17), (1, 2, 3)])
def test_operations_on_a_batch_of_rows_of_different_lengths(model, lengths):
    """Counters, slots and the moves of the sinks are each row's own, and have to travel with it."""
    prompts = [random_ids(length, seed=length) for length in lengths]
    cache = new_cache(model)
    ids, mask = left_padded(prompts)
    feed(model, cache, ids, [ids.shape[1]], mask)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 4, 5]))
    rest = random_ids(40, seed=3)
    logits = feed(model, cache, rest.expand(4, -1), [1] * 30 + [10])
    for row, prompt in enumerate([prompts[2], prompts[0], prompts[1], prompts[1]]):
        expected = known_oracle_logits(model, torch.cat([prompt, rest], 1), WINDOW_LENGTH, NUM_SINK_TOKENS)[:, prompt.shape[1] :]
        assert_same(logits[row : row + 1], expected)


@pytest.mark.parametrize("num_seen_after", [2, 30])
def test_sinks_that_moved_and_sinks_that_are_new_change_places(num_seen_after):
    """A row whose sinks have moved long ago, and one that is about to get its own."""
    model, prompts = build_model("llama"), [random_ids(20, seed=2), random_ids(2, seed=3)]
    cache, (ids, mask) = new_cache(model), left_padded(prompts)
    feed(model, cache, ids, [19, 1], mask)
    cache.reorder_cache(torch.tensor([1, 0]))
    rest = random_ids(num_seen_after, seed=4)
    logits = feed(model, cache, rest.expand(2, -1), [1] * num_seen_after)
    for row, prompt in enumerate(prompts[::-1]):
        expected = oracle_logits(model, torch.cat([prompt, rest], 1), WINDOW_LENGTH, NUM_SINK_TOKENS)[:, prompt.shape[1] :]
        assert_same(logits[row : row + 1], expected)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_rows_that_have_seen_as_much_may_stand_at_different_positions(order):
    """Their positions were lowered at different times. Would catch rows that are taken for alike, and for another."""
    model, streams = build_model("llama"), random_ids(70, num_rows=2)
    cache, (ids, mask) = new_cache(model), left_padded([streams[:1, :40], streams[1:, :9]])
    feed(model, cache, ids, [40], mask)
    ids, mask = left_padded([streams[:1, 40:45], streams[1:, 9:45]])
    feed(model, cache, ids, [36], mask)
    assert cache.num_tokens_seen_by_row == [45, 45] and cache.positions[0] != cache.positions[1]
    cache.reorder_cache(torch.tensor(order))
    streams = streams[order]
    logits = feed(model, cache, streams[:, 45:], [1] * 15 + [10])
    for row, stream in enumerate(streams):
        assert_same(logits[row : row + 1], oracle_logits(model, stream[None], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, 45:])


def test_a_native_window_of_the_same_length_stays_as_it_is():
    """The model was trained so: no sinks."""
    model, streams = build_model("mistral-long-window", sliding_window=WINDOW_LENGTH), random_ids(50)
    logits = feed(model, new_cache(model), streams, [10] + [1] * 20 + [20])
    assert_same(logits, oracle_logits(model, streams, WINDOW_LENGTH, NUM_SINK_TOKENS))
    with torch.no_grad():
        assert_same(logits, model(streams).logits)


@pytest.mark.parametrize("num_seen", FILL_LEVELS)
def test_reset_makes_it_new(model, num_seen):
    cache, _ = filled(model, num_seen, num_rows=2)
    cache.reset()
    assert cache.num_tokens_seen == cache.num_bytes_held == 0 and cache.batch_size == -1
    streams = random_ids(60, seed=6)
    assert_goes_on(model, cache, streams, 0)


def test_after_a_reset_a_model_may_prepare_passes_itself():
    """Positions begin anew, too."""
    model, streams = build_model("llama"), random_ids(60)
    cache = new_cache(model)
    feed(model, cache, streams, [20] * 3)
    cache.reset()
    with torch.no_grad():
        logits = model(streams[:, :WINDOW_LENGTH], past_key_values=cache).logits
    assert_same(logits, oracle_logits(model, streams[:, :WINDOW_LENGTH], WINDOW_LENGTH, NUM_SINK_TOKENS))


def test_a_pass_that_would_go_past_the_last_position_begins_at_a_lower_one():
    """By one, and no longer than what is left from there."""
    model, streams = build_model("gpt-j", max_position_embeddings=60), random_ids(70)
    logits = feed(model, new_cache(model), streams, [20, 41, 9])
    assert_same(logits, feed(model, new_cache(model), streams, [10] * 7))


@pytest.mark.parametrize("num_seen", FILL_LEVELS)
@pytest.mark.parametrize("num_draft, num_rejected", [(1, 1), (5, 2), (5, 5), (5, 0)])
def test_draft_tokens_that_are_rolled_back_leave_no_trace(model, num_seen, num_draft, num_rejected):
    """Feeding: drafts that did not stand. Would catch evicted tokens that are gone, and sinks overwritten by a draft."""
    cache, streams = filled(model, num_seen)
    num_stand = num_draft - num_rejected
    draft = torch.cat([streams[:, num_seen : num_seen + num_stand], random_ids(num_rejected or 1, seed=77)], 1)[:, :num_draft]
    cache.activate_past_recording()
    feed(model, cache, draft, [num_draft])
    cache.crop(-num_rejected)
    assert cache.num_tokens_seen == num_seen + num_stand
    assert_goes_on(model, cache, streams, num_seen + num_stand)


def test_roll_back_over_several_passes_and_a_rebase(model):
    """An assistant drafts token by token; here the drafts also cross the position at which all keys are turned back."""
    num_seen = 2 * WINDOW_LENGTH - 2
    cache, streams = filled(model, num_seen)
    cache.activate_past_recording()
    feed(model, cache, random_ids(5, seed=77), [1] * 5)
    assert cache.stream.base != [0]
    cache.crop(-5)
    assert_goes_on(model, cache, streams, num_seen)


@pytest.mark.parametrize("sizes", [[12], [1] * 14, [5] * 3, [12, 12]], ids=str)
def test_roll_back_of_more_than_the_ring_holds(sizes):
    """Slots that were overwritten twice are put back in the right order; and so are the ids."""
    model, num_seen = build_model("llama"), 50
    cache, streams = filled(model, num_seen)
    known = cache.known_token_ids(0)
    cache.activate_past_recording()
    feed(model, cache, random_ids(sum(sizes), seed=78), sizes)
    cache.crop(-sum(sizes))
    assert all(ids.equal(before) for ids, before in zip(cache.known_token_ids(0), known, strict=True))
    assert_goes_on(model, cache, streams, num_seen)


def test_roll_back_of_rows_of_different_lengths(model):
    prompts = [random_ids(length, seed=length) for length in (3, 20, 60)]
    cache = new_cache(model)
    ids, mask = left_padded(prompts)
    feed(model, cache, ids, [60], mask)
    cache.activate_past_recording()
    feed(model, cache, random_ids(4, seed=77).expand(3, -1), [4])
    cache.crop(-4)
    rest = random_ids(20, seed=3)
    logits = feed(model, cache, rest.expand(3, -1), [1] * 20)
    for row, prompt in enumerate(prompts):
        expected = known_oracle_logits(model, torch.cat([prompt, rest], 1), WINDOW_LENGTH, NUM_SINK_TOKENS)[:, prompt.shape[1] :]
        assert_same(logits[row : row + 1], expected)


def test_what_was_recorded_is_let_go(model):
    """Recording costs memory only between two calls of crop, and ends where transformers ends it: at the layers."""
    cache, streams = filled(model, 50)
    held = cache.num_bytes_held
    cache.activate_past_recording()
    feed(model, cache, streams[:, 50:55], [5])
    assert all(ring.log for ring in rings_of(cache))
    cache.crop(0)
    assert not any(ring.log for ring in rings_of(cache)) and cache.num_bytes_held == held
    for layer in cache.layers:
        layer.record_past = False
    assert not any(layer.record_past for layer in cache.layers)
    feed(model, cache, streams[:, 55:60], [5])
    assert not any(ring.log for ring in rings_of(cache))
    assert_goes_on(model, cache, streams, 60)


def test_what_was_recorded_before_passes_that_were_not_is_not_put_back(model):
    """Recording ends at the layers, without a crop: what those passes evicted is gone."""
    cache, streams = filled(model, 50)
    cache.activate_past_recording()
    feed(model, cache, streams[:, 50:54], [4])
    for layer in cache.layers:
        layer.record_past = False
    feed(model, cache, streams[:, 54:56], [2])
    with pytest.raises(ValueError, match=r"but for that of the last 0\."):
        cache.crop(-4)
    assert_goes_on(model, cache, streams, 56)


def test_what_was_recorded_is_what_the_row_with_the_fewest_new_tokens_has(model):
    """A row that went on by one token, beside one that went on by four, has nothing recorded of its tokens before."""
    cache, streams = filled(model, 50, num_rows=2)
    cache.activate_past_recording()
    feed(model, cache, random_ids(4, seed=77, num_rows=2), [4], torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]]))
    with pytest.raises(ValueError, match=r"but for that of the last 1\."):
        cache.crop(-3)
    cache.crop(-1)
    assert cache.num_tokens_seen_by_row == [53, 50]


def test_what_was_not_recorded_of_the_longest_row_is_not_taken_back(model):
    cache, (ids, mask) = new_cache(model), left_padded([random_ids(60), random_ids(3)])
    feed(model, cache, ids, [60], mask)
    with pytest.raises(ValueError, match=r"but for that of the last 0\."):
        cache.crop(-1)


def test_what_was_recorded_of_other_rows_is_not_put_back(model):
    cache, streams = filled(model, 50, num_rows=2)
    cache.activate_past_recording()
    feed(model, cache, streams[:, 50:54], [4])
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"but for that of the last 0\."):
        cache.crop(-1)
    assert_goes_on(model, cache, streams[1:], 54)


@pytest.mark.parametrize("has_native_windows", [True, False])
def test_crop_refuses_what_it_can_not_restore(model, has_native_windows):
    """Also a pass that is longer than the ring, and be it by one token: the first of it has not been held at any time."""
    model = model if has_native_windows else build_model("llama")
    cache, streams = filled(model, 50)
    cache.activate_past_recording()
    feed(model, cache, streams[:, 50:63], [13])
    with pytest.raises(ValueError, match=r"but for that of the last 0\."):
        cache.crop(-1)
    assert_goes_on(model, cache, streams, 63)
    cache, streams = filled(model, 50)
    with pytest.raises(ValueError, match=r"for another answer, make a copy there: copy.deepcopy\(cache\).*activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="only 50"):
        cache.crop(-51)
    assert_goes_on(model, cache, streams, 50)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "gpt-j", "cohere", "mistral-short-window", "mistral-long-window", "llama4", "glm-moe-dsa"]
)
def test_the_model_may_prepare_passes_itself_one_token_at_a_time(name, implementation):
    """`model(ids, past_key_values=cache)` as in the older documentation: any family whose scores don't depend on the order.

    Where models can't learn from the cache where their queries stand, they would hide keys behind a native window or chunk: refused.
    """
    if name in EAGER_ONLY and implementation != "eager":
        pytest.skip("no such attention")
    model, input_ids = build_model(name, implementation), random_ids()
    has_local_attention = name in ("gemma3", "mistral-short-window", "mistral-long-window", "llama4")
    num_first = 6 if has_local_attention else WINDOW_LENGTH
    cache = new_cache(model)
    if has_local_attention and not MODELS_ASK_FOR_QUERY_OFFSET:
        with pytest.raises(ValueError, match="native windows or chunks that does not fit"):
            model(input_ids[:, :num_first], past_key_values=cache)
        return
    with torch.no_grad():
        logits = [model(input_ids[:, :num_first], past_key_values=cache).logits]
        logits += [model(input_ids[:, t : t + 1], past_key_values=cache).logits for t in range(num_first, 80)]
    assert_same(torch.cat(logits, 1), oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS))


def test_a_pass_that_is_interrupted_can_be_repeated(model):
    """At a single token: the next try finds everything as it was."""
    cache, streams = filled(model, 50)
    with interrupted_at(model.model.layers[2]):
        feed(model, cache, streams[:, 50:51], [1])
    assert cache.num_tokens_seen == 50
    assert_goes_on(model, cache, streams, 50)


@pytest.mark.parametrize("static", [False, True])
def test_after_reset_nothing_of_the_former_text_is_put_back(model, static):
    """What was recorded of the text before is let go of, or a crop puts its keys in the place of those of the new text."""
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS, static=static)
    cache.activate_past_recording()
    feed(model, cache, random_ids(40, seed=5), [20, *[1] * 20])
    cache.reset()
    ids = random_ids(30)
    logits = [feed(model, cache, ids[:, :3], [3])]
    feed(model, cache, random_ids(2, seed=6), [2])
    cache.crop(-2)
    logits.append(feed(model, cache, ids[:, 3:], [1] * 27))
    assert_same(torch.cat(logits, 1), oracle_logits(model, ids, WINDOW_LENGTH, NUM_SINK_TOKENS))


def test_a_text_that_is_taken_back_whole_leaves_no_trace(model):
    """Tokens that came without ids make the ids unknown, until all of them are taken back."""
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    with torch.no_grad():
        model(**cache.prepare(inputs_embeds=model.get_input_embeddings()(random_ids(5))))
    assert cache.known_token_ids(0) is None
    cache.crop(-5)
    ids = random_ids(6, seed=2)
    feed(model, cache, ids, [4, 1, 1])
    assert [known.tolist() for known in cache.known_token_ids(0)] == [ids[0, :4].tolist(), ids[0].tolist()]


@pytest.mark.parametrize("static", [False, True])
def test_a_pass_that_is_refused_leaves_the_one_that_was_prepared(model, static):
    cache, streams = new_cache(model, static=static), random_ids(50, num_rows=2)
    feed(model, cache, streams[:, :20], [20])
    inputs = cache.prepare(streams[:, 20:21])
    with pytest.raises(ValueError, match="holds 2 rows"):
        cache.prepare(random_ids(1, num_rows=3))
    with torch.no_grad():
        model(**inputs)
    assert_goes_on(model, cache, streams, 21)


@pytest.mark.parametrize("num_layers", [0, 1])
def test_a_first_pass_that_is_interrupted_can_be_repeated(model, num_layers):
    """When some layers hold the sinks, and others have not even room for them: nothing of that pass is kept."""
    cache, streams = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS), random_ids(num_rows=2)
    with interrupted_at(model.model.layers[num_layers]):
        feed(model, cache, random_ids(5, seed=5, num_rows=2), [5])
    assert cache.num_tokens_seen == 0
    logits = feed(model, cache, streams, [6, 20, *[1] * 54])
    for row in range(2):
        assert_same(logits[row : row + 1], known_oracle_logits(model, streams[row : row + 1], WINDOW_LENGTH, NUM_SINK_TOKENS))


def test_an_interrupted_pass_that_can_not_be_repeated_is_not_glossed_over(model):
    cache, streams = filled(model, 50)
    with interrupted_at(model.model.layers[2]):
        feed(model, cache, streams[:, 50:60], [10])
    with pytest.raises(ValueError, match=r"not been through all 4 layers, and can.t be repeated.*reset\(\)"):
        cache.prepare(streams[:, 50:51])
    cache.reset()
    assert_goes_on(model, cache, streams, 0)


FP8 = {"backend": "fp8", "q_group_size": 8, "residual_length": 8}


@pytest.mark.parametrize("is_recording", [False, True])
@pytest.mark.parametrize("num_seen", [10, 75])
@pytest.mark.parametrize("options", [{}, {"static": True}, {"offloaded": True}, {"quantized": FP8}], ids=lambda each: str(*each))
def test_a_pass_that_is_given_up_leaves_nothing_behind(model, options, num_seen, is_recording):
    """Prepared and not run, or interrupted; then others come and are taken back. (At 75 there are blocks that were quantized before
    positions were lowered, in places that the first pass would take.)"""
    cache, streams = SinkCache.from_model(model, 32, NUM_SINK_TOKENS, **options), random_ids(num_seen + 40)
    feed(model, cache, streams[:, :num_seen], [1] * num_seen)
    if is_recording:
        cache.activate_past_recording()
    untouched = copy.deepcopy(cache)
    cache.prepare(random_ids(20, seed=8))
    with interrupted_at(model.model.layers[2]):
        feed(model, cache, random_ids(1, seed=9), [1])
    logits = []
    for each in (cache, untouched):
        num = 10
        feed(model, each, streams[:, num_seen : num_seen + num], [6, 1, 3])
        if is_recording:
            each.crop(-8)
            num = 2
        logits.append(feed(model, each, streams[:, num_seen + num :], [5] + [1] * (35 - num)))
    assert_same(*logits)


@pytest.mark.parametrize("how", ["prepared", "interrupted"])
@pytest.mark.parametrize("options", [{}, {"static": True}, {"offloaded": True}, {"quantized": FP8}], ids=lambda each: str(*each))
def test_the_first_token_to_evict_another_one_is_given_up_and_tokens_are_taken_back(options, how):
    """Without a record: all of the text was still there before, and is there again."""
    model, num_seen = build_model("llama", "sdpa"), 20 if "quantized" in options else 32
    cache, streams = SinkCache.from_model(model, 32, NUM_SINK_TOKENS, **options), random_ids(num_seen + 20)
    feed(model, cache, streams[:, :num_seen], [num_seen])
    if how == "prepared":
        cache.prepare(random_ids(1, seed=9))
    else:
        with interrupted_at(model.model.layers[2]):
            feed(model, cache, random_ids(1, seed=9), [1])
    cache.crop(-5)
    again = SinkCache.from_model(model, 32, NUM_SINK_TOKENS, **options)
    feed(model, again, streams[:, : num_seen - 5], [num_seen - 5])
    logits = [feed(model, each, streams[:, num_seen - 5 :], [1] * 25) for each in (cache, again)]
    assert_same(*logits)
    assert not any(ring.log for ring in rings_of(cache))


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next", "granitemoehybrid", "falcon_h1"])
def test_recurrent_states_that_have_gone_on_are_not_glossed_over(model_type, tmp_path):
    """They go on in place, layer by layer. Nobody can tell how far a pass got that did not end, so nothing goes on after it but `reset`."""
    model, streams = build_recurrent_model(model_type), random_ids(60)
    before, expected = new_cache(model), oracle_logits(model, streams, WINDOW_LENGTH, NUM_SINK_TOKENS)
    feed(model, before, streams[:, :40], [40])
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == len(before.layers))
    for layer in (*layers, model.get_output_embeddings()):
        cache = copy.deepcopy(before)
        with interrupted_at(layer):
            feed(model, cache, streams[:, 40:41], [1])
        if layer is model.get_output_embeddings():  # all states are there
            num_seen = 41
        else:
            with pytest.raises(ValueError, match=r"not been through all \d+ layers"):
                cache.prepare(streams[:, 40:41])
            with pytest.raises(ValueError, match="in the middle of a pass"):
                cache.save(tmp_path / "cache")
            assert not any(tmp_path.iterdir())
            cache.reset()
            num_seen = 0
        logits = feed(model, cache, streams[:, num_seen:], [60 - num_seen])
        assert_same(logits, expected[:, num_seen:])


@pytest.mark.parametrize("model_type", ["lfm2", "granitemoehybrid"])
def test_padding_in_the_middle_of_a_text_does_not_become_part_of_recurrent_states(model_type):
    """Before a text, states are zero and padding leaves them so. In it, transformers' layers go on over padding: a pass in which a row has
    both is refused, and the states of a row that has nothing else are put back."""
    model, streams = build_recurrent_model(model_type, "5.15"), random_ids(50, num_rows=2)
    cache, (ids, mask) = new_cache(model), left_padded([streams[:1, :20], streams[1:, :9]])
    feed(model, cache, ids, [5] * 4, mask)
    before = repr(cache)
    later, mask = left_padded([streams[:1, 20:24], streams[1:, 9:11]])
    with pytest.raises(ValueError, match="Row 1 of the batch goes on by 2 tokens and another one by 4.*Split the pass"):
        cache.prepare(later, mask)
    assert repr(cache) == before
    feed(model, cache, later, [2, 2], mask)
    feed(model, cache, random_ids(5, num_rows=2), [1, 4], torch.zeros(2, 5))  # all rows are idle
    assert torch.isfinite(feed(model, copy.deepcopy(cache), later, [4])).all()  # a copy that was made right after
    feed(model, cache, streams[:, 11:20], [9], torch.tensor([[0], [1]]).expand(-1, 9))
    logits = feed(model, cache, torch.cat([streams[:1, 24:50], streams[1:, 20:46]]), [8] + [1] * 18)
    for row, start in ((0, 24), (1, 20)):
        expected = oracle_logits(model, streams[row : row + 1], WINDOW_LENGTH, NUM_SINK_TOKENS)
        assert_same(logits[row : row + 1], expected[:, start : start + 26])


@functools.cache
def shared_qwen3_next() -> torch.nn.Module:
    return build_recurrent_model("qwen3_next", "5.15")


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_rows_with_recurrent_states_go_on_by_different_numbers_of_tokens(options, is_inference):
    """Three turns of a batch in which each row has a number of its own; the first with these options."""
    model, streams = shared_qwen3_next(), random_ids(200, num_rows=3)
    cache, texts = None, [streams[row : row + 1, :0] for row in range(3)]
    for turn in ((20, 3, 9), (2, 30, 1), (5, 5, 17)):
        texts = [torch.cat([text, streams[row : row + 1, : turn[row]]], 1) for row, text in enumerate(texts)]
        ids, mask = left_padded(texts)
        options = options if cache is None else {}
        with torch.inference_mode(is_inference):
            outputs = generate(
                ids, attention_mask=mask, model=model, window_length=WINDOW_LENGTH, past_key_values=cache, max_new_tokens=3,
                do_sample=False, return_dict_in_generate=True, output_logits=True, **options,
            )  # fmt: skip
        cache = outputs.past_key_values
        texts = [torch.cat([text, outputs.sequences[row : row + 1, ids.shape[1] :]], 1) for row, text in enumerate(texts)]
        for row, text in enumerate(texts) if "num_beams" not in options else ():
            expected = known_oracle_logits(model, text[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -3:]
            assert_same(torch.stack(outputs.logits, 1)[row : row + 1], expected)


def test_a_loop_that_forgot_no_grad_keeps_no_graph(model):
    """Would catch a graph that grows with each token, through all that was written in place."""
    cache = new_cache(model)
    input_ids = random_ids(60)
    for token in range(60):
        logits = model(**cache.prepare(input_ids[:, token : token + 1])).logits
    assert logits.requires_grad and not any(ring.slots.requires_grad for ring in rings_of(cache))
    assert_same(logits.detach(), oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -1:])


def test_the_default_dtype_of_torch_does_not_matter():
    """Rotations are computed in float32, whatever new tensors are by default."""
    model = build_model("llama")
    stream = random_ids(50)
    expected = oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        logits = feed(model, SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS), stream, [10] + [1] * 20 + [20])
    finally:
        torch.set_default_dtype(before)
    assert_same(logits, expected)
