"""Parity with `DynamicCache` on a model of your own, for your CI:

    pytest tests/test_parity.py --model ORG/NAME          (default: the tiny model of this repository)

Runs in the dtype and on the device that the model is loaded with. Past the window it checks what must hold without an oracle: the
same logits however the tokens are fed, and a cache that does not grow.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from custom_generate.generate import SinkCache, generate

TEXT = "The cache holds the first tokens and the most recent ones. What is in between is gone, and the text goes on. " * 8
# Of the logits' standard deviation, mean difference: rounding of the dtype, not a position that is off.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture(scope="module")
def model(request):
    name = request.config.getoption("--model") or str(Path(__file__).parents[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name)
    return model.to(device, model.dtype if device == "cuda" else torch.float32).eval()


@pytest.fixture(scope="module")
def input_ids(request, model) -> torch.Tensor:
    name = request.config.getoption("--model") or str(Path(__file__).parents[1])
    ids = AutoTokenizer.from_pretrained(name)(TEXT, return_tensors="pt").input_ids[:, :160]
    assert ids.shape[1] == 160
    return ids.to(model.device)


def assert_same(logits: torch.Tensor, reference: torch.Tensor) -> None:
    error = (logits.float() - reference.float()).abs().mean() / reference.float().std()
    assert error <= TOLERANCE[reference.dtype]


@torch.no_grad()
def feed(model, input_ids: torch.Tensor, sizes: list[int], **window) -> tuple[torch.Tensor, SinkCache]:
    cache = SinkCache.from_model(model, **window)
    logits = [model(**cache.prepare(chunk)).logits for chunk in input_ids.split(sizes, dim=1)]
    return torch.cat(logits, dim=1), cache


def test_below_the_window_logits_are_those_of_dynamic_cache(model, input_ids):
    with torch.no_grad():
        expected = model(input_ids, past_key_values=DynamicCache()).logits
    for sizes in ([160], [100] + [1] * 60):
        assert_same(feed(model, input_ids, sizes, window_length=160)[0], expected)


def test_below_the_window_the_text_is_that_of_dynamic_cache(model, input_ids):
    if model.dtype != torch.float32:
        pytest.skip("rounding may change a token; the logits are compared above")
    arguments = {"max_new_tokens": 40, "do_sample": False}
    assert generate(input_ids, model=model, window_length=200, **arguments).equal(model.generate(input_ids, **arguments))


def test_past_the_window_logits_do_not_depend_on_how_tokens_are_fed(model, input_ids):
    window = {"window_length": 48, "num_sink_tokens": 4}
    one_by_one, cache = feed(model, input_ids, [48] + [1] * 112, **window)
    assert cache.num_tokens_held == 48
    if not cache.traits.is_ordered:
        assert_same(feed(model, input_ids, [30, 40, 50, 40], **window)[0], one_by_one)


def test_past_the_window_the_cache_does_not_grow(model, input_ids):
    cache = feed(model, input_ids, [160], window_length=48)[1]
    held = cache.num_bytes_held
    text = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
    outputs = generate(text, model=model, past_key_values=cache, max_new_tokens=100, min_new_tokens=100, do_sample=False)
    assert outputs.shape[1] == 261 and cache.get_seq_length() == 260
    assert cache.num_bytes_held == held
