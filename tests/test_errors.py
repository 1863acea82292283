"""Bad input is refused before the model has computed anything for it, by a message that names it; and nothing has changed then."""

import copy
import importlib
import sys

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM, DynamicCache

from checks import WINDOW, left_padded, random_ids
from custom_generate.generate import SinkCache, generate
from custom_generate.options import CACHE_OPTIONS, UNSUPPORTED_OPTIONS
from custom_generate.releases import CACHE_NAME
from families import TRANSFORMERS, build_model
from zoo import ZOO_RELEASE, zoo_config

MODEL = "qwen3"


@pytest.fixture
def untouched(model, monkeypatch):
    """Fails if the model is run."""
    SinkCache.from_model(model, **WINDOW)  # asked before

    def forward(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(model.model, "forward", forward)
    return model


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"window_length": 0}, r"window_length must be an int of at least 1, got 0 \(int\): with less, no token could attend"),
        ({"window_length": -5}, "window_length must be an int of at least 1, got -5"),
        ({"window_length": 16.0}, r"window_length must be an int of at least 1, got 16.0 \(float\)"),
        ({"window_length": "16"}, r"window_length must be an int of at least 1, got '16' \(str\)"),
        ({"window_length": True, "num_sink_tokens": 0}, r"window_length must be an int of at least 1, got True \(bool\)"),
        ({"num_sink_tokens": -1}, r"num_sink_tokens must be an int of at least 0, got -1 \(int\)"),
        ({"num_sink_tokens": 256}, "less than window_length=256, got 256"),
        ({"window_length": 4}, "less than window_length=4, got 4"),
        ({"num_sink_tokens": 2.5}, r"num_sink_tokens must be an int of at least 0, got 2.5 \(float\)"),
        ({"window_length": torch.tensor(64)}, r"window_length must be an int of at least 1, got tensor\(64\) \(Tensor\)"),
    ],
)
def test_numbers_that_make_no_window(untouched, numbers, message):
    for call in (
        lambda: SinkCache(**numbers),
        lambda: SinkCache.from_model(untouched, **numbers),
        lambda: generate(random_ids(5), model=untouched, **numbers),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def plausible_value(name: str, model):
    special = {"cache_implementation": "paged", "position_ids": torch.arange(5)[None]}
    return special.get(name, 2)


@pytest.mark.parametrize("name", UNSUPPORTED_OPTIONS)
def test_options_that_are_not_supported(untouched, name):
    value = plausible_value(name, untouched)
    with pytest.raises(ValueError, match=f"{name}=.*{UNSUPPORTED_OPTIONS[name][:20]}.*Leave it out"):
        generate(random_ids(5), model=untouched, **{name: value}, **WINDOW)
    if name != "position_ids":
        config = transformers.GenerationConfig()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=f"{name}="):
            generate(random_ids(5), config, model=untouched, **WINDOW)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_OPTIONS.keys() - {*CACHE_OPTIONS, "assistant_model", "position_ids"}))
def test_options_that_are_not_supported_and_that_the_model_brings(untouched, monkeypatch, name):
    """A mode of decoding in the model's own generation config would run, or fail in the middle."""
    monkeypatch.setattr(untouched.generation_config, name, 2, raising=False)
    with pytest.raises(ValueError, match=f"{name}=2 can't be used.*set it to None there"):
        generate(random_ids(5), model=untouched, **WINDOW)


def test_options_at_their_neutral_values_are_fine(model):
    generate(
        random_ids(5),
        model=model,
        guidance_scale=1.0,
        num_beam_groups=1,
        penalty_alpha=0.0,
        token_healing=False,
        max_new_tokens=2,
        **WINDOW,
    )


def test_a_cache_implementation_that_the_model_brings_is_ignored(model):
    """Published generation configs name one (Gemma: "hybrid"); that is no wish of the caller."""
    own = copy.deepcopy(model)
    brought = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto"},
        "max_cache_len": 10,
        "use_cache": False,
    }
    for name, value in brought.items():
        setattr(own.generation_config, name, value)
    ids = generate(random_ids(5), model=own, max_new_tokens=40, do_sample=False, **WINDOW)
    assert ids.equal(generate(random_ids(5), model=model, max_new_tokens=40, do_sample=False, **WINDOW))
    assert {name: getattr(own.generation_config, name) for name in brought} == brought


