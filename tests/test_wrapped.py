"""Models that something is wrapped around, or that were changed: they give the oracle's logits, or are refused with what to do."""

import inspect
import re

import pytest
import torch
import transformers

from checks import WINDOW, assert_same, feed, random_ids
from custom_generate.generate import SinkCache, generate
from custom_generate.releases import CACHE_NAME
from families import build_model
from oracle import oracle_logits

SIZES = [5, 9, 40] + [1] * 20 + [6]


@pytest.fixture
def model():
    return build_model("llama", "sdpa")


@pytest.fixture
def from_folder(tiny_model_folder, monkeypatch) -> dict:
    """The arguments with which `generate` of a model is this one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return {"custom_generate": tiny_model_folder, "trust_remote_code": True}


def assert_exact(model, plain=None) -> None:
    """Of what is called, against the oracle of the model inside."""
    ids = random_ids()
    logits = feed(model, SinkCache.from_model(model, **WINDOW), ids, SIZES)
    assert_same(logits, oracle_logits(plain or model, ids, **WINDOW))


def assert_refused(model, message: str) -> None:
    for call in (lambda: SinkCache.from_model(model, **WINDOW), lambda: generate(random_ids(5), model=model, **WINDOW)):
        with pytest.raises(ValueError, match=message):
            call()


def with_adapter(model, **config):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=4, **config)).eval()


def test_adapters(model, from_folder):
    """The model inside is what is asked; what is called is the one with the adapter."""
    without = model(random_ids()).logits
    wrapped = with_adapter(model, init_lora_weights=False, task_type="CAUSAL_LM")
    assert not torch.allclose(without, model(random_ids()).logits), "the adapter does nothing"
    assert_exact(wrapped, model)
    options = {"max_new_tokens": 20, "do_sample": False, **WINDOW}
    text = wrapped.generate(input_ids=random_ids(), **from_folder, **options)
    assert text.equal(generate(random_ids(), model=model, **options))


def test_adapters_that_the_model_itself_loads(model):
    peft = pytest.importorskip("peft", minversion=transformers.integrations.peft.MIN_PEFT_VERSION)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=4, init_lora_weights=False))
    assert_exact(model.eval())


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(model, kind, from_folder):
    """They would not be seen, without a word: inputs are those of the cache, not of PEFT."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert_refused(wrapped, "virtual tokens would pass by the cache")
    with pytest.raises(ValueError, match="virtual tokens would pass by the cache"):
        wrapped.generate(input_ids=random_ids(5), **from_folder, max_new_tokens=3, **WINDOW)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_code_from_the_hub_that_names_its_cache_as_another_release_does(model, name):
    class FromTheHub(type(model)):
        pass

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, use_cache=None, **kwargs):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        return super(FromTheHub, self).forward(**inputs, **{CACHE_NAME: kwargs.pop(name, None)}, **kwargs)

    arguments = list(inspect.signature(forward).parameters.values())
    arguments.insert(-1, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = inspect.Signature(arguments)
    FromTheHub.forward = forward
    model.__class__ = FromTheHub
    plain = build_model("llama", "sdpa")
    assert_exact(model, plain)
    options = {"max_new_tokens": 30, "do_sample": False, **WINDOW}
    assert generate(random_ids(20), model=model, **options).equal(generate(random_ids(20), model=plain, **options))


def test_data_parallel(model, tmp_path):
    wrapped = torch.nn.DataParallel(model)
    assert_exact(wrapped, model)
    options = {"max_new_tokens": 20, "do_sample": False, **WINDOW}
    assert generate(random_ids(), model=wrapped, **options).equal(generate(random_ids(), model=model, **options))
    cache, ids = SinkCache.from_model(wrapped, **WINDOW), random_ids()
    before = feed(wrapped, cache, ids[:, :40], [40])
    cache.save(tmp_path / "cache.safetensors")
    after = feed(wrapped, SinkCache.load(tmp_path / "cache.safetensors", wrapped), ids[:, 40:], [1] * (ids.shape[1] - 40))
    assert_same(torch.cat([before, after], dim=1), oracle_logits(model, ids, **WINDOW))


def test_weights_in_8_bits(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert_exact(model)


def test_training_mode(model):
    model.train()
    assert_exact(model)
    model.gradient_checkpointing_enable()
    assert_refused(model, r"training mode with gradient checkpointing.*model.eval\(\)")
    assert_exact(model.eval())


def test_gradient_checkpointing_in_the_middle_of_a_stream(model):
    """Its layers would not be given the cache, and each token would see itself only."""
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, random_ids(40), [40])
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="training mode with gradient checkpointing"):
        cache.prepare(random_ids(1))
    assert cache.get_seq_length() == 40


def test_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_refused(model, r"under autocast.*torch.autocast\('cpu', enabled=False\)")
        with torch.autocast("cpu", enabled=False):
            assert_exact(model)


def test_a_dtype_that_is_changed_in_the_middle_of_a_stream(model):
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, random_ids(40), [40])
    model.bfloat16()
    with pytest.raises(ValueError, match="bfloat16.*made for torch.float32.*make a new one"):
        model(**cache.prepare(random_ids(1)))


@pytest.mark.parametrize("static", [False, True])
def test_in_and_out_of_inference_mode(model, static):
    """What was made in it can't be changed outside."""
    ids = random_ids(num_rows=2)
    reference = torch.cat([oracle_logits(model, row[None], **WINDOW) for row in ids])
    with torch.inference_mode():
        cache = SinkCache.from_model(model, **WINDOW, static=static)
        logits = [feed(model, cache, ids[:, :40], [10, 20] + [1] * 10)]
        cache.reorder_cache(torch.tensor([0, 1]))
    logits.append(feed(model, cache, ids[:, 40:60], [10] + [1] * 10))
    with torch.inference_mode():
        logits.append(feed(model, cache, ids[:, 60:], [10] + [1] * 10).clone())
    with torch.inference_mode():
        assert_same(torch.cat(logits, dim=1), reference)


@pytest.mark.parametrize("static", [False, True])
def test_attention_that_is_changed_in_the_middle_of_a_stream(model, static):
    """The two take masks of different kinds: one would be added to the scores as ones."""
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip("this release can't change it")
    ids = random_ids()
    reference = oracle_logits(model, ids, **WINDOW)
    cache = SinkCache.from_model(model, **WINDOW, static=static)
    logits = feed(model, cache, ids[:, :10], [5] + [1] * 5)
    model.set_attn_implementation("eager")
    assert_same(torch.cat([logits, feed(model, cache, ids[:, 10:], [1] * 50 + [20])], dim=1), reference)


@pytest.mark.parametrize(
    "name",
    ["flash_attention_2", "flash_attention_3", "flex_attention", "kernels-community/flash-attn3", "paged|sdpa", "sdpa_paged"],
)
def test_attention_implementations_that_take_no_mask_for_each_query(model, name):
    ids = random_ids()
    reference = generate(ids, model=model, **WINDOW, max_new_tokens=10, do_sample=False)
    model.config._attn_implementation_internal = name  # can't be loaded without a GPU, or not without the Hub
    assert generate(ids, model=model, **WINDOW, max_new_tokens=10, do_sample=False).equal(reference)
    assert model.config._attn_implementation == name
    with pytest.raises(ValueError, match=f'and this model uses {re.escape(name)}.*model_for.*attn_implementation="sdpa"'):
        SinkCache.from_model(model, **WINDOW)
