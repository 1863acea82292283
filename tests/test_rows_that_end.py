"""A row of a batch that ends before others brings padding from then on, which the cache does not count: the next turn goes on row by
row as if each were alone."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LogitsProcessor, StoppingCriteria

from checks import (
    NUM_SINK_TOKENS,
    RECORD,
    WINDOW,
    assert_same,
    build_recurrent_model,
    left_padded,
    move_ahead,
    needs,
    random_ids,
)
from custom_generate.generate import SinkCache, generate
from families import build_model
from oracle import known_oracle_logits, oracle_logits

PAD, EOS = 0, 1
MODES = {
    "dynamic": {},
    "static": {"static": True},
    "offloaded": {"offloaded": True},
}


class EndAt(LogitsProcessor):
    """Ends a row where its text has so many columns, and never before."""

    def __init__(self, columns: dict[int, int]):
        self.columns = columns

    def __call__(self, input_ids, scores):
        scores = scores.index_fill(1, torch.tensor([PAD, EOS]), float("-inf"))
        for row, length in self.columns.items():
            if input_ids.shape[1] == length:
                scores[row] = float("-inf")
                scores[row, EOS] = 0
        return scores


def turn(model, cache: SinkCache, texts: list[torch.Tensor], num_new: dict[int, int], num_tokens: int = 25, **options):
    """One turn of a batch, in which row `row` ends with its `num_new[row]`-th new token.

    Returns the texts `[1, n]` with the answers up to their ends, and the logits of each answer, `[1, n, vocab]`."""
    ids, mask = left_padded(texts)
    ends = EndAt({row: ids.shape[1] + num - 1 for row, num in num_new.items()})
    options = {"eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False, "max_new_tokens": num_tokens, **options}
    outputs = generate(ids, attention_mask=mask, model=model, past_key_values=cache, logits_processor=[ends], **options, **RECORD)
    answers = outputs.sequences[:, ids.shape[1] :]
    lengths = [num_new.get(row, answers.shape[1]) for row in range(len(answers))]
    logits = torch.stack(outputs.logits, 1)
    texts = [texts[row * len(texts) // len(answers)] for row in range(len(answers))]
    for row, length in enumerate(lengths):
        assert (answers[row, length:] == PAD).all() and (row not in num_new or answers[row, length - 1] == EOS)
    texts = [torch.cat([text, answers[row : row + 1, : lengths[row]]], 1) for row, text in enumerate(texts)]
    assert cache.num_tokens_seen_by_row == [text.shape[1] - 1 for text in texts]
    assert cache.unseen_token_ids == [int(text[0, -1]) for text in texts]
    return texts, [logits[row : row + 1, :length] for row, length in enumerate(lengths)]


@functools.cache
def shared_model(kind: str) -> torch.nn.Module:
    if kind in ("lfm2", "qwen3_5_text"):
        return build_recurrent_model(kind)
    return build_model(kind, "eager" if kind == "bloom" else "sdpa")


def assert_like_the_oracle(model, texts, logits) -> None:
    for text, of_answer in zip(texts, logits):
        expected = known_oracle_logits(model, text[:, :-1], **WINDOW)
        assert_same(of_answer, expected[:, -of_answer.shape[1] :])


def with_more(texts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat([text, random_ids(5 + 3 * row, seed=20 + row)], 1) for row, text in enumerate(texts)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "bloom", "lfm2", "qwen3_5_text"])
def test_the_next_turns_are_those_of_each_row_alone(kind, mode):
    """Rows end while their windows are filling, at the edge and far behind it; the longest row and the shortest; other rows in
    each turn."""
    model = shared_model(kind)
    if kind == "bloom" and mode == "static":
        pytest.skip("refused")
    cache = SinkCache.from_model(model, **WINDOW, **MODES[mode])
    texts = [random_ids(num, seed=num) for num in (40, 3, 10, 6)]
    texts, logits = turn(model, cache, texts, {0: 4, 1: 1, 2: 6})
    assert_like_the_oracle(model, texts, logits)
    for ends in ({1: 3, 3: 20}, {0: 1, 2: 2, 3: 3, 1: 30}):
        texts, logits = turn(model, cache, with_more(texts), ends, max(ends.values()) + 1)
        assert_like_the_oracle(model, texts, logits)


@pytest.mark.parametrize(
    "quantized",
    [
        {"backend": "fp8", "q_group_size": 8, "residual_length": 8},
        {"backend": "quanto", "q_group_size": 8, "residual_length": 8},
        {"backend": "hqq", "q_group_size": 8, "residual_length": 8},
    ],
)
def test_quantized(quantized):
    """Against each row alone, in a cache that quantizes in the same way.

    In float64: in float32, a batch is rounded otherwise than a row, and a number half-way between two codes gets the other one."""
    needs(quantized["backend"])
    model = build_model("llama").double()
    window = {"window_length": 48, "num_sink_tokens": NUM_SINK_TOKENS}
    cache = SinkCache.from_model(model, **window, quantized=quantized)
    texts = [random_ids(num, seed=num) for num in (60, 9, 40)]
    alone = [SinkCache.from_model(model, **window, quantized=quantized) for _ in texts]
    for ends in ({0: 4, 1: 20}, {2: 3}, {}):
        before = with_more(texts)
        texts, logits = turn(model, cache, before, ends, 30, prefill_chunk_size=1)
        for row, text in enumerate(texts):
            num = ends.get(row, 30)
            own_texts, own_logits = turn(
                model, alone[row], [before[row]], {0: num} if row in ends else {}, num, prefill_chunk_size=1
            )
            assert own_texts[0].equal(text)
            assert_same(logits[row], own_logits[0])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
def test_return_sequences(model, static, do_sample):
    torch.manual_seed(0)
    cache = SinkCache.from_model(model, **WINDOW, static=static)
    copies = {"num_return_sequences": 2, "do_sample": True}
    texts, logits = turn(model, cache, [random_ids(30), random_ids(5, seed=2)], {0: 4, 3: 7}, **copies)
    assert_like_the_oracle(model, texts, logits)
    texts, logits = turn(model, cache, with_more(texts), {1: 5}, do_sample=do_sample)
    assert_like_the_oracle(model, texts, logits)


class StopRow(StoppingCriteria):
    """Ends row 0 at a length, without a token for it."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([row == 0 and input_ids.shape[1] == self.length for row in range(len(input_ids))])


