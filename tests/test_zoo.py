"""Every type in transformers' causal-LM mapping gets a verdict, found by running it: exact, or refused with a reason.

There is no third. A model that loads and gives other logits than the oracle, or fails in another way than by a ValueError at the
door, is a bug here. `scripts/compatibility.py` writes the verdicts into the README.
"""

import copy

import pytest
import torch
import transformers
from packaging import version

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, assert_same, difference, feed, left_padded, random_ids
from custom_generate import probe
from custom_generate.generate import SinkCache, generate
from custom_generate.rotation import Rotation
from families import TRANSFORMERS
from oracle import TOLERANCE, oracle_logits
from zoo import LEFT_OUT, SAME_AS, ZOO_RELEASE, ZOO_TYPES, tiny_config
from zoo import build_zoo_model as build

TYPES = [
    pytest.param(name, marks=[pytest.mark.slow] if SAME_AS.get(name) in ZOO_TYPES else [])
    for name in ZOO_TYPES
    if name not in LEFT_OUT
]


def build_zoo_model(model_type: str) -> torch.nn.Module:
    try:
        return build(model_type)
    except Exception as error:
        if TRANSFORMERS >= version.parse(ZOO_RELEASE):
            raise
        pytest.skip(f"no small model of it with transformers {TRANSFORMERS}: {error}")


@pytest.fixture(scope="module", params=TYPES)
def zoo_model(request) -> torch.nn.Module:
    """Of each type in turn: built once, and looked at once, for all the tests of that type. Who changes it takes a copy."""
    return build_zoo_model(request.param)


def traits_or_refusal(model):
    """What the cache knows of a model, or the message with which it refuses it."""
    try:
        return SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS).traits
    except ValueError as error:
        return str(error)


def test_exact_or_refused(zoo_model):
    """Singles, chunks over every edge, and a left-padded batch with rows before, at and past the edge: the oracle's logits.

    The oracle takes the tokens that fit into the window in one plain pass: so this is parity with the model itself, too."""
    model = zoo_model
    traits = traits_or_refusal(model)
    if isinstance(traits, str):
        assert type(model).__name__ in traits, "a refusal names the model"
        with pytest.raises(ValueError):  # and generate refuses it too, before the first token
            generate(random_ids(5), model=model, max_new_tokens=2)
        return
    if not traits.splits_exactly:  # its published limits are the matter of other tests: without them the oracle can judge it
        model = copy.deepcopy(model)
        limit_time_steps(model, 0.0, float("inf"))
        traits = traits_or_refusal(model)
        assert traits.splits_exactly

    input_ids = random_ids()
    window = {"window_length": WINDOW_LENGTH, "num_sink_tokens": NUM_SINK_TOKENS}
    expected = oracle_logits(model, input_ids, **window, num_at_once=WINDOW_LENGTH)
    few, other_sinks = input_ids[:, : WINDOW_LENGTH + 8], random_ids(NUM_SINK_TOKENS, seed=9)
    others = oracle_logits(model, few, **window, num_at_once=WINDOW_LENGTH, sinks=other_sinks)
    has_sinks = any(layer is not None and layer.native_window != 6 for layer in traits.layers)
    assert difference(others, expected[:, : few.shape[1]]) > 100 * TOLERANCE or not has_sinks, "the comparison would mean nothing"
    splits = [[9, 7] + [1] * 64] if traits.is_ordered else [[1] * 80, [3, 30, 1, 1, 40, 5], [20, (48, 6), (12, 4)]]
    for sizes in splits:
        cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
        assert_same(feed(model, cache, input_ids, sizes), expected)

    lengths = (30, 2, 19)  # of texts that begin with tokens, and so with sinks, of their own
    texts = [input_ids[:, 9 * row : 9 * row + length + 30] for row, length in enumerate(lengths)]
    ids, mask = left_padded([text[:, :-30] for text in texts])
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    feed(model, cache, ids, [16] + [1] * 14 if traits.is_ordered else [30], mask)
    rest = torch.cat([text[:, -30:] for text in texts])
    logits = feed(model, cache, rest, [1] * 30 if traits.is_ordered else [1] * 14 + [(9, 3)] + [1] * 7)
    for row, (length, text) in enumerate(zip(lengths, texts)):
        if row > 0:  # the first is the stream above
            expected = oracle_logits(model, text, **window, num_at_once=min(length, WINDOW_LENGTH))
        assert_same(logits[row : row + 1], expected[:, length : length + 30])


def test_what_is_accepted_in_float32_is_accepted_in_bfloat16(zoo_model):
    """A check that takes rounding for a rotation of its own would send away the users of the most usual dtype."""
    exact = traits_or_refusal(zoo_model)
    if isinstance(exact, str):
        pytest.skip("refused")
    model = copy.deepcopy(zoo_model)
    for parameter in model.parameters():  # not model.to(...), which rounds the tables of frequencies, too
        parameter.data = parameter.data.to(torch.bfloat16)
    rounded = traits_or_refusal(model)
    assert not isinstance(rounded, str), rounded
    for ours, theirs in zip(rounded.layers, exact.layers):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert [r.fingerprint for r in ours.rotations] == [r.fingerprint for r in theirs.rotations]


