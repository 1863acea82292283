"""Which of the tokens passed are new: padding tokens in a text, a text that goes on without a prompt, one remedy for each mistake."""

import copy

import pytest
import torch
from transformers import LogitsProcessor

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, assert_same, feed, left_padded, random_ids
from custom_generate.generate import SinkCache, generate
from families import build_model
from oracle import oracle_logits

WINDOW = {"window_length": WINDOW_LENGTH, "num_sink_tokens": NUM_SINK_TOKENS}
RECORD = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
PAD = 0  # `random_ids` has none
PADDED = {"pad_token_id": PAD}


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3", "sdpa")


class Say(LogitsProcessor):
    """Chooses the tokens of `answer`, whatever the model says."""

    def __init__(self, answer: list[int]):
        self.answer = iter(answer)

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -100.0).index_fill(1, torch.tensor([next(self.answer)]), 100.0)


def answered(model, prompt, answer: list[int], **window) -> tuple[SinkCache, torch.Tensor]:
    """A cache, and the text that was returned with it: the prompt and then the answer."""
    cache = SinkCache(**(WINDOW | window))
    options = {"attention_mask": torch.ones_like(prompt), "logits_processor": [Say(answer)], "max_new_tokens": len(answer)}
    return cache, generate(prompt, model=model, past_key_values=cache, do_sample=False, **options)


def assert_goes_on(model, outputs, text, num_sink_tokens: int = NUM_SINK_TOKENS) -> None:
    """The logits are those of the oracle for a row whose text so far, `[1, length]`, was this."""
    new = outputs.sequences[:, -len(outputs.logits) :]
    expected = oracle_logits(model, torch.cat([text, new], 1)[:, :-1], WINDOW_LENGTH, num_sink_tokens)
    assert_same(torch.stack(outputs.logits, 1), expected[:, text.shape[1] - 1 :])


# ---- the padding token in a text, without a mask


@pytest.mark.parametrize("how", ["whole", "cropped", "new"])
@pytest.mark.parametrize(
    "prompt, answer",
    [
        (random_ids(20), [5, PAD, 6, 8]),
        (random_ids(20), [5, 6, PAD]),
        (random_ids(20), [PAD, PAD, PAD]),
        (random_ids(6), [5, PAD, 6]),
        (torch.cat([torch.full((1, 2), PAD), random_ids(20)], 1), [5, 6]),
        (torch.cat([torch.full((1, 1), PAD), random_ids(5)], 1), [PAD, 5]),
        (random_ids(20), [5, *[PAD] * 3, *range(20, 26)]),
    ],
    ids=["inside", "last", "all", "window-not-full", "first", "first-and-inside", "where-the-window-begins"],
)
def test_a_padding_token_that_the_cache_has_seen_is_a_token(model, prompt, answer, how):
    """It strikes an endless chat after hours: the model says the token that also pads."""
    cache, text = answered(model, prompt, answer)
    text = torch.cat([text, random_ids(3, seed=9)], 1)
    if how == "cropped" and text.shape[1] < WINDOW_LENGTH:
        pytest.skip("the text is not longer than its end")
    ids = {"whole": text, "cropped": text[:, -WINDOW_LENGTH:], "new": text[:, cache.get_seq_length() :]}[how]
    outputs = generate(ids, model=model, past_key_values=cache, max_new_tokens=20, **PADDED, **RECORD)
    assert_goes_on(model, outputs, text)


def test_a_text_that_is_all_padding_tokens(model):
    """With no other token to tell where the text begins."""
    cache, text = answered(model, torch.full((1, 3), PAD), [PAD, PAD])
    outputs = generate(text[:, -1:], model=model, past_key_values=cache, max_new_tokens=20, **PADDED, **RECORD)
    assert_goes_on(model, outputs, text)


