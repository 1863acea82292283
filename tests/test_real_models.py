"""Models that people run: SmolLM2-135M-Instruct (Llama) and Gemma 3 270M (native windows of 512), with their trained weights.

Random weights have flat attention and forgive much. These have sinks, large outliers and rounding of their own: a false refusal, or an
error that only real attention shows, is found here.

    python scripts/get_model.py smollm2 models/smollm2
    python scripts/get_model.py gemma3 models/gemma3

SINK_CACHE_MODELS names another folder than `models`.
"""

import functools
import importlib.util
import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checks import assert_same, feed
from custom_generate.generate import SinkCache, generate
from oracle import native_windows, oracle_logits

ROOT = Path(__file__).parents[1]
MODELS = Path(os.environ.get("SINK_CACHE_MODELS", ROOT / "models"))
NAMES = "smollm2", "gemma3"
NUM_SINK_TOKENS = 4


def folder(name: str) -> Path:
    path = MODELS / name
    if not (path / "config.json").exists():
        pytest.skip(f"{path} is not there: python scripts/get_model.py {name} {path}")
    return path


@functools.lru_cache(maxsize=2)
def load(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    model.generation_config.do_sample = False
    for name in ("temperature", "top_p", "top_k"):
        setattr(model.generation_config, name, None)
    return model


@functools.cache
def english(path: Path, num_tokens: int) -> torch.Tensor:
    """The same text for everybody who has this Python: what it ships of its language reference."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, :num_tokens]


@pytest.fixture(params=NAMES)
def path(request) -> Path:
    return folder(request.param)


@pytest.mark.parametrize(
    ("name", "window_length"),
    [("smollm2", 512), ("gemma3", 128), ("gemma3", 600)],
    ids=["smollm2", "gemma3, shorter than its native windows", "gemma3, longer"],
)
def test_logits_equal_the_oracle_across_the_edge(name, window_length):
    """Long windows, so that positions are real ones. A pass crosses the edge of the window, then single tokens come, then a pass in parts."""
    model, ids = load(folder(name)), english(folder(name), window_length + 12)
    assert ("gemma3" in name) == (len(set(native_windows(model, window_length=600))) > 1)
    cache = SinkCache.from_model(model, window_length, NUM_SINK_TOKENS)
    logits = feed(model, cache, ids, [window_length - 3, 7, 1, 1, (6, 2)])
    expected = oracle_logits(model, ids, window_length, NUM_SINK_TOKENS, num_at_once=window_length)
    assert_same(logits, expected)


def test_the_oracle_tells_sinks_that_are_left_where_they_were():
    """Else the comparison would mean nothing with these weights."""
    window_length, model, ids = 96, load(folder("smollm2")), english(folder("smollm2"), 110)
    logits = feed(model, SinkCache.from_model(model, window_length, NUM_SINK_TOKENS), ids, [window_length, 14])
    wrong = oracle_logits(model, ids, window_length, NUM_SINK_TOKENS, shift=False, num_at_once=window_length)
    with pytest.raises(AssertionError):
        assert_same(logits, wrong)


@pytest.mark.parametrize("window_lengths", [(256, 16384), pytest.param((1024, 4096), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_windows_up_to_16384_are_accepted(path, dtype, window_lengths):
    """Rounding of angles grows with the position, and each model amplifies it in its own way: no reason to refuse one."""
    model = load(path, dtype)
    try:
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            for window_length in window_lengths:
                SinkCache.from_model(model, window_length, NUM_SINK_TOKENS)
    finally:
        model.set_attn_implementation("sdpa")


def test_sinks_are_what_a_window_lacks(path):
    """The paper's claim, on English text: without sinks, a window loses much as soon as the first tokens are gone."""
    window_length, model, ids = 96, load(path), english(path, 385)
    nats = []
    for num_sink_tokens in (0, NUM_SINK_TOKENS):
        cache = SinkCache.from_model(model, window_length, num_sink_tokens)
        logits = feed(model, cache, ids[:, :-1], [window_length] + [(96, 4)] * 3)
        nats.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none"))
    none, sinks = nats
    torch.testing.assert_close(none[:window_length], sinks[:window_length], rtol=1e-4, atol=1e-4)
    assert none[window_length:].mean() > sinks[window_length:].mean() + 0.3


def next_turn(tokenizer, question: str, is_first: bool) -> torch.Tensor:
    """The ids that lead from the last answer to the next one."""
    before = [] if is_first else [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "ANSWER"}]
    text = tokenizer.apply_chat_template(
        [*before, {"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text.split("ANSWER", 1)[-1] if before else text, return_tensors="pt", add_special_tokens=False).input_ids


def test_a_chat_of_several_turns_goes_past_the_window():
    """What the cache knows in the end is what one that reads the whole conversation knows; and the answers make sense."""
    model, tokenizer = load(folder("smollm2")), AutoTokenizer.from_pretrained(folder("smollm2"))
    window_length, answers, text = 96, [], torch.zeros(1, 0, dtype=torch.long)
    cache = SinkCache(window_length=window_length, num_sink_tokens=NUM_SINK_TOKENS)
    for country in ("France", "Italy", "Spain", "Germany"):
        question = next_turn(tokenizer, f"What is the capital of {country}?", is_first=not answers)
        text = torch.cat([text, question], dim=1)
        num_before = text.shape[1]
        text = generate(model=model, inputs=text, past_key_values=cache, max_new_tokens=20)
        answers.append(tokenizer.decode(text[0, num_before:], skip_special_tokens=True))
        if text[0, -1] == tokenizer.eos_token_id:
            text = text[:, :-1]  # the template brings it
    assert all(city in answer for city, answer in zip(("Paris", "Rome", "Madrid", "Berlin"), answers)), answers
    assert cache.num_tokens_seen > window_length + 20

    other = SinkCache.from_model(model, window_length, NUM_SINK_TOKENS)
    seen = text[:, : cache.num_tokens_seen]
    feed(model, other, seen, [window_length, seen.shape[1] - window_length])
    token = torch.tensor([[tokenizer.eos_token_id]])
    assert_same(feed(model, cache, token, [1]), feed(model, other, token, [1]))


def test_looking_up_the_prompt_writes_the_same(path):
    """Drafts of several tokens are checked in one pass and taken back, at a full window."""
    model, ids = load(path), english(path, 100)
    options = {"window_length": 80, "num_sink_tokens": NUM_SINK_TOKENS, "max_new_tokens": 20}
    plain = generate(model=model, inputs=ids, **options)
    assert torch.equal(generate(model=model, inputs=ids, prompt_lookup_num_tokens=4, **options), plain)


def test_a_saved_window_goes_on(path, tmp_path):
    """To the last bit, as documented."""
    model, ids = load(path), english(path, 120)
    cache = SinkCache.from_model(model, 96, NUM_SINK_TOKENS)
    feed(model, cache, ids[:, :110], [96, 14])
    cache.save(tmp_path / "window")
    loaded = SinkCache.load(tmp_path / "window", model)
    assert loaded.num_tokens_seen == 110
    rest = ids[:, 110:]
    torch.testing.assert_close(feed(model, loaded, rest, [4, 1, 5]), feed(model, cache, rest, [4, 1, 5]), rtol=0, atol=0)


def test_a_model_straight_from_a_gguf_file():
    """It counts as quantized for transformers, and has the weights that scripts/get_model.py has saved."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("transformers reads GGUF files with the package gguf: pip install gguf")
    path = folder("smollm2")
    files = [*path.glob("*.gguf")]
    if not files:
        pytest.skip(f"{path} has no GGUF file: scripts/get_model.py leaves it there")
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=files[0].name, dtype=torch.float32).eval()
    weights = load(path).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    ids = english(path, 100)
    options = {"window_length": 80, "num_sink_tokens": NUM_SINK_TOKENS, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(generate(model=model, inputs=ids, **options), generate(model=load(path), inputs=ids, **options))
