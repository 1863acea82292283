"""Ctrl-C, or an error, at any line of the code: what comes after it is exact, or refused."""

import copy
import sys

import pytest
import torch

from checks import NUM_SINK_TOKENS, WINDOW, WINDOW_LENGTH, difference, feed, interrupted_at, left_padded, random_ids
from custom_generate.generate import SinkCache
from families import build_model
from oracle import TOLERANCE, oracle_logits


@pytest.fixture(scope="module")
def model():
    return build_model("llama", num_hidden_layers=2)


class InterruptAt:
    """Raises KeyboardInterrupt at the given line of our code that is run, counted from 0. `is_reached` says whether there was one."""

    def __init__(self, line: int):
        self.num_left, self.is_reached = line, False

    def trace(self, frame, event, argument):
        if "custom_generate" not in frame.f_code.co_filename:
            return None
        if event == "line" and not self.is_reached:
            self.is_reached = self.num_left == 0
            self.num_left -= 1
            if self.is_reached:
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, kind, *error) -> bool:
        sys.settrace(None)
        return kind is KeyboardInterrupt


def pass_over(num: int):
    return lambda model, cache, ids: feed(model, cache, ids[:, cache.num_tokens_seen :][:, :num], [num])


# name: (tokens before, operation, which tokens the text then has: of those before and of the operation)
OPERATIONS = {
    "one token": (25, pass_over(1)),
    "several tokens": (25, pass_over(5)),
    "sinks come": (2, pass_over(4)),
    "positions are lowered": (2 * WINDOW_LENGTH, pass_over(1)),
    "roll-back": (25, lambda model, cache, ids: cache.crop(-3)),
    "rows": (25, lambda model, cache, ids: cache.reorder_cache(torch.tensor([1, 0]))),
}


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_any_line(model, name, static):
    """Every third line, to save time."""
    num_before, operation = OPERATIONS[name]
    texts = [random_ids(60, seed=seed) for seed in range(1 + (name == "rows"))]
    before = SinkCache.from_model(model, **WINDOW, static=static)
    before.activate_past_recording(name == "roll-back")
    rows = torch.cat(texts)
    feed(model, before, rows[:, :num_before], [min(num_before, 20)] + [1] * (num_before - 20))
    expected = {row: oracle_logits(model, text, WINDOW_LENGTH, NUM_SINK_TOKENS) for row, text in enumerate(texts)}
    line, num_exact = 0, 0
    while True:
        cache = copy.deepcopy(before)
        with InterruptAt(line) as interrupt:
            operation(model, cache, rows)
        if not interrupt.is_reached:
            break
        line += 3
        try:
            seen = cache.num_tokens_seen
            # The operation was carried out as a whole, or not at all.
            order = [1, 0] if name == "rows" and bool(cache.known_token_ids(0)[1].equal(before.known_token_ids(1)[1])) else range(len(rows))
            logits = feed(model, cache, rows[[*order], seen : seen + 6], [1] * 6)
        except ValueError as error:
            assert "can't be repeated. Call reset()" in str(error)
            continue
        for place, row in enumerate(order):
            assert difference(logits[place : place + 1], expected[row][:, seen : seen + 6]) < TOLERANCE, f"line {line - 3}"
        num_exact += 1
    assert line > 60 and num_exact > 5


def test_an_error_in_the_middle_of_a_change_of_all_layers(model, monkeypatch):
    """Out of memory, say, when the keys of a layer are rotated, rolled back or reordered, and those before it were: refused."""
    ids = random_ids(60)
    for name, change in (
        ("rebase", lambda cache: cache.prepare(ids[:, 32:33])),
        ("undo", lambda cache: cache.crop(-3)),
        ("select_rows", lambda cache: cache.reorder_cache(torch.tensor([0]))),
    ):
        cache = SinkCache.from_model(model, **WINDOW)
        cache.activate_past_recording()
        feed(model, cache, ids[:, :32], [16] + [1] * 16)
        ring = cache.stream.layers[1].rings[0]
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(ring, name, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
            change(cache)
        for use in (lambda: cache.prepare(ids[:, 32:33]), lambda: copy.deepcopy(cache), lambda: cache.crop(-1)):  # noqa: B023
            with pytest.raises(ValueError, match=r"\(or change of the cache\) .* can't be repeated. Call reset\(\)"):
                use()
        cache.reset()
        expected = oracle_logits(model, ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
        assert difference(feed(model, cache, ids[:, :40], [16] + [1] * 24), expected[:, :40]) < TOLERANCE


def test_a_row_at_the_edge_of_its_window_that_is_not_the_longest(model):
    """An interrupted token overwrites the oldest token of that row, which a roll-back then needs."""
    first, second = random_ids(20, seed=1), random_ids(WINDOW_LENGTH, seed=2)
    cache = SinkCache.from_model(model, **WINDOW)
    ids, mask = left_padded([first, second])
    with torch.no_grad():
        model(**cache.prepare(ids, mask))
        with interrupted_at(model.model.layers[1]):
            model(**cache.prepare(random_ids(1, num_rows=2)))
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(-3)
    text = torch.cat([second[:, :-3], random_ids(5, seed=3)], 1)
    expected = oracle_logits(model, text, WINDOW_LENGTH, NUM_SINK_TOKENS)
    assert difference(feed(model, cache, text[:, -5:], [1] * 5), expected[:, -5:]) < TOLERANCE


def test_a_pass_in_another_dtype_is_refused_before_anything_is_written(model):
    """Prepared or not: the next pass may be of other length."""
    ids = random_ids(40)
    expected = oracle_logits(model, ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    for num_before in (20, 3):
        cache = SinkCache.from_model(model, **WINDOW)
        feed(model, cache, ids[:, :num_before], [num_before])
        new = ids[:, num_before : num_before + 5]
        inputs = cache.prepare(new) if num_before == 20 else {"input_ids": new, "past_key_values": cache}
        with pytest.raises(ValueError, match="into one dtype"), torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            model(**inputs)
        if num_before == 3:
            with torch.no_grad():
                logits = model(ids[:, 3:6], past_key_values=cache).logits
            assert difference(logits, expected[:, 3:6]) < TOLERANCE
        num_seen = cache.num_tokens_seen
        assert difference(feed(model, cache, ids[:, num_seen:], [5, 35 - num_seen]), expected[:, num_seen:]) < TOLERANCE


def test_rows_that_are_not_there_change_nothing(model):
    cache = SinkCache.from_model(model, **WINDOW)
    ids, mask = left_padded([random_ids(20, seed=1), random_ids(9, seed=2)])
    with torch.no_grad():
        model(**cache.prepare(ids, mask))
    for row in (-1, 2, True, 1.0):
        with pytest.raises(ValueError, match=f"There is no row {row}: this cache holds the rows 0 to 1"):
            cache.reorder_cache(torch.tensor([row, type(row)(0)]))
    cache.prepare(random_ids(1, num_rows=2))
    assert cache.num_tokens_seen_by_row == [20, 9]