def test_a_criterion_that_needs_no_token(model):
    """As a stop string: the last token that is not padding has not been through the model."""
    ids, cache = random_ids(20, num_rows=2), SinkCache.from_model(model, **WINDOW)
    options = {"pad_token_id": PAD, "stopping_criteria": [StopRow(25)], "do_sample": False, "past_key_values": cache}
    text = generate(ids, model=model, eos_token_id=EOS, logits_processor=[EndAt({})], max_new_tokens=20, **options)
    assert (text[0, 25:] == PAD).all() and cache.num_tokens_seen_by_row == [24, 39]
    assert cache.unseen_token_ids == [int(text[0, 24]), int(text[1, -1])]
    texts, logits = turn(model, cache, with_more([text[:1, :25], text[1:]]), {})
    assert_like_the_oracle(model, texts, logits)


def test_without_a_token_that_ends_texts_a_row_goes_on(model):
    """transformers then feeds no padding: what follows is text."""
    ids, cache = random_ids(20, num_rows=2), SinkCache.from_model(model, **WINDOW)
    options = {"stopping_criteria": [StopRow(25)], "do_sample": False, "past_key_values": cache}
    text = generate(ids, model=model, max_new_tokens=20, **options)
    assert cache.num_tokens_seen_by_row == [39, 39] and cache.unseen_token_ids == text[:, -1].tolist()
    assert len(cache.stream.num_seen) == 1


def test_stop_strings(tiny_model, tokenizer):
    cache, prompts = SinkCache.from_model(tiny_model, **WINDOW), ["def read(path):\n    ", "import os, sys\n\n\nclass"]
    ids = [tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids for prompt in prompts]
    end = tokenizer("):\n", add_special_tokens=False).input_ids
    padded, mask = left_padded(ids)

    class Write(LogitsProcessor):
        def __call__(self, input_ids, scores):
            num = input_ids.shape[1] - padded.shape[1] - 3
            scores[:, tiny_model.config.eos_token_id] = float("-inf")
            if 0 <= num < len(end):
                scores[0, end[num]] = 1000.0
            return scores

    options = {"past_key_values": cache, "model": tiny_model, "do_sample": False, "max_new_tokens": 20}
    text = generate(
        padded, attention_mask=mask, stop_strings=["):\n"], tokenizer=tokenizer, logits_processor=[Write()], **options
    )
    num_new = 3 + len(end)
    assert cache.num_tokens_seen_by_row[0] == ids[0].shape[1] + num_new - 1, "the row has ended with the string"
    assert cache.unseen_token_ids[0] == end[-1]
    texts = [
        torch.cat([ids[0], text[:1, padded.shape[1] :][:, :num_new]], 1),
        torch.cat([ids[1], text[1:, padded.shape[1] :]], 1),
    ]
    padded, mask = left_padded([torch.cat([text, ids[1]], 1) for text in texts])
    outputs = generate(padded, attention_mask=mask, eos_token_id=None, **options, **RECORD)
    for row, text in enumerate(texts):
        text = torch.cat([text, ids[1], outputs.sequences[row : row + 1, padded.shape[1] :]], 1)
        expected = oracle_logits(tiny_model, text[:, :-1], **WINDOW)[:, -20:]
        assert_same(torch.stack(outputs.logits, 1)[row : row + 1], expected)


