"""`num_bytes_held` is what is held: all tensors that can be reached from a cache, in every mode and at every fill level.

Counted are whole storages, each once: a view of a few columns that keeps a large tensor alive costs all of it. Not counted is what all
caches of a model share, what was found out about the model.
"""

import gc
import types
from dataclasses import dataclass, field

import pytest
import torch
from packaging import version
from transformers import PretrainedConfig

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, feed, random_ids, rings_of
from custom_generate.generate import SinkCache, generate
from custom_generate.probe import ModelTraits
from custom_generate.rotation import Rotation
from families import ORDERED, TRANSFORMERS, build_model
from zoo import ZOO_RELEASE, build_zoo_model

NOT_HELD = (type, types.ModuleType, types.FunctionType, torch.nn.Module, PretrainedConfig, ModelTraits, Rotation)


def num_bytes(objects) -> int:
    """Of the storages of these tensors."""
    tensors = [each for each in objects if isinstance(each, torch.Tensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def reachable(*roots) -> list:
    """All objects that the garbage collector can reach from these."""
    found, left = {}, list(roots)
    while left:
        each = left.pop()
        if id(each) not in found and not isinstance(each, NOT_HELD):
            found[id(each)] = each
            left += gc.get_referents(each)
    return list(found.values())


@dataclass
class Mode:
    """A model and a cache for it, and whether its rows go on by different numbers of tokens."""

    name: str
    implementation: str = "sdpa"
    numbers: tuple[int, int] = (WINDOW_LENGTH, NUM_SINK_TOKENS)
    is_padded: bool = False
    options: dict = field(default_factory=dict)

    def model(self):
        if self.name == "lfm2":
            if TRANSFORMERS < version.parse(ZOO_RELEASE):
                pytest.skip(f"no recurrent model that all releases can serve; transformers {TRANSFORMERS}")
            return build_zoo_model(self.name)
        return build_model(self.name, self.implementation)


MODES = {
    "eager": Mode("llama", "eager"),
    "padded batch": Mode("llama", is_padded=True),
    "native windows": Mode("gemma3"),
    "native windows, padded batch": Mode("gemma3", is_padded=True),
    "no sinks": Mode("llama", numbers=(WINDOW_LENGTH, 0)),
    "more room than is used": Mode("llama", numbers=(100, 40)),
    "latent attention": Mode("deepseek-v3", "eager"),
    "ordered": Mode("bloom", "eager", is_padded=True),
    "recurrent": Mode("lfm2"),
    "recurrent, static": Mode("lfm2", options={"static": True}),
    "static": Mode("llama", options={"static": True}),
    "static, padded batch": Mode("gemma3", is_padded=True, options={"static": True}),
}


@pytest.mark.parametrize("name", MODES)
def test_it_says_how_many_bytes_it_holds(name):
    """Would catch what is kept for nothing as well as what is not counted: logs of roll-back, masks, copies of a long pass, views."""
    mode, model = MODES[name], MODES[name].model()
    cache = SinkCache.from_model(model, *mode.numbers, **mode.options)
    can_go_past, is_recurrent = mode.name not in ORDERED, mode.name == "lfm2"

    def check(when: str) -> None:
        assert cache.num_bytes_held == num_bytes(reachable(cache)), when

    def go_on(sizes: list[int]) -> None:
        num_rows = 2 if cache.batch_size == -1 else cache.batch_size
        mask = torch.ones(num_rows, sum(sizes), dtype=torch.long)
        if mode.is_padded:
            mask[0, : max(sizes) // 2] = 0
        feed(model, cache, random_ids(sum(sizes), num_rows=num_rows), sizes, mask if mode.is_padded else None)

    check("new")
    for sizes, when in [
        ([1], "one token"),
        ([8], "filling"),
        ([1] * (WINDOW_LENGTH - 8), "full"),
        ([23] if can_go_past else [1] * 23, "after a long pass"),
        ([1] * 40, "after re-bases"),
    ]:
        go_on(sizes)
        check(when)
    if not is_recurrent:
        cache.activate_past_recording()
        go_on([5, 1, 1] if can_go_past else [1] * 7)
        assert any(ring.log for ring in rings_of(cache))
        check("while recording")
        cache.crop(-3)
        check("after crop")
        for layer in cache.layers:
            layer.record_past = False
    cache.batch_repeat_interleave(2)
    check("more rows")
    cache.batch_select_indices(torch.tensor([2]))
    check("one row")
    go_on([1, 1])
    check("one row, later")
    cache.reset()
    check("reset")
    generate(random_ids(30, num_rows=3), model=model, past_key_values=cache, max_new_tokens=5, do_sample=False)
    check("generated")


@pytest.mark.parametrize("name", ["eager", "native windows, padded batch", "static"])
def test_after_a_pass_nothing_else_is_alive(name):
    """Not in the cache, not beside it: tensors of the whole process."""
    mode, model = MODES[name], MODES[name].model()
    cache = SinkCache.from_model(model, *mode.numbers, **mode.options)
    stream = random_ids(200, num_rows=2)

    def alive() -> int:
        gc.collect()
        return num_bytes(each for each in gc.get_objects() if type(each) is torch.Tensor) - cache.num_bytes_held

    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :7] = 0
    feed(model, cache, stream[:, :50], [50], mask)
    feed(model, cache, stream[:, 50:52], [1, 1])
    before = alive()
    feed(model, cache, stream[:, 52:90], [30, 8])
    assert alive() == before, "after a long pass"
    feed(model, cache, stream[:, 90:100], [1] * 10)
    assert alive() == before, "after single tokens"


def test_the_walk_finds_what_is_hidden():
    """A test of the test: a view of one number, in a list in an attribute, keeps all of its storage alive."""
    model = build_model("llama")
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    feed(model, cache, random_ids(5), [5])
    before = num_bytes(reachable(cache))
    cache.layers[0].hidden = [{"view": torch.zeros(1000)[:1]}]
    assert num_bytes(reachable(cache)) == before + 4000 and cache.num_bytes_held == before


def test_a_text_is_let_go_when_it_has_been_read():
    """Each pass is a view of the whole text; a cache that keeps the last one keeps the text, and grows with it."""
    model = build_model("llama", "sdpa")
    held = []
    for num_tokens in (60, 600):
        cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
        feed(model, cache, random_ids(num_tokens), [WINDOW_LENGTH] + [1] * (num_tokens - WINDOW_LENGTH))
        held.append(num_bytes(reachable(cache)))
    assert held[0] == held[1]