def test_a_generation_config_of_gemma_may_be_passed(model):
    """A copy of the model's own, as `transformers serve` and pipelines pass it. transformers itself takes "hybrid" for no wish."""
    config = transformers.GenerationConfig(cache_implementation="hybrid", max_new_tokens=40)
    ids = generate(random_ids(5), config, model=model, **WINDOW)
    assert ids.equal(generate(random_ids(5), model=model, max_new_tokens=40, do_sample=False, **WINDOW))


def test_no_cache(untouched):
    with pytest.raises(ValueError, match="use_cache=False"):
        generate(random_ids(5), model=untouched, use_cache=False, **WINDOW)


def test_a_mistyped_argument(untouched):
    with pytest.raises(ValueError, match="windw_length"):
        generate(random_ids(5), model=untouched, windw_length=5, **WINDOW)


def test_chunk_length(untouched):
    for value in (0, -1, 2.5, "all", True):
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            generate(random_ids(5), model=untouched, prefill_chunk_size=value, **WINDOW)


@pytest.mark.parametrize(
    "ids, mask, message",
    [
        (torch.zeros(1, 0, dtype=torch.long), None, r"No tokens: pass input_ids .*at least one column; got shape \(1, 0\)"),
        (torch.arange(5), None, r"\[batch, num_columns\] \(one text is input_ids\[None\]\).*got shape \(5,\)"),
        ([1, 2, 3], None, r"input_ids must be a Tensor, got \[1, 2, 3\] \(list\)"),
        (random_ids(5), "no", r"attention_mask must be a Tensor, got 'no' \(str\)"),
        (random_ids(5), torch.ones(1, 4), r"shape \(1, 4\), and must have \(1, 5\)"),
        (random_ids(5), torch.ones(1, 1, 5, 5), r"\(1, 1, 5, 5\), and must have \(1, 5\)"),
        (random_ids(5), torch.tensor([[1, 1, 1, 0, 0]]), "row 0 has padding on the right or a hole"),
        (random_ids(5, num_rows=2), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]), "row 1 has padding on the right or a hole"),
        (random_ids(5, num_rows=2), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]), "Row 1 of the prompt is all padding"),
    ],
)
def test_prompts(untouched, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        generate(ids, attention_mask=mask, model=untouched, **WINDOW)


def test_a_tensor_that_belongs_to_each_token(untouched):
    with pytest.raises(ValueError, match="token_type_ids can't be used"):
        generate(random_ids(5), token_type_ids=torch.ones(1, 5), model=untouched, **WINDOW)


def filled(model, num_rows: int = 1, **numbers) -> SinkCache:
    cache = SinkCache(**(WINDOW | numbers))
    generate(random_ids(20, num_rows=num_rows), model=model, past_key_values=cache, max_new_tokens=3, do_sample=False)
    return cache


def test_a_cache_with_other_numbers(model):
    cache = filled(model)
    with pytest.raises(ValueError, match="window_length=20 was asked for.*made with 16"):
        generate(random_ids(30), model=model, past_key_values=cache, window_length=20)
    with pytest.raises(ValueError, match="num_sink_tokens=0 was asked for.*made with 4"):
        generate(random_ids(30), model=model, past_key_values=cache, num_sink_tokens=0)
    config = transformers.GenerationConfig(window_length=20)
    with pytest.raises(ValueError, match="window_length=20 was asked for.*made with 16"):
        generate(random_ids(30), config, model=model, past_key_values=cache)
    assert cache.get_seq_length() == 22


def test_a_cache_of_another_model(model):
    cache, other = filled(model), build_model("qwen3", seed=1)
    ids = torch.full((1, 5), cache.unseen_token_ids[0])
    with pytest.raises(ValueError, match="made for another model"):
        generate(ids, attention_mask=torch.ones(1, 27), model=other, past_key_values=cache)
    with pytest.raises(ValueError, match="made for another model"):
        cache.bind(other)


def test_a_cache_of_another_dtype(model):
    own = copy.deepcopy(model)
    cache = filled(own)
    own.to(torch.bfloat16)
    ids = torch.full((1, 5), cache.unseen_token_ids[0])
    with pytest.raises(ValueError, match="now in torch.bfloat16 .*made for it in torch.float32"):
        generate(ids, attention_mask=torch.ones(1, 27), model=own, past_key_values=cache)


def test_keys_that_come_in_another_dtype():
    model = build_model("llama")
    cache = SinkCache.from_model(model, **WINDOW)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="values in torch.bfloat16.*made for torch.float32"),
    ):
        model(**cache.prepare(random_ids(5)))