def test_going_on_without_a_prompt(model):
    cache = SinkCache.from_model(model, **WINDOW)
    texts, _ = turn(model, cache, [random_ids(30), random_ids(8, seed=2)], {0: 3})
    outputs = generate(model=model, past_key_values=cache, max_new_tokens=9, do_sample=False, **RECORD)
    answers = outputs.sequences[:, 1:]
    for row, text in enumerate(texts):
        text = torch.cat([text, answers[row : row + 1]], 1)
        assert_same(torch.stack(outputs.logits, 1)[row : row + 1], oracle_logits(model, text[:, :-1], **WINDOW)[:, -9:])


@pytest.mark.parametrize("num_copies", [1, 2])
def test_going_on_without_a_prompt_costs_nothing_for_what_has_gone_by(model, num_copies):
    """At token 10**12 a mask for the whole text would take terabytes."""
    cache = SinkCache.from_model(model, **WINDOW)
    texts, _ = turn(model, cache, [random_ids(30), random_ids(25, seed=2)], {0: 3})
    move_ahead(cache, 48 * 10**12)
    options = {"do_sample": num_copies > 1, "num_return_sequences": num_copies, "max_new_tokens": 9}
    outputs = generate(model=model, past_key_values=cache, **options, **RECORD)
    for row, answer in enumerate(outputs.sequences[:, 1:]):
        text = torch.cat([texts[row // num_copies], answer[None]], 1)
        assert_same(torch.stack(outputs.logits, 1)[row : row + 1], oracle_logits(model, text[:, :-1], **WINDOW)[:, -9:])


def test_a_prompt_of_embeddings(model):
    ids, cache = random_ids(20, num_rows=2), SinkCache.from_model(model, **WINDOW)
    embeds = model.get_input_embeddings()(ids).detach()
    options = {"eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False, "past_key_values": cache, "model": model}
    answers = generate(inputs_embeds=embeds, logits_processor=[EndAt({0: 3})], max_new_tokens=10, **options)
    assert answers[0].tolist()[3:] == [EOS, *[PAD] * 6]
    assert cache.num_tokens_seen_by_row == [23, 29] and cache.unseen_token_ids == [EOS, int(answers[1, -1])]


def test_beams_are_left_as_they_were(model):
    """A beam that ends is no row that ends."""
    cache = SinkCache.from_model(model, **WINDOW)
    generate(
        random_ids(20),
        model=model,
        past_key_values=cache,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=12,
        eos_token_id=[5, 6, 7, 8],
        pad_token_id=PAD,
    )
    assert cache.num_tokens_seen_by_row == [19] * 3


def test_a_batch_in_which_no_row_ends_costs_nothing(model, monkeypatch):
    """All rows alike: one number serves them all, and no pass has a mask. With one row, nothing is looked at."""
    masks, prepare = [], SinkCache.prepare

    def noting(self, *args, **kwargs):
        masks.append(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(SinkCache, "prepare", noting)
    cache = SinkCache.from_model(model, **WINDOW)
    turn(model, cache, [random_ids(20), random_ids(20, seed=2)], {})
    assert len(cache.stream.num_seen) == 1 and all(mask is None or mask.all() for mask in masks)
    turn(model, SinkCache.from_model(model, **WINDOW), [random_ids(20)], {0: 5})
    assert all(mask is None or mask.all() for mask in masks)


def test_a_compiled_static_window_makes_one_graph_more():
    """Of all passes in which some rows have ended, whichever they are."""
    model, plain = (build_model("llama", "sdpa", num_hidden_layers=2) for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    texts, logits = turn(model, cache, [random_ids(num, seed=num) for num in (4, 40, 12)], {}, 30)
    num_graphs = counters["stats"]["unique_graphs"]
    assert_like_the_oracle(plain, texts, logits)
    texts, logits = turn(model, cache, with_more(texts), {0: 3, 2: 20}, 40)
    assert_like_the_oracle(plain, texts, logits)
    assert counters["stats"]["unique_graphs"] <= num_graphs + 1