def test_padding_at_the_left_is_padding_without_a_mask(model):
    """Whole histories of different lengths, turn by turn, with the padding token said in one of them."""
    texts, cache = [random_ids(9), random_ids(23, seed=2)], SinkCache(**WINDOW)
    for turn in range(3):
        ids, mask = left_padded(texts)
        ids = ids.masked_fill(mask == 0, PAD)
        answers = Say([PAD if turn == 1 else 5, 6, 8])
        outputs = generate(
            ids, model=model, past_key_values=cache, max_new_tokens=3, logits_processor=[answers], **PADDED, **RECORD
        )
        for row, text in enumerate(texts):
            new = outputs.sequences[row : row + 1, -3:]
            expected = oracle_logits(model, torch.cat([text, new[:, :-1]], 1), **WINDOW)
            assert_same(torch.stack(outputs.logits, 1)[row : row + 1], expected[:, text.shape[1] - 1 :])
            texts[row] = torch.cat([text, new, random_ids(2 + row, seed=turn)], 1)


@pytest.mark.parametrize(
    "ids",
    [[[3, 4, PAD, 5]], [[3, 4, 5, PAD]], [[PAD, 3, PAD, 5]], [[3, 4, 5, 6], [3, 4, PAD, PAD]]],
    ids=["hole", "right", "left-and-hole", "right-in-one-row"],
)
def test_padding_tokens_of_which_it_can_not_be_told_what_they_are(model, ids, monkeypatch):
    """Right padding, most likely: taken for text it would be wrong without a word."""
    ids = torch.tensor(ids)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="No attention_mask is passed.*pad_token_id=0.*ones_like"),
    ):
        SinkCache.from_model(model, **WINDOW)
        patch.setattr(model.model, "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
        generate(ids, model=model, max_new_tokens=2, **PADDED, **WINDOW)
    outputs = generate(ids, model=model, max_new_tokens=20, attention_mask=torch.ones_like(ids), **PADDED, **RECORD, **WINDOW)
    for row in range(len(ids)):
        logits = torch.stack(outputs.logits, 1)[row : row + 1]
        assert_same(logits, oracle_logits(model, outputs.sequences[row : row + 1, :-1], **WINDOW)[:, ids.shape[1] - 1 :])


def test_padding_tokens_behind_the_text_of_a_cache(model):
    cache, text = answered(model, random_ids(20), [5, PAD, 6])
    num_seen = cache.get_seq_length()
    ids = torch.cat([text, torch.tensor([[8, PAD]])], 1)
    with pytest.raises(ValueError, match="Row 0 has the padding token among its new tokens"):
        generate(ids, model=model, past_key_values=cache, max_new_tokens=2, **PADDED)
    assert cache.get_seq_length() == num_seen
    mask = torch.ones_like(ids)
    outputs = generate(ids, model=model, past_key_values=cache, attention_mask=mask, max_new_tokens=20, **PADDED, **RECORD)
    assert_goes_on(model, outputs, ids)


def test_a_row_that_is_all_padding(model):
    ids = torch.tensor([[3, 4], [PAD, PAD]])
    with pytest.raises(ValueError, match="Row 1 of the prompt is all padding"):
        generate(ids, model=model, max_new_tokens=2, **PADDED, **WINDOW)


# ---- on without a prompt


@pytest.mark.parametrize("options", [{}, {"static": True}, {"offloaded": True}], ids=str)
def test_without_a_prompt_the_text_goes_on(model, options):
    """In three calls as in one, before the window is full and after it."""
    prompt, pieces = random_ids(5), []
    expected = generate(prompt, model=model, past_key_values=SinkCache(**WINDOW, **options), max_new_tokens=40, do_sample=False)
    cache = SinkCache(**WINDOW, **options)
    text = generate(prompt, model=model, past_key_values=cache, max_new_tokens=5, do_sample=False)
    for num_new in (3, 12, 20):
        pieces.append(generate(model=model, past_key_values=cache, max_new_tokens=num_new, do_sample=False))
        assert pieces[-1][:, 0].equal(text[:, -1])
        text = torch.cat([text, pieces[-1][:, 1:]], 1)
    assert text.equal(expected)


def test_a_batch_goes_on_without_a_prompt(model):
    """Each row from its own last token; the mask of transformers, for the whole text, may come along."""
    ids, mask = left_padded([random_ids(7), random_ids(30, seed=2)])
    expected = generate(ids, attention_mask=mask, model=model, max_new_tokens=30, do_sample=False, **WINDOW)
    for masks in ({}, {"attention_mask": torch.ones(2, 30 + 10)}):
        cache = SinkCache(**WINDOW)
        text = generate(ids, attention_mask=mask, model=model, past_key_values=cache, max_new_tokens=10, do_sample=False)
        outputs = generate(model=model, past_key_values=cache, max_new_tokens=20, **masks, **RECORD)
        assert torch.cat([text, outputs.sequences[:, 1:]], 1).equal(expected)


@pytest.mark.parametrize("assistance", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"prefill_chunk_size": 1}])
def test_options_without_a_prompt(model, assistance):
    prompt = random_ids(10).repeat(1, 3)
    cache = SinkCache(**WINDOW)
    text = generate(prompt, model=model, past_key_values=cache, max_new_tokens=5, do_sample=False)
    expected = generate(text, model=model, max_new_tokens=12, do_sample=False, **assistance, **WINDOW)
    more = generate(model=model, past_key_values=cache, max_new_tokens=12, do_sample=False, **assistance)
    assert torch.cat([text, more[:, 1:]], 1).equal(expected)


