"""What scripts/benchmark.py compares with: each way to decode gives the logits that it should, and the clock counts what it should.

A comparison with a method that computes something else, or less, would say nothing about time.
"""

import time
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache

import baselines
import benchmark
from baselines import Setup, storage_bytes
from checks import NUM_SINK_TOKENS, NUM_TOKENS, WINDOW_LENGTH, assert_same, difference, random_ids
from custom_generate.generate import SinkCache
from families import TRANSFORMERS, build_model
from oracle import TOLERANCE, known_oracle_logits

pytestmark = pytest.mark.skipif(TRANSFORMERS < Version("5.16"), reason="the caches compared with are those of recent releases")

MODELS = {"llama": "sdpa", "qwen3": "eager", "mistral": "eager"}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return build_model(request.param, MODELS[request.param])


@torch.no_grad()
def decode(method: str, model, ids: torch.Tensor, prompt_length: int = WINDOW_LENGTH, **options) -> torch.Tensor:
    """Logits of all tokens behind the prompt, one step each."""
    decoder = benchmark.DECODERS[method](model, Setup(WINDOW_LENGTH, NUM_SINK_TOKENS, ids[:, :prompt_length], **options))
    return torch.cat([decoder.step(token) for token in ids[:, prompt_length:].split(1, dim=1)], dim=1)


def rules(model, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([known_oracle_logits(model, row[None], WINDOW_LENGTH, NUM_SINK_TOKENS) for row in ids])


@pytest.mark.parametrize("prompt_length", [5, WINDOW_LENGTH], ids=["filling", "full"])
@pytest.mark.parametrize("method", ["sink", "sink-static", "rerotate", "rotate-at-read"])
def test_methods_with_sinks_follow_the_same_rules(model, method, prompt_length):
    """Sinks and recent tokens at their positions within the cache, for two rows: what the oracle says, past five windows."""
    ids = random_ids(num_rows=2)
    assert_same(decode(method, model, ids, prompt_length), rules(model, ids)[:, prompt_length:])


@pytest.mark.parametrize("method", ["rerotate", "rotate-at-read"])
def test_without_their_rotation_they_do_not(method, monkeypatch):
    """Else the comparison above could not see positions."""
    model, ids = build_model("llama", "sdpa"), random_ids()
    monkeypatch.setattr(baselines, "rotate", lambda keys, cos, sin: keys)
    assert difference(decode(method, model, ids), rules(model, ids)[:, WINDOW_LENGTH:]) > 100 * TOLERANCE


@torch.no_grad()
def test_recomputing_is_a_pass_over_the_last_window(model):
    ids = random_ids(num_rows=2)
    windows = [ids[:, last - WINDOW_LENGTH + 1 : last + 1] for last in range(WINDOW_LENGTH, NUM_TOKENS)]
    expected = [model(window, past_key_values=DynamicCache()).logits[:, -1:] for window in windows]
    assert_same(decode("recompute", model, ids), torch.cat(expected, dim=1))


@torch.no_grad()
def test_native_windows_are_the_mask_of_the_last_tokens(model):
    """The model with native windows, fed token by token, against the one without under a mask: the same weights, so one architecture."""
    ids = random_ids(num_rows=2)
    query, key = torch.arange(NUM_TOKENS)[:, None], torch.arange(NUM_TOKENS)
    is_seen = (key <= query) & (key > query - WINDOW_LENGTH)
    mask = torch.zeros(1, 1, NUM_TOKENS, NUM_TOKENS).masked_fill(~is_seen, torch.finfo(torch.float32).min)
    assert_same(decode("native-window", model, ids), model(ids, attention_mask=mask).logits[:, WINDOW_LENGTH:])


@torch.no_grad()
def test_the_frozen_cache_costs_a_window_of_attention_and_nothing_else(model):
    """Would catch a limit that is none: keys that are not attended to, or a window that grows."""
    ids, steps = random_ids(WINDOW_LENGTH, num_rows=2), 3
    decoder = benchmark.DECODERS["frozen"](model, Setup(WINDOW_LENGTH, NUM_SINK_TOKENS, ids))
    held = [(layer.keys, layer.values) for layer in decoder.cache.layers]
    assert all(keys.shape[2] == values.shape[2] == WINDOW_LENGTH for keys, values in held)
    tokens = random_ids(steps, seed=2, num_rows=2).split(1, dim=1)
    first = [decoder.step(token) for token in tokens]
    assert all(one.equal(again) for one, again in zip(first, [decoder.step(token) for token in tokens]))
    for (keys, values), layer in zip(held, decoder.cache.layers):
        assert layer.keys is keys and layer.values is values
    held[0][1].select(2, 5).add_(1)  # one value that each step has to see
    assert all(difference(decoder.step(token), before) > TOLERANCE for token, before in zip(tokens, first))


def do_not_compile_quanto(monkeypatch) -> None:
    """It would compile one function for a minute, in each new environment: this one, in C++."""
    cpp = pytest.importorskip("optimum.quanto.library.extensions.cpp")

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        """Several numbers of so many bits in each byte: the lowest bits of all bytes come first."""
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))