def test_a_cache_of_another_batch(model):
    cache = filled(model, num_rows=2)
    with pytest.raises(ValueError, match="holds 2 rows, and 3 are passed.*batch_select_indices"):
        generate(random_ids(30, num_rows=3), model=model, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 rows, and 3 are passed"):
        cache.prepare(random_ids(1, num_rows=3))


def test_a_cache_of_another_class(untouched, model, monkeypatch):
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 5, 8)
    cache.update(keys, keys, 0)
    with pytest.raises(ValueError, match="DynamicCache that already holds tokens"):
        generate(random_ids(10), model=untouched, past_key_values=cache, **WINDOW)
    monkeypatch.undo()
    outputs = generate(
        random_ids(10), model=model, past_key_values=DynamicCache(), max_new_tokens=2, return_dict_in_generate=True, **WINDOW
    )
    assert type(outputs.past_key_values) is SinkCache


def test_a_cache_that_was_not_told_the_model(model):
    """At the door: the model's own loop would get wrong logits only past the window."""
    for call in (
        lambda cache: model(random_ids(5), past_key_values=cache),
        lambda cache: model.generate(random_ids(5), past_key_values=cache, max_new_tokens=2),
        lambda cache: cache.prepare(random_ids(5)),
    ):
        with pytest.raises(ValueError, match=r"SinkCache.from_model\(model, window_length=16, num_sink_tokens=4\)"):
            call(SinkCache(**WINDOW))


@pytest.mark.parametrize(
    "name, num_seen, passes, message",
    [
        ("qwen3", 0, random_ids(20), "20 tokens at once go past the window of 16"),
        ("gemma3", 0, random_ids(10), "10 tokens at once go past the window of 6"),
        ("qwen3", 14, random_ids(3), "3 tokens at once go past the window of 16"),
        ("qwen3", 0, random_ids(3, num_rows=2), r"several rows \(here 2\)"),
        ("bloom", 0, random_ids(3), "order of the keys"),
        ("qwen3", 40, random_ids(1), "positions that `prepare` chose"),
    ],
)
def test_passes_that_the_model_can_not_prepare_itself(name, num_seen, passes, message):
    model = build_model(name, "eager")
    cache = SinkCache.from_model(model, **WINDOW)
    for size in [39, 1] if num_seen == 40 else [num_seen] if num_seen else []:
        model(**cache.prepare(random_ids(size)))
    with pytest.raises(ValueError, match=f"{message}.*cache.prepare"):
        model(passes, past_key_values=cache)
    assert cache.get_seq_length() == num_seen


def test_what_prepare_returned_must_be_what_the_model_gets(model):
    cache = SinkCache.from_model(model, **WINDOW)
    inputs = cache.prepare(random_ids(5))
    with pytest.raises(ValueError, match="prepared for 1 rows of 5 tokens.*1 rows of 3"):
        model(random_ids(3), past_key_values=inputs[CACHE_NAME])


@pytest.mark.parametrize(
    "config, message",
    [
        (lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97), "absolute or learned position"),
        (lambda: transformers.OPTConfig(hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=97,
                                word_embed_proj_dim=32), "absolute or learned position"),
        (lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97, state_size=4), "Mamba"),
        (lambda: zoo_config("jamba"), "how a text is split into passes|Mamba kernels"),
    ],
    ids=["gpt2", "opt", "mamba", "jamba"],
)  # fmt: skip
def test_models_for_which_the_rules_can_not_be_kept(config, message):
    try:
        model = AutoModelForCausalLM.from_config(config()).eval()
    except (KeyError, TypeError):
        if TRANSFORMERS >= version.parse(ZOO_RELEASE):
            raise
        pytest.skip(f"no small model of it with transformers {TRANSFORMERS}")
    with pytest.raises(ValueError, match=message):
        generate(random_ids(5), model=model, max_new_tokens=3, **WINDOW)
    with pytest.raises(ValueError, match=message):
        SinkCache.from_model(model, **WINDOW)