def test_a_loaded_cache_goes_on_without_a_prompt(model, tmp_path):
    cache, text = answered(model, random_ids(30), [5, 6, 8])
    cache.save(tmp_path / "cache")
    outputs = generate(model=model, past_key_values=SinkCache.load(tmp_path / "cache", model), max_new_tokens=10, **RECORD)
    assert_goes_on(model, outputs, text)


def test_the_last_token_may_be_the_one_that_begins_the_text(model):
    """It is no history that begins anew."""
    prompt = random_ids(20)
    cache, text = answered(model, prompt, [5, int(prompt[0, 0])])
    outputs = generate(model=model, past_key_values=cache, max_new_tokens=10, **RECORD)
    assert_goes_on(model, outputs, text)


def test_nothing_to_go_on_from(model):
    cache = SinkCache.from_model(model, **WINDOW)
    model(**cache.prepare(random_ids(20)))
    own = copy.deepcopy(model.generation_config)
    own.bos_token_id = 3
    for options in ({}, {"bos_token_id": 3}, {"generation_config": own}):
        with pytest.raises(ValueError, match="No prompt is passed.*Pass the tokens that it has not seen"):
            generate(model=model, past_key_values=cache, max_new_tokens=5, **options)


def test_the_token_returned_last_is_not_forgotten_for_a_mistake(model):
    """An argument that transformers refuses, and Ctrl-C within the first pass: the cache is as before."""
    cache, text = answered(model, random_ids(30), [5, 6])
    with pytest.raises(ValueError, match="mistyped"):
        generate(model=model, past_key_values=cache, max_new_tokens=5, mistyped=1)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model=model, past_key_values=cache, max_new_tokens=5)
    handle.remove()
    outputs = generate(model=model, past_key_values=cache, max_new_tokens=10, **RECORD)
    assert_goes_on(model, outputs, text)


def test_a_refused_assistance_leaves_what_was_recorded(model):
    """Drafts of an own loop are its own to take back."""
    cache, text = SinkCache.from_model(model, **WINDOW), random_ids(30)
    model(**cache.prepare(text))
    cache.activate_past_recording()
    model(**cache.prepare(random_ids(3, seed=5)))
    with pytest.raises(ValueError, match="mistyped"):
        generate(
            random_ids(4, seed=6), model=model, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=5, mistyped=1
        )
    assert cache.num_tokens_seen == 33
    cache.crop(-3)
    outputs = generate(random_ids(4, seed=6), model=model, past_key_values=cache, max_new_tokens=10, **RECORD)
    assert_goes_on(model, outputs, torch.cat([text, random_ids(4, seed=6)], 1))


