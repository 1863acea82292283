"""State that is made under one grad mode and used under another: with gradients, without, and in inference mode.

A tensor that is made in inference mode can't be changed in place outside of it, and a tensor that has gradients can't be copied deeply. So
each way by which a cache makes or takes tensors is gone under each mode, and the stream goes on under each other one. What comes out has to
be what comes out when all of it is done without gradients, which itself is the oracle's.
"""

import copy
import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch

from checks import NUM_SINK_TOKENS, WINDOW, WINDOW_LENGTH, assert_same, build_recurrent_model, feed, random_ids, rings_of
from custom_generate.generate import SinkCache, generate
from families import build_model
from oracle import oracle_logits

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
KINDS = {
    "plain": {},
    "static": {"static": True},
    "static, eager": {"static": True},  # masks that are added to the scores
    "quantized": {"quantized": {"backend": "fp8", "q_group_size": 8, "residual_length": 2}},
    "offloaded": {"offloaded": True},
    "recurrent": {},
    "recurrent, static": {"static": True},
}
# Tokens seen under the first mode: some of the sinks; a full window whose positions were lowered.
NUM_SEEN = [3, 40]
STREAM = random_ids(100, num_rows=2)
# After the operation, under the first mode and then under the second: past the edge of the window, and past the positions that are lowered.
FIRST, SECOND, LAST = [1, 1, 5], [1] * 3 + [20] + [1] * 5 + [4] + [1] * 6, [2, 1]


def load(model, cache: SinkCache, folder: Path) -> SinkCache:
    cache.save(folder / "cache")
    return SinkCache.load(folder / "cache", model)


def begin_anew(model, cache: SinkCache, _) -> SinkCache:
    cache.reset()
    read(model, cache, STREAM[:, 50:70], [9, 1, 10])
    return cache


def draft(model, cache: SinkCache, _) -> SinkCache:
    """Also over the position at which positions are lowered, in passes over one token and over several."""
    cache.activate_past_recording()
    read(model, cache, STREAM[:, 80:88], [1] * 4 + [4])
    return cache


def take_back(model, cache: SinkCache, _) -> SinkCache:
    cache.crop(-8)
    cache.activate_past_recording(False)
    return cache


def write(model, cache: SinkCache, _) -> SinkCache:
    text = STREAM[:, : cache.num_tokens_seen + 4]
    generate(text, model=model, past_key_values=cache, max_new_tokens=3, do_sample=False)
    return cache


def rows_by(method: str, rows: torch.Tensor | int):
    def choose(model, cache: SinkCache, _) -> SinkCache:
        getattr(cache, method)(rows)
        return cache

    return choose


def nothing(model, cache: SinkCache, _) -> SinkCache:
    return cache


def copied(model, cache: SinkCache, _) -> SinkCache:
    return copy.deepcopy(cache)


# What is done under the second mode, and then under the first.
OPERATIONS = {
    "nothing": (nothing, nothing),
    "copy": (copied, nothing),
    "copy of a copy": (copied, copied),
    "load": (load, nothing),
    "reset": (begin_anew, nothing),
    "rows change places": (rows_by("reorder_cache", torch.tensor([1, 0])), nothing),
    "more rows, then fewer": (rows_by("batch_repeat_interleave", 2), rows_by("batch_select_indices", torch.tensor([3, 0]))),
    "drafts": (draft, take_back),
    "generate": (write, nothing),
}
CASES = [
    (kind, name, num_seen)
    for kind, name, num_seen in itertools.product(KINDS, OPERATIONS, NUM_SEEN)
    if not ("recurrent" in kind and name == "drafts")  # refused: states can't be turned back
    and (num_seen == max(NUM_SEEN) or name in ("nothing", "copy", "rows change places"))
    and (kind != "static, eager" or name in ("nothing", "reset", "rows change places"))  # else as any static window
]


@functools.cache
def model_of(kind: str) -> torch.nn.Module:
    """With parameters that ask for gradients, as models do that were not told otherwise."""
    if "recurrent" in kind:
        return build_recurrent_model("lfm2")
    return build_model("llama", "eager" if "eager" in kind else "sdpa", num_hidden_layers=2)


def read(model, cache: SinkCache, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """`feed` without the `no_grad` around it."""
    return feed.__wrapped__(model, cache, ids, sizes).detach().clone()


def run(kind: str, name: str, num_seen: int, first, second) -> tuple[torch.Tensor, SinkCache]:
    """Logits of what comes after the operation."""
    model, (operation, end), logits = model_of(kind), OPERATIONS[name], []
    with tempfile.TemporaryDirectory() as folder:
        with first():
            cache = SinkCache.from_model(model, **WINDOW, **KINDS[kind])
            logits.append(read(model, cache, STREAM[:, :num_seen], [num_seen - 2, 1, 1]))
        with second():
            cache = operation(model, cache, Path(folder))
        with first():
            cache = end(model, cache, Path(folder))
    start = num_seen
    for mode, sizes in ((first, FIRST), (second, SECOND), (first, LAST)):
        with mode():
            logits.append(read(model, cache, STREAM[:, start : start + sum(sizes)], sizes))
        start += sum(sizes)
    with torch.inference_mode():
        return torch.cat(logits, dim=1), cache


@functools.cache
def expected(kind: str, name: str, num_seen: int) -> torch.Tensor:
    return run(kind, name, num_seen, torch.no_grad, torch.no_grad)[0]


@pytest.mark.parametrize("first, second", [*itertools.permutations(MODES, 2)])
@pytest.mark.parametrize("kind, name, num_seen", CASES)
def test_state_of_one_mode_goes_on_in_another(kind, name, num_seen, first, second):
    """Would catch a tensor that was made in the mode of the caller, and a gradient that is kept with it."""
    logits, cache = run(kind, name, num_seen, MODES[first], MODES[second])
    assert_same(logits, expected(kind, name, num_seen))
    assert not any(ring.slots.requires_grad or ring.slots.is_inference() for ring in rings_of(cache))


@pytest.mark.parametrize("num_seen", NUM_SEEN)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "quantized"])  # see test_kinds_of_windows.py
def test_without_gradients_it_is_the_oracle(kind, num_seen):
    """What the table is compared with; the operations are compared with the oracle in test_cache.py and beside it."""
    logits = expected(kind, "nothing", num_seen)
    for row, stream in enumerate(STREAM[:, : logits.shape[1]]):
        assert_same(logits[row : row + 1], oracle_logits(model_of(kind), stream[None], WINDOW_LENGTH, NUM_SINK_TOKENS))