def test_encoder_decoder_models():
    config = transformers.T5Config(
        d_model=32, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=97, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    for inputs in ({}, {"decoder_input_ids": random_ids(2)}, {"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}):
        with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
            generate(random_ids(5), model=model, max_new_tokens=3, **inputs, **WINDOW)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        SinkCache.from_model(model, **WINDOW)


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("gpt-j", {"max_position_embeddings": 31}),
        ("llama-dynamic", {"max_position_embeddings": 31}),
        ("mpt", {"max_seq_len": 15}),
        ("llama4", {"attention_chunk_size": 15}),
        ("llama4", {"floor_scale": 32}),
        ("glm-moe-dsa", {"index_topk": 15}),
    ],
)
def test_a_window_that_the_positions_of_the_model_do_not_reach(name, overrides):
    model = build_model(name, **overrides)
    with pytest.raises(ValueError, match="window_length=16 is too long"):
        generate(random_ids(5), model=model, **WINDOW)
    generate(random_ids(40), model=model, window_length=15, max_new_tokens=20, do_sample=False)


@pytest.mark.parametrize("num_tokens", [33, 5])
def test_a_pass_that_is_longer_than_the_positions_of_the_model(num_tokens):
    """In tokens or in columns: Llama 4 scales its queries by the number of the column."""
    model = build_model("llama4", floor_scale=33)
    cache = SinkCache.from_model(model, **WINDOW)
    ids, mask = left_padded([random_ids(33), random_ids(33)[:, :num_tokens]])
    with pytest.raises(ValueError, match="33 tokens at once go past the 32 positions of this model. Feed fewer at once"):
        cache.prepare(ids[1:], mask[1:])
    assert not cache.is_initialized


@pytest.mark.parametrize("package, version", [("transformers", "4.56.2"), ("torch", "2.1.2+cpu")])
def test_a_release_that_is_too_old(package, version, monkeypatch):
    """Refused by its number, as soon as the code is loaded, and not by the first thing that it lacks."""
    for name in [name for name in sys.modules if name.startswith("custom_generate.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules[package], "__version__", version)
    with pytest.raises(ImportError, match="transformers 4.57 and torch 2.2, or newer: pip install"):
        importlib.import_module("custom_generate.generate")


def test_what_is_no_model_and_no_cache(untouched, tmp_path):
    message = r"Pass a loaded model, as from_pretrained returns it, not 'gpt2' \(str\)"
    with pytest.raises(ValueError, match=message):
        SinkCache.from_model("gpt2")
    path = tmp_path / "cache.safetensors"
    SinkCache.from_model(untouched, **WINDOW).save(path)
    with pytest.raises(ValueError, match=message):
        SinkCache.load(path, "gpt2")
    with pytest.raises(ValueError, match=message):
        generate(random_ids(5), model=untouched, assistant_model="gpt2", **WINDOW)
    with pytest.raises(ValueError, match=r"The cache that is passed must be a Cache, got \(1, 2\) \(tuple\)"):
        generate(random_ids(5), model=untouched, past_key_values=(1, 2))


def test_what_is_no_tensor_of_tokens_for_prepare(model):
    cache = SinkCache.from_model(model, **WINDOW)
    for value, shown in (
        ([1, 2], r"\[1, 2\]"),
        (None, "None"),
        (random_ids(4)[0], r"shape \(4,\)"),
        (random_ids(4)[:, :0], r"shape \(1, 0\)"),
    ):
        with pytest.raises(ValueError, match=rf"No tokens: pass input_ids \[batch, num_columns\].*got {shown}"):
            cache.prepare(value)
    with pytest.raises(ValueError, match=r"attention_mask must be a Tensor, got \[\[1, 1\]\] \(list\)"):
        cache.prepare(random_ids(2), [[1, 1]])
    with pytest.raises(ValueError, match="input_ids and inputs_embeds are two forms of the same tokens.*Pass one of them"):
        cache.prepare(random_ids(2), inputs_embeds=torch.zeros(1, 2, model.config.hidden_size))
    assert not cache.is_initialized


def test_a_window_longer_than_float32_can_tell_apart(model):
    """Its angles are rounded too far to keep the rules: what is found then, a rotation of its own, is not the whole reason."""
    with pytest.raises(ValueError, match="can't tell positions up to 2000000000 apart.*try a shorter one"):
        SinkCache.from_model(model, 10**9)


def test_a_mask_for_prepare_that_is_too_short(model):
    """Would number the tokens wrongly, without a word."""
    cache = SinkCache.from_model(model, **WINDOW)
    for shape in [(1, 2), (2, 4), (4,)]:
        with pytest.raises(ValueError, match="attention_mask has shape"):
            cache.prepare(random_ids(4), torch.ones(shape))


def test_new_tokens_without_the_last_one_that_was_returned(model):
    """Also when a mask says how many tokens there are: the cache knows better."""
    cache = filled(model)
    with pytest.raises(ValueError, match="has not been through the model"):
        generate(
            (cache.unseen_token_ids[0] + 1) * torch.ones(1, 4, dtype=torch.long),
            attention_mask=torch.ones(1, 26),
            model=model,
            past_key_values=cache,
        )
    assert cache.get_seq_length() == 22


def test_a_changed_history_is_pointed_at(model):
    cache, text = filled(model), random_ids(40)
    with pytest.raises(ValueError, match="first difference is at token 1: 1 is passed, .* was seen.*keep the ids"):
        generate(text.index_fill(1, torch.tensor([1]), 1), model=model, past_key_values=cache)


def test_padding_without_a_mask_is_warned_of(model, caplog):
    ids = random_ids(5, num_rows=2)
    ids[0, :3] = 7
    transformers.logging.get_logger("custom_generate").propagate = True
    with caplog.at_level("WARNING"):
        generate(ids, model=model, pad_token_id=7, eos_token_id=7, max_new_tokens=2, **WINDOW)
    assert "become the sinks" in caplog.text


def test_what_a_first_user_passed(untouched):
    """Each of these gave an error of torch, or an error that says the contrary of the truth."""
    model, ids = untouched, random_ids(8)
    cases = [
        ({"input_ids": ids[:, :0]}, "No tokens: pass input_ids .*with at least one column"),
        ({"input_ids": ids, "prefill_chunk_size": torch.tensor(4)}, r"prefill_chunk_size must be an int of at least 1, got tensor"),
        ({"input_ids": ids, "past_key_values": SinkCache}, "got the class SinkCache. Pass an object, "),
        ({"input_ids": ids, "token_type_ids": [[0] * 8]}, r"token_type_ids must be a Tensor, got \[\[0, 0.*\(list\)"),
        ({"input_ids": ids, "inputs_embeds": [[1.0]]}, r"inputs_embeds must be a Tensor, got \[\[1.0\]\] \(list\)"),
        ({"input_ids": ids, "cache_config": {"nbits": 4}}, 'Add cache_implementation="quantized", or leave it out'),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            generate(**arguments, model=model, max_new_tokens=2)
    with pytest.raises(ValueError, match="No tokens: pass input_ids"):
        generate(ids[:, :0], model=model, pad_token_id=0, eos_token_id=1, max_new_tokens=2)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"input_ids": torch.ones(1, 4)}, "input_ids must be whole numbers, got torch.float32"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.full((1, 4), 2)}, "1 for a token and 0 for padding, got 2"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 6)}, r"has shape \(1, 6\), and must have \(1, 4\)\."),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.tensor(1)}, r"has shape \(\), and must have \(1, 4\)\."),
    ],
)
def test_what_prepare_took_without_a_word(untouched, inputs, message):
    cache = SinkCache.from_model(untouched, **WINDOW)
    with pytest.raises(ValueError, match=message):
        cache.prepare(**inputs)
    assert cache.num_tokens_seen == 0 and not cache.is_initialized


def test_a_cache_of_another_model_in_a_loop_of_ones_own(model):
    """Its keys have other dimensions: no error of torch from within."""
    cache, other = SinkCache.from_model(model, **WINDOW), build_model("deepseek-v3")
    with torch.no_grad(), pytest.raises(ValueError, match="made for keys of 2 heads of 8 dimensions, and the model brings .* Make a new one"):
        other(random_ids(5), **{CACHE_NAME: cache})
    model(**cache.prepare(random_ids(5)))
    assert cache.num_tokens_seen == 5


def test_rows_that_end_with_the_padding_token(untouched, caplog):
    """transformers warns of padding on the right. It is text to us, if the padding token also ends texts."""
    ids = random_ids(8).repeat(2, 1)
    ids[1, -2:] = 1
    with pytest.raises(AssertionError, match="the model was run"):
        generate(ids, model=untouched, pad_token_id=1, eos_token_id=1, max_new_tokens=2, **WINDOW)
    assert "Some rows of the batch end with the padding token" in caplog.text and "Pad on the left" in caplog.text
