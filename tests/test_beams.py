"""Beam search past the window equals beam search without a cache; and after it, the cache goes on with what was returned."""

import copy

import pytest
import torch
from transformers import LogitsProcessor
from transformers.modeling_outputs import CausalLMOutput

from checks import assert_same, left_padded, random_ids
from custom_generate.generate import SinkCache, generate
from families import build_model
from oracle import oracle_logits

WINDOW_LENGTH, NUM_SINK_TOKENS = 8, 2
WINDOW = {"window_length": WINDOW_LENGTH, "num_sink_tokens": NUM_SINK_TOKENS}
RECORD = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SOME_END_EARLY = {"eos_token_id": [11, 23, 35, 47, 59], "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return build_model("llama", "sdpa", num_hidden_layers=2)


@pytest.fixture(scope="module")
def batch():
    """Four windows, and less than one; with what comes after."""
    return left_padded([random_ids(26, seed=1), random_ids(5, seed=2)])


@pytest.fixture(scope="module")
def without_a_cache(model):
    """The model with the oracle in the place of its forward pass: transformers' search runs on it as it is, with `use_cache=False`."""
    known: dict[tuple, torch.Tensor] = {}

    def last_logits(ids: torch.Tensor) -> torch.Tensor:
        text = tuple(ids.tolist())
        if text not in known:
            known[text] = oracle_logits(model, ids[None], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -1:]
        return known[text]

    def forward(input_ids, attention_mask=None, position_ids=None, use_cache=None, return_dict=None, logits_to_keep=0, **kwargs):
        masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return CausalLMOutput(logits=torch.cat([last_logits(ids[mask.bool()]) for ids, mask in zip(input_ids, masks)]))

    view = copy.copy(model)
    view.forward = forward
    return view


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "repetition_penalty": 1.3},
        {"num_beams": 3, "num_return_sequences": 2, **SOME_END_EARLY},
        {"num_beams": 3, "early_stopping": True, **SOME_END_EARLY},
        {"num_beams": 3, "do_sample": True, "top_k": 6, "num_return_sequences": 2},
    ],
    ids=lambda options: "-".join(name for name in options if name not in ("num_beams", "pad_token_id")) or "plain",
)
def test_beams_past_the_window_equal_beams_without_a_cache(model, without_a_cache, batch, options):
    """Sequences and scores, in a batch with padding: would catch rows that were reordered wrongly, in any layer or for the sinks alone."""
    ids, mask = batch
    options = {"do_sample": False, "max_new_tokens": 6} | options
    torch.manual_seed(0)
    ours = generate(ids, attention_mask=mask, model=model, **options, **WINDOW, **RECORD)
    torch.manual_seed(0)
    expected = without_a_cache.generate(ids, attention_mask=mask, use_cache=False, **options, **RECORD)
    assert ours.sequences.equal(expected.sequences)
    assert ours.beam_indices is None or ours.beam_indices.equal(expected.beam_indices)
    torch.testing.assert_close(ours.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
    assert len(ours.sequences) == 2 * options.get("num_return_sequences", 1)


def test_a_prompt_goes_through_once_not_once_for_each_beam(model):
    rows = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        generate(random_ids(26), model=model, num_beams=3, max_new_tokens=3, **WINDOW)
    finally:
        handle.remove()
    assert sum(num_rows * num_columns for num_rows, num_columns in rows[:-3]) == 25  # a long pass comes in parts, as so many rows
    assert rows[-3:] == 3 * [(3, 1)]


@pytest.mark.parametrize("num_return_sequences", [1, 2, 3])
@pytest.mark.parametrize("static", [False, True])
def test_the_next_turn_goes_on_with_the_sequences_that_were_returned(model, num_return_sequences, static):
    """Beams that ended early are in no row of the search any more, and others stand in another order."""
    texts = [random_ids(26, seed=1), random_ids(5, seed=2)]
    ids, mask = left_padded(texts)
    cache = SinkCache(**WINDOW, static=static)
    lengths = []
    for turn in range(3):
        outputs = generate(
            ids, attention_mask=mask, model=model, past_key_values=cache, num_beams=3, max_new_tokens=6, do_sample=False,
            num_return_sequences=num_return_sequences if turn == 0 else 1, **SOME_END_EARLY, **RECORD,
        )  # fmt: skip
        assert outputs.past_key_values is cache and cache.batch_size == 2 * num_return_sequences == len(outputs.sequences)
        assert cache.get_seq_length() == max(text.shape[1] for text in texts) - 1
        if turn == 0:
            texts = [text for text in texts for _ in range(num_return_sequences)]
        answers = [row[ids.shape[1] :] for row in outputs.sequences]
        answers = [answer[answer != SOME_END_EARLY["pad_token_id"]][None] for answer in answers]
        lengths += [answer.shape[1] for answer in answers]
        texts = [torch.cat([text, answer, random_ids(3, seed=turn)], 1) for text, answer in zip(texts, answers)]
        ids, mask = left_padded(texts)
    assert min(lengths) < max(lengths) == 6, "nothing has ended early"
    outputs = generate(ids, attention_mask=mask, model=model, past_key_values=cache, do_sample=False, max_new_tokens=4, **RECORD)
    for row, text in enumerate(texts):
        text = torch.cat([text, outputs.sequences[row : row + 1, ids.shape[1] :]], 1)
        logits = torch.stack([step[row] for step in outputs.logits])[None]
        assert_same(logits, oracle_logits(model, text[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -4:])


def test_the_next_turn_may_pass_only_what_the_cache_has_not_seen(model):
    cache = SinkCache(**WINDOW)
    first = generate(random_ids(26), model=model, past_key_values=cache, num_beams=3, max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == 25 and cache.unseen_token_ids == [first[0, 25].item()]
    text = torch.cat([first, random_ids(3, seed=3)], 1)
    new = {"inputs": text[:, 25:], "attention_mask": torch.ones(text.shape)}
    with pytest.raises(ValueError, match="has not been through the model"):
        generate(
            **new | {"inputs": text[:, 26:], "attention_mask": new["attention_mask"][:, 1:]}, model=model, past_key_values=cache
        )
    outputs = generate(**new, model=model, past_key_values=cache, max_new_tokens=4, do_sample=False, **RECORD)
    text = torch.cat([text, outputs.sequences[:, -4:]], 1)
    logits = torch.cat(outputs.logits)[None]
    assert_same(logits, oracle_logits(model, text[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -4:])


def test_without_a_prompt_the_text_goes_on_from_the_prompt_of_the_search(model):
    """The cache is left at the prompt, not behind a beam: a call without a prompt writes what greedy decoding writes behind it."""
    ids = random_ids(20, seed=4)
    outputs = generate(ids, model=model, num_beams=3, max_new_tokens=6, **WINDOW, **RECORD)
    cache = outputs.past_key_values
    assert cache.num_tokens_seen == 19 and cache.unseen_token_ids == [int(ids[0, -1])]
    more = generate(model=model, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert more[:, 1:].equal(generate(ids, model=model, max_new_tokens=8, do_sample=False, **WINDOW)[:, 20:])


def test_a_search_goes_on_from_one_text(model):
    """Not from the two that a call has returned: of them, it would read only one, and leave rows that belong to no sequence."""
    cache = SinkCache(**WINDOW)
    texts = generate(random_ids(5), model=model, past_key_values=cache, num_beams=2, num_return_sequences=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="This cache holds 2 rows, and 1 are passed"):
        generate(texts[:1], model=model, past_key_values=cache, num_beams=2, max_new_tokens=3)
    texts = generate(texts, model=model, past_key_values=cache, num_beams=2, max_new_tokens=3)
    assert len(texts) == cache.batch_size == len(cache.unseen_token_ids) == 2


def test_after_an_interrupted_search_the_cache_goes_on(model):
    class Interrupt(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == 30:
                raise KeyboardInterrupt
            return scores

    cache, prompt = SinkCache(**WINDOW), random_ids(26)
    with pytest.raises(KeyboardInterrupt):
        generate(prompt, model=model, past_key_values=cache, num_beams=3, max_new_tokens=9, logits_processor=[Interrupt()])
    assert cache.batch_size == 1 and cache.get_seq_length() == 25
    outputs = generate(prompt, model=model, past_key_values=cache, max_new_tokens=4, do_sample=False, **RECORD)
    expected = oracle_logits(model, outputs.sequences[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -4:]
    assert_same(torch.cat(outputs.logits)[None], expected)
