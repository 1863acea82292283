"""Models whose attention takes no masks: served through a view of them, and nothing is left on them.

The attention function that is registered here fails as soon as it is called."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from checks import (
    NUM_SINK_TOKENS,
    RECORD,
    WINDOW,
    WINDOW_LENGTH,
    assert_same,
    build_recurrent_model,
    feed,
    left_padded,
    random_ids,
    rings_of,
)
from custom_generate.generate import SinkCache, generate
from families import build_model
from oracle import oracle_logits
from zoo import build_zoo_model

NAME = "fails_when_called"
KINDS = ["llama", "gemma3", "lfm2", "qwen3_moe"]
HINT = r"this model uses fails_when_called. Call a view of it in its place, model = SinkCache.model_for\(model\)"


def fail(*args, **kwargs):
    raise AssertionError("the model's own attention was called")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    ALL_ATTENTION_FUNCTIONS[NAME] = fail
    yield
    del ALL_ATTENTION_FUNCTIONS[NAME]


def build(kind: str) -> torch.nn.Module:
    """A model with sdpa attention: like Llama, with sliding windows, with recurrent states, with experts."""
    if kind == "lfm2":
        return build_recurrent_model(kind)
    return build_zoo_model(kind, "sdpa") if kind == "qwen3_moe" else build_model(kind, "sdpa")


def with_other_attention(model: torch.nn.Module, name: str = NAME) -> torch.nn.Module:
    """The same weights in a model that was loaded with another attention."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = name
    with pytest.raises(AssertionError, match="own attention was called"):
        other(random_ids(3))
    return other


def contents(model: torch.nn.Module) -> list[dict]:
    """What stands in all its modules and configs; dictionaries by what they hold."""
    parts = [vars(module) for module in model.modules()] + [
        vars(module.config) for module in model.modules() if hasattr(module, "config")
    ]
    return [{key: dict(value) if isinstance(value, dict) else value for key, value in part.items()} for part in parts]


def assert_unchanged(model: torch.nn.Module, before: list[dict]) -> None:
    after = contents(model)
    assert len(after) == len(before)
    for now, then in zip(after, before):
        assert now.keys() == then.keys()
        for key in now:
            if isinstance(now[key], dict):
                assert now[key].keys() == then[key].keys() and all(now[key][name] is then[key][name] for name in now[key]), key
            else:
                assert now[key] is then[key], key
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("mode", ["dynamic", "static", "quantized"])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_equals_that_of_the_sdpa_model(kind, mode):
    model = build(kind)
    other = with_other_attention(model)
    before = contents(other)
    options = {**WINDOW, "cache_implementation": mode, "max_new_tokens": 30, "do_sample": False, **RECORD}
    if mode == "quantized":  # small enough to have something to quantize in this window
        options["cache_config"] = {"backend": "fp8", "q_group_size": 8, "residual_length": 4}
    texts, mask = left_padded([random_ids(40), random_ids(9, seed=2)])
    reference = generate(texts, attention_mask=mask, model=model, **options)
    outputs = generate(texts, attention_mask=mask, model=other, **options)
    assert torch.stack(outputs.logits).equal(torch.stack(reference.logits))
    assert_unchanged(other, before)
    assert outputs.past_key_values.model_ref() is other
    if mode == "quantized":
        assert any(ring.blocks[0].shape[2] for ring in rings_of(outputs.past_key_values) if hasattr(ring, "blocks"))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_an_own_loop(kind, static):
    model = build(kind)
    other, ids = with_other_attention(model), random_ids()
    before = contents(other)
    view = SinkCache.model_for(other)
    cache = SinkCache.from_model(view, **WINDOW, static=static)
    sizes = [10, *[1] * 30, 20, *[1] * 20]
    logits = feed(view, cache, ids, sizes)
    assert_same(logits, oracle_logits(model, ids, **WINDOW))
    assert logits.equal(feed(model, SinkCache.from_model(model, **WINDOW, static=static), ids, sizes))
    assert_unchanged(other, before)


def test_a_model_that_takes_masks_is_its_own_view(model):
    wrapped = torch.nn.DataParallel(model)
    assert SinkCache.model_for(model) is model and SinkCache.model_for(wrapped) is wrapped


def test_a_loop_with_the_model_itself_is_refused_with_the_view_as_the_remedy(model):
    other, ids = with_other_attention(model), random_ids(40)
    with pytest.raises(ValueError, match=HINT):
        SinkCache.from_model(other, **WINDOW)
    outputs = generate(ids, model=other, **WINDOW, max_new_tokens=3, **RECORD)
    cache, view = outputs.past_key_values, SinkCache.model_for(other)
    with pytest.raises(ValueError, match=HINT):  # `generate` had a view of its own
        cache.prepare(ids[:, :1])
    cache.bind(view)
    logits = view(**cache.prepare(outputs.sequences[:, -1:])).logits
    assert_same(logits, oracle_logits(model, outputs.sequences, **WINDOW)[:, -1:])
    more = generate(torch.cat([outputs.sequences, ids], 1), model=view, past_key_values=cache, max_new_tokens=3, **RECORD)
    assert view(**cache.prepare(more.sequences[:, -1:])).logits.isfinite().all(), "the view that the user has told of still holds"
    assert SinkCache.from_model(view, **WINDOW).model_ref() is other


def test_attention_that_is_changed_in_the_middle_of_a_stream(model):
    other, ids = copy.deepcopy(model), random_ids()
    cache = SinkCache.from_model(other, **WINDOW)
    logits = feed(other, cache, ids[:, :40], [20, *[1] * 20])
    other.config._attn_implementation = NAME
    with pytest.raises(ValueError, match=HINT):
        cache.prepare(ids[:, 40:41])
    view = SinkCache.model_for(other)
    cache.bind(view)
    logits = torch.cat([logits, feed(view, cache, ids[:, 40:], [20, *[1] * 20])], 1)
    assert_same(logits, oracle_logits(model, ids, **WINDOW))