@torch.no_grad()
@pytest.mark.parametrize("method", ["dynamic", "static", "quantized-fp8", "quantized-quanto"])
def test_a_turn_can_be_taken_again(model, method, monkeypatch):
    """The caches that grow: a turn gives the logits of a full pass, and after `rewind` the same again. (Few bits are not exact.)"""
    if method == "quantized-quanto":
        do_not_compile_quanto(monkeypatch)
        model = build_model(model.config.model_type, "sdpa", head_dim=64)  # its groups are of 64 numbers
    ids, turn_length = random_ids(WINDOW_LENGTH, num_rows=2), 6
    decoder = benchmark.DECODERS[method](model, Setup(WINDOW_LENGTH, NUM_SINK_TOKENS, ids, turn_length))
    first = WINDOW_LENGTH - (turn_length if method == "static" else turn_length // 2)
    tokens = random_ids(turn_length, seed=2, num_rows=2).split(1, dim=1)
    turns = []
    for _ in range(3):
        turns.append(torch.cat([decoder.step(token) for token in tokens], dim=1))
        decoder.rewind()
    expected = model(torch.cat([ids[:, :first], *tokens], dim=1)).logits[:, first:]
    if method.startswith("quantized"):
        assert TOLERANCE < difference(turns[0], expected) < 2
    else:
        assert_same(turns[0], expected)
    assert_same(turns[1], turns[0])
    assert_same(turns[2], turns[0])


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name in benchmark.DECODERS if "compiled" not in name and "hqq" not in name])
def test_random_states_fill_a_cache_as_a_prompt_does(method, monkeypatch):
    """Else long windows would be timed at another length."""
    if method == "quantized-quanto":
        do_not_compile_quanto(monkeypatch)
    model, ids = build_model("llama", "sdpa", head_dim=64), random_ids(WINDOW_LENGTH, num_rows=2)
    token = random_ids(1, num_rows=2)
    held, logits = [], []
    for is_random in (False, True):
        decoder = benchmark.DECODERS[method](model, Setup(WINDOW_LENGTH, NUM_SINK_TOKENS, ids, 6, is_random=is_random))
        logits.append(decoder.step(token))
        held.append(decoder.num_bytes_held)
    assert held[0] == held[1] and logits[0].shape == logits[1].shape
    assert method == "recompute" or difference(*logits) > 0.1


def test_what_a_method_is_not_written_for_is_refused():
    setup = Setup(WINDOW_LENGTH, NUM_SINK_TOKENS, random_ids(WINDOW_LENGTH))
    for family in ("cohere", "gpt-neox", "gemma3"):  # interleaved pairs, a part of the dimensions, native windows
        with pytest.raises(ValueError, match="by halves"):
            baselines.RerotatingDecoder(build_model(family, "sdpa"), setup)
    with pytest.raises(ValueError, match="cohere"):
        baselines.NativeWindowDecoder(build_model("cohere", "sdpa"), setup)


def test_bytes_are_those_of_storages():
    """A view holds all of what it is a view of; two views of one storage do not hold it twice."""
    storage = torch.zeros(100)
    holder = type("Holder", (), {})()
    holder.layers = [{"keys": storage[:3]}, (storage[50:], torch.zeros(7, dtype=torch.int64))]
    holder.model = torch.nn.Linear(1000, 1000)
    assert storage_bytes(holder) == 400 + 56


def test_the_cache_of_a_stream_holds_what_it_says():
    model = build_model("llama", "sdpa")
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    with torch.no_grad():
        for token in random_ids().split(1, dim=1):
            model(**cache.prepare(token))
    assert cache.num_bytes_held <= storage_bytes(cache) < 2 * cache.num_bytes_held


def test_the_clock_counts_tokens_and_not_itself():
    seen = []

    def on_edge(clock) -> None:
        seen.append((clock.position, len(clock.bucket), clock.total))
        time.sleep(0.05)

    clock = benchmark.TokenClock([10, 12], on_edge, benchmark.tqdm(disable=True))
    clock.put(torch.zeros(1, 8))
    for _ in range(5):
        clock.put(torch.zeros(1))
    assert [entry[:2] for entry in seen] == [(10, 2), (12, 2)]
    assert clock.position == 13 and clock.total < 50


def test_buckets_contain_the_lengths_asked_for():
    edges = benchmark.bucket_edges([1000, 3000])
    assert {100, 1000, 3000} <= set(edges) and edges == sorted(set(edges)) and edges[-1] == 3000


def test_a_spread_is_the_quartiles():
    assert benchmark.spread("ratio", [1.0, 2.0, 3.0, 4.0, 5.0]) == {"ratio": 3.0, "ratio_low": 2.0, "ratio_high": 4.0}
    assert benchmark.spread("ratio", [7.0]) == {"ratio": 7.0, "ratio_low": 7.0, "ratio_high": 7.0}
