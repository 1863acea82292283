"""A model on several devices gives the logits of one that is on a single one, and nothing is copied that need not be."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from cards import Cards, plug_in_cards, put
from checks import WINDOW, assert_same, feed, left_padded, random_ids
from custom_generate.generate import SinkCache, generate
from families import build_model
from oracle import oracle_logits


@pytest.fixture
def cards() -> Cards:
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} can't be told of devices from Python")
    plug_in_cards()
    return Cards()


def spread(model, *devices: str):
    """A copy of a model with its layers on these devices, a contiguous part on each."""
    model = copy.deepcopy(model)
    devices = [torch.device(device) for device in devices]
    base = model.model
    with Cards():
        put(base.embed_tokens, devices[0])
        put(base.rotary_emb, devices[0])
        for index, layer in enumerate(base.layers):
            put(layer, devices[index * len(devices) // len(base.layers)])
        put(base.norm, devices[-1])
        put(model.lm_head, devices[-1])
    return model


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_layers_on_two_devices(cards, name):
    """An operation on tensors of two devices fails here as it does there. gemma3 has two windows, and so two groups on each."""
    model, ids = build_model(name), random_ids()
    reference = oracle_logits(model, ids, **WINDOW)
    model = spread(model, "card:0", "card:1")
    with cards:
        cache = SinkCache.from_model(model, **WINDOW)
        logits = feed(model, cache, ids.to("card:0"), [5, 9, 36] + [1] * 10 + [6, 14]).to("cpu")
    assert {str(layer.keys.device) for layer in cache.layers} == {"card:0", "card:1"}
    assert_same(logits, reference)


@pytest.mark.parametrize("static", [False, True])
def test_a_padded_batch_on_two_devices(cards, static):
    """With rows that are exchanged in the middle, as beam search does."""
    model, rows = build_model("llama"), [random_ids(80, seed=1), random_ids(67, seed=2)]
    references = [oracle_logits(model, row, **WINDOW)[:, -10:] for row in rows]
    ids, mask = left_padded(rows)
    model = spread(model, "card:0", "card:1")
    with cards:
        ids, mask = ids.to("card:0"), mask.to("card:0")
        cache = SinkCache.from_model(model, **WINDOW, static=static)
        feed(model, cache, ids[:, :70], [20, 1, 49], mask[:, :70])
        cache.reorder_cache(torch.tensor([1, 0], device="card:0"))
        logits = feed(model, cache, ids[:, 70:].flip(0), [1] * 6 + ([1] * 4 if static else [4])).to("cpu")
    assert_same(logits, torch.cat(references[::-1]))


def test_tokens_taken_back_on_two_devices(cards):
    model, ids = build_model("gemma3"), random_ids()
    reference = oracle_logits(model, ids, **WINDOW)
    model, ids = spread(model, "card:0", "card:1"), ids
    with cards:
        cache, ids = SinkCache.from_model(model, **WINDOW), ids.to("card:0")
        feed(model, cache, ids[:, :70], [70])
        cache.activate_past_recording()
        feed(model, cache, ids[:, :4], [3, 1])
        cache.crop(-4)
        logits = feed(model, cache, ids[:, 70:], [1] * 10).to("cpu")
    assert_same(logits, reference[:, 70:])


def test_generate_on_two_devices(cards):
    """A padded batch, and its whole history again. The masks stay on the CPU."""
    model = build_model("llama")
    ids, mask = left_padded([random_ids(60, seed=1), random_ids(53, seed=2)])
    expected = generate(ids, model=model, attention_mask=mask, max_new_tokens=10, do_sample=False, **WINDOW)
    model, cache = spread(model, "card:0", "card:1"), SinkCache(**WINDOW)
    with cards:
        text = ids.to("card:0")
        for _ in range(2):
            options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
            text = generate(text, model=model, past_key_values=cache, **options)
            mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
        text = text.to("cpu")
    assert text.equal(expected)


def test_on_one_device_a_step_copies_nothing_to_it_or_from_it(cards):
    model = spread(build_model("llama"), "card:0")
    with cards:
        cache, ids = SinkCache.from_model(model, **WINDOW), random_ids().to("card:0")
        feed(model, cache, ids[:, :46], [20, 26])
        cards.num_crossings = 0
        feed(model, cache, ids[:, 46:78], [1] * 32)
        assert cards.num_crossings == 0
        ids.to("cpu")
        assert cards.num_crossings == 1, "copies are not counted"


@pytest.mark.parametrize("place_of_embeddings", ["cpu", "disk"])
def test_weights_that_are_offloaded(tmp_path, place_of_embeddings):
    """accelerate brings them from the disk for each pass. Between passes, the model is said to be on the device `meta`."""
    pytest.importorskip("accelerate")
    model, ids = build_model("qwen3", "sdpa"), random_ids()
    reference = oracle_logits(model, ids, **WINDOW)
    expected = generate(ids, model=model, max_new_tokens=20, do_sample=False, **WINDOW)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": place_of_embeddings, "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{index}": place for index, place in enumerate(["disk", "cpu", "disk"])}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert model.model.embed_tokens.weight.is_meta == (place_of_embeddings == "disk")
    assert_same(feed(model, SinkCache.from_model(model, **WINDOW), ids, [5, 9, 40] + [1] * 20 + [6]), reference)
    assert generate(ids, model=model, max_new_tokens=20, do_sample=False, **WINDOW).equal(expected)
    assert generate(model=model, max_new_tokens=3, **WINDOW).shape == (1, 4)  # from nothing: the first token is made there