def test_what_is_shared_in_the_model_is_shared_in_its_view(model):
    """A config, a module that stands in two places, and every weight. A view stays as it is when another one is made."""
    other = with_other_attention(model)
    other.model.layers[1].mlp = other.model.layers[0].mlp
    view, again = SinkCache.model_for(other), SinkCache.model_for(other)
    assert view.model.layers[1].mlp is view.model.layers[0].mlp is not other.model.layers[0].mlp
    configs = {id(module.config) for module in view.modules() if hasattr(module, "config")}
    assert configs == {id(view.config)} and view.config is not other.config
    assert view.config._attn_implementation == "sdpa" and other.config._attn_implementation == NAME
    assert all(mine is theirs for mine, theirs in zip(view.parameters(), other.parameters(), strict=True))
    assert all(mine is theirs for mine, theirs in zip(again.parameters(), view.parameters(), strict=True))
    assert not {id(module) for module in again.modules()} & {id(module) for module in view.modules()}
    other.train()
    assert all(module.training for module in SinkCache.model_for(other).modules())
    assert not any(module.training for module in view.modules())


def test_nothing_keeps_a_model_that_is_gone(model):
    other = with_other_attention(model)
    generate(random_ids(5), model=other, **WINDOW, max_new_tokens=3)
    view, gone = SinkCache.model_for(other), weakref.ref(other)
    del other
    gc.collect()
    assert gone() is not None, "a view needs its model"
    del view
    gc.collect()
    assert gone() is None


def test_two_threads_with_one_model(model):
    other = with_other_attention(model)
    before, results, ids = contents(other), {}, [random_ids(30, seed=seed) for seed in range(4)]

    def run(number: int) -> None:
        results[number] = generate(ids[number], model=other, **WINDOW, max_new_tokens=40, **RECORD)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        reference = generate(ids[number], model=model, **WINDOW, max_new_tokens=40, **RECORD)
        assert torch.stack(results[number].logits).equal(torch.stack(reference.logits))
    assert_unchanged(other, before)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"guidance_scale": 1.5}, {"assistant_early_exit": 2}, {"prompt_lookup_num_tokens": 3}]
)
def test_other_ways_to_generate(model, options):
    other, options = (
        with_other_attention(model),
        {**WINDOW, "max_new_tokens": 20, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0, **options},
    )
    before = contents(other)
    assert generate(random_ids(30), model=other, **options).equal(generate(random_ids(30), model=model, **options))
    assert_unchanged(other, before)


def test_an_assistant_with_such_attention(model):
    other = with_other_attention(build_model("llama", "sdpa", seed=3))
    options = {**WINDOW, "max_new_tokens": 20, "do_sample": False}
    assert generate(random_ids(30), model=model, assistant_model=other, **options).equal(
        generate(random_ids(30), model=model, **options)
    )
    assert other.config._attn_implementation == NAME


def test_layers_that_hooks_have_changed(model):
    """Hooks of accelerate put a method of the module in the place of its `forward`."""
    accelerate = pytest.importorskip("accelerate")
    other = with_other_attention(model)
    accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
    reference = generate(random_ids(30), model=model, **WINDOW, max_new_tokens=10, **RECORD)
    outputs = generate(random_ids(30), model=other, **WINDOW, max_new_tokens=10, **RECORD)
    assert torch.stack(outputs.logits).equal(torch.stack(reference.logits))


@pytest.mark.parametrize("options", [{}, {"assistant_early_exit": 1}], ids=["view", "first layers"])
def test_hooks_of_a_copy_are_not_those_of_the_model(model, options):
    """transformers hooks the layers of what it calls with `output_hidden_states=True`, and leaves the hooks there."""
    other = copy.deepcopy(model) if options else with_other_attention(model)
    num_layers = model.config.num_hidden_layers
    call = options | {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    for _ in range(3):
        outputs = generate(random_ids(30), model=other, **call, **WINDOW)
        assert {len(states) for states in outputs.hidden_states} == {num_layers + 1}
    if not options:
        assert not any(module._forward_hooks for module in other.modules())


def test_eager_where_a_model_has_no_sdpa(monkeypatch):
    model = build_model("llama", "eager")
    other = with_other_attention(model)
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    assert SinkCache.model_for(other).config._attn_implementation == "eager"
    outputs, reference = (generate(random_ids(30), model=each, **WINDOW, max_new_tokens=10, **RECORD) for each in (other, model))
    assert torch.stack(outputs.logits).equal(torch.stack(reference.logits))


def test_a_model_whose_attention_can_not_be_chosen(model, monkeypatch):
    """Its layers are of a class for each implementation, as in older releases."""
    other = with_other_attention(model)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    with pytest.raises(ValueError, match='was loaded with fails_when_called, .* Load it with from_pretrained.*"sdpa"'):
        generate(random_ids(5), model=other, **WINDOW)


def test_a_saved_cache_goes_on_with_the_view(model, tmp_path):
    other, ids = with_other_attention(model), random_ids()
    view = SinkCache.model_for(other)
    cache = SinkCache.from_model(view, WINDOW_LENGTH, NUM_SINK_TOKENS)
    logits = [feed(view, cache, ids[:, :40], [20, 20])]
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=HINT):
        SinkCache.load(tmp_path / "cache", other)
    cache = SinkCache.load(tmp_path / "cache", view)
    logits.append(feed(copy.copy(view), copy.deepcopy(cache), ids[:, 40:], [20, 20]))
    assert_same(torch.cat(logits, 1), oracle_logits(model, ids, **WINDOW))