# ---- one mistake, one remedy

REMEDIES = {
    "keep the ids": "keep the ids: torch.cat",
    "another text": "For another text, pass a new cache",
    "mask for all": "an attention_mask for the whole text",
    "unseen": "New tokens have to begin with the last one that was returned",
    "last tokens": r"pass the last 16 tokens \(no more, no less\)",
    "whole": "Pass the whole text, with the tokens that were returned",
    "inferred": "was inferred, from pad_token_id=0. Pass attention_mask",
}


@pytest.mark.parametrize(
    "change, remedy",
    [
        (lambda text: text.index_fill(1, torch.tensor([2]), 1), "keep the ids"),
        (lambda text: text.index_fill(1, torch.tensor([30]), 1), "keep the ids"),
        (lambda text: text.index_fill(1, torch.tensor([0]), 1), "another text"),
        (lambda text: random_ids(60, seed=3), "another text"),
        (lambda text: text[:, 34:].repeat(1, 4), "mask for all"),
        (lambda text: text[:, :20], "whole"),
        (lambda text: text[:, 36:], "unseen"),
        (lambda text: text[:, 25:], "last tokens"),
        (lambda text: torch.cat([torch.full((1, 4), PAD), text[:, 1:]], 1), "inferred"),
    ],
    ids=["sink", "window", "first", "other", "many-new", "earlier", "not-the-last", "end-of-other-length", "padding"],
)
def test_each_mistake_has_one_remedy(model, change, remedy):
    cache, text = answered(model, random_ids(30), [5, 6, 8, 9, 10])
    text = torch.cat([text, random_ids(10, seed=9)], dim=1)
    with pytest.raises(
        ValueError, match=f"Can't tell which of the .* tokens passed for row 0 are new.*{REMEDIES[remedy]}"
    ) as error:
        generate(change(text), model=model, past_key_values=cache, max_new_tokens=5, **PADDED)
    others = [other for name, other in REMEDIES.items() if name != remedy]
    assert not any(other.split("(")[0].strip("\\") in str(error.value) for other in others)
    assert cache.get_seq_length() == 34 and cache.unseen_token_ids == [10]


def test_embeddings_that_can_not_be_compared(model):
    cache = SinkCache(**WINDOW)
    embeds = model.get_input_embeddings()(random_ids(20)).detach()
    generate(inputs_embeds=embeds, model=model, past_key_values=cache, max_new_tokens=5, do_sample=False)
    with pytest.raises(ValueError, match="Without ids to compare, .* a whole text by having it behind 24 tokens.*mask for the whole text"):
        generate(random_ids(5), model=model, past_key_values=cache, max_new_tokens=5)