def limit_time_steps(model, *limits: float) -> None:
    """transformers applies the limits in passes of several tokens only."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = limits


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["nemotron_h", "zamba2"])
def test_published_limits_give_the_logits_of_transformers_own_generate(model_type):
    """Such a model is not exact however it is fed, and says so: the prompt goes in one pass, new tokens singly, as there."""
    model, options = build_zoo_model(model_type), {"max_new_tokens": 12, "do_sample": False, "output_logits": True}
    assert not SinkCache.from_model(model, 32, NUM_SINK_TOKENS).traits.splits_exactly
    prompt = random_ids(20, seed=3)
    ours = generate(prompt, model=model, window_length=32, return_dict_in_generate=True, **options)
    theirs = model.generate(prompt, return_dict_in_generate=True, **options)
    assert ours.sequences.equal(theirs.sequences)
    assert_same(torch.stack(ours.logits, 1), torch.stack(theirs.logits, 1))
    chunked = generate(prompt, model=model, window_length=16, return_dict_in_generate=True, prefill_chunk_size=1, **options)
    assert difference(torch.stack(chunked.logits, 1), torch.stack(theirs.logits, 1)) > TOLERANCE, "the comparison would mean nothing"


@pytest.mark.parametrize("num_new", [(2, 1), (3, 2), (4, 1), (5, 4)], ids=str)
@pytest.mark.parametrize("model_type", ["nemotron_h", "zamba2"])
def test_rows_that_go_on_by_different_numbers_of_tokens(model_type, num_new):
    """Where a model computes a single token in another way than several, passes of single tokens still end where padding does."""
    model, cache = build_zoo_model(model_type), SinkCache(WINDOW_LENGTH, NUM_SINK_TOKENS)
    options = {"model": model, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    first = generate(random_ids(12, num_rows=2), past_key_values=cache, **options)
    rows = [copy.deepcopy(cache) for _ in num_new]
    news = [torch.cat([first[row : row + 1, 14:], random_ids(num - 1, seed=row)], 1) for row, num in enumerate(num_new)]
    ids, mask = left_padded(news)
    mask, default = torch.cat([torch.ones(2, 14, dtype=torch.long), mask], 1), copy.deepcopy(cache)
    generate(ids, attention_mask=mask, past_key_values=default, **options)
    assert default.num_tokens_seen_by_row == [14 + num + 2 for num in num_new]
    options |= {"prefill_chunk_size": 1, "return_dict_in_generate": True, "output_logits": True}
    logits = torch.stack(generate(ids, attention_mask=mask, past_key_values=cache, **options).logits, 1)
    for row, (new, own) in enumerate(zip(news, rows)):
        own.batch_select_indices(torch.tensor([row]))
        assert_same(torch.stack(generate(new, past_key_values=own, **options).logits, 1), logits[row : row + 1])


@pytest.mark.parametrize("length", [17, 33])
@pytest.mark.parametrize("model_type", ["nemotron_h", "zamba2"])
def test_no_token_of_a_long_prompt_is_fed_singly(model_type, length):
    """A prompt past the window goes in several passes, which agree with each other unless one brings a single token."""
    model, prompt = build_zoo_model(model_type), random_ids(length, seed=3)
    limit_time_steps(model, 0.1, float("inf"))  # so much that one token of the prompt shows
    outputs = generate(prompt, model=model, window_length=16, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    cache = SinkCache.from_model(model, window_length=16)
    assert_same(outputs.logits[0], feed(model, cache, prompt, [length - 9, 9])[:, -1])


def test_layers_of_which_nothing_is_rotated():
    """Mistral Large 4 caches the rotated part of its keys apart; in layers without positions that part has no dimensions."""
    if "mistral_large4" not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this release")
    torch.manual_seed(0)
    config = tiny_config(transformers.CONFIG_MAPPING["mistral_large4"])
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    traits, input_ids = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS).traits, random_ids()
    assert [layer.shapes[1][1] for layer in traits.layers] == [8, 8, 8, 0]
    expected = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    for sizes in ([1] * 80, [3, 30, 1, 1, 40, 5]):
        cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
        assert_same(feed(model, cache, input_ids, sizes), expected)


def test_few_are_left_out():
    assert set(LEFT_OUT) < set(ZOO_TYPES) and len(LEFT_OUT) < 12
    assert all(LEFT_OUT.values())
    assert set(SAME_AS).isdisjoint({*SAME_AS.values(), *LEFT_OUT}) and set(SAME_AS.values()) < set(ZOO_TYPES)


class OffByOne(Rotation):
    """Right at position 0, and one position too far everywhere else."""

    def angles(self, start, stop):
        return super().angles(start, stop + (stop > 0))


WRONG = {
    "off by one position": lambda r: OffByOne(r.frequency, r.partner),
    "other pairs": lambda r: Rotation(r.frequency, r.partner.roll(1)),
    "other direction": lambda r: Rotation(-r.frequency, r.partner),
    "other table": lambda r: Rotation(r.frequency * 0.9, r.partner),
    "one pair of another table": lambda r: Rotation(r.frequency * (r.frequency.abs() != r.frequency.abs().max()), r.partner),
}


def test_the_model_itself_rejects_another_rotation(zoo_model, monkeypatch):
    """The check can't be fooled: with wrong rotations in place of the right ones, nothing is accepted."""
    traits = traits_or_refusal(zoo_model)
    if isinstance(traits, str):
        pytest.skip("refused")
    rotations = {r.fingerprint: r for layer in traits.layers if layer for r in layer.rotations if not r.is_identity}
    if not rotations:
        pytest.skip("no rotation")
    for wrong in WRONG.values():
        candidates = [wrong(rotation) for rotation in rotations.values()]
        identities = {layer.shapes[i][1] for layer in traits.layers if layer for i in range(2)}
        monkeypatch.setattr(
            probe,
            "candidate_rotations",
            lambda head_dim, tables: (
                [Rotation.identity(head_dim)] * (head_dim in identities) + [r for r in candidates if len(r.frequency) == head_dim]
            ),
        )
        assert "no known rotation" in traits_or_refusal(copy.deepcopy(zoo_model))  # a model is asked once