@pytest.mark.parametrize("num_new", [3, 7, 20])
def test_new_tokens_after_a_text_that_came_as_embeddings(model, num_new):
    """There are no ids to compare, but new tokens begin with the one that was returned last. However many there are, none is lost."""
    cache, embed = SinkCache(**WINDOW), model.get_input_embeddings()
    embeddings = embed(random_ids(5)).detach()
    options = {"model": model, "past_key_values": cache, "do_sample": False}
    answer = generate(inputs_embeds=embeddings, max_new_tokens=3, **options)
    new = torch.cat([answer[:, -1:], random_ids(num_new, seed=3)], 1)
    outputs = generate(new, max_new_tokens=4, **options | RECORD)
    text = torch.cat([embeddings, embed(torch.cat([answer, outputs.sequences[:, 1:]], 1))], 1)
    assert cache.num_tokens_seen == text.shape[1] - 1
    fresh = SinkCache.from_model(model, **WINDOW)
    with torch.no_grad():
        logits = [model(**fresh.prepare(inputs_embeds=text[:, at : at + 1])).logits for at in range(text.shape[1] - 1)]
    assert_same(torch.stack(outputs.logits, 1), torch.cat(logits[-4:], 1))
    if num_new == 3:  # the whole text, as long as the window
        whole = torch.cat([random_ids(5), answer, outputs.sequences[:, 1:], random_ids(3, seed=4)], 1)[:, :WINDOW_LENGTH]
        assert whole.shape[1] == WINDOW_LENGTH and cache.num_tokens_seen < WINDOW_LENGTH
        generate(whole, max_new_tokens=1, **options)
        assert cache.num_tokens_seen == WINDOW_LENGTH
    with pytest.raises(ValueError, match=rf"the last one that was returned \({cache.unseen_token_ids[0]}\).*pass only the new tokens"):
        generate(torch.full((1, 40), int(cache.unseen_token_ids[0] == 0)), max_new_tokens=1, **options)


def test_as_many_new_tokens_as_the_window_holds(model):
    """Their first is the last one returned, which the model had said twice: they are new, not the end of the text."""
    cache, text = answered(model, random_ids(30), [5, 6, 6])
    new = torch.cat([torch.tensor([[6]]), random_ids(WINDOW_LENGTH - 1, seed=9)], 1)
    outputs = generate(new, model=model, past_key_values=cache, max_new_tokens=10, **RECORD)
    assert_goes_on(model, outputs, torch.cat([text, new[:, 1:]], 1))


def test_the_end_of_a_text_that_repeats_the_token_returned_last(model):
    """More of its tokens than those that begin the cut history would fit, but then that token would not follow."""
    cache, text = answered(model, random_ids(30), [6] * 6)
    text = torch.cat([text, random_ids(WINDOW_LENGTH - 3, seed=9)], 1)
    outputs = generate(text[:, -WINDOW_LENGTH:], model=model, past_key_values=cache, max_new_tokens=10, **RECORD)
    assert_goes_on(model, outputs, text)


def test_the_end_of_a_text_whose_first_token_is_the_one_returned_last(model):
    """A history that was cut, and begins by chance with that token, is not taken for new tokens: all of it would be read twice."""
    ids = random_ids(120)
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, ids, [120])
    cache.unseen_token_ids = [int(ids[0, 100])]
    cut = torch.cat([ids[:, 100:], ids[:, 100:101], random_ids(3, seed=5)], dim=1)
    with pytest.raises(ValueError, match="begin within the text.*If all are new, pass an attention_mask for the whole text"):
        generate(cut, model=model, past_key_values=cache, max_new_tokens=1)
    assert cache.num_tokens_seen == 120
    mask = torch.ones(1, 120 + cut.shape[1], dtype=torch.long)
    generate(cut, attention_mask=mask, model=model, past_key_values=cache, max_new_tokens=1)
    assert cache.num_tokens_seen == 120 + cut.shape[1]


def test_as_many_tokens_as_the_window_holds_that_are_either_its_end_or_new(model):
    """The end of the text with another token in the place of the one returned last, which by chance is also their first: refused."""
    ids, num_new = random_ids(120), 4
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, ids, [120])
    end = ids[:, 120 - (WINDOW_LENGTH - num_new) :]
    cache.unseen_token_ids = [int(end[0, 0])]
    cut = torch.cat([end, random_ids(num_new, seed=5)], dim=1)
    assert cut[0, -num_new] != cut[0, 0]
    remedies = f"If they are its end, keep {cut[0, 0]} there. If all are new, pass an attention_mask for the whole text"
    with pytest.raises(ValueError, match=f"begin within the text, with another token where {cut[0, 0]} was returned. {remedies}"):
        generate(cut, model=model, past_key_values=cache, max_new_tokens=1)
    assert cache.num_tokens_seen == 120
