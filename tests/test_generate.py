"""`generate`: what transformers does on top of the cache stays as it is, and nothing is left on the model."""

import copy
import functools
import warnings

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TextStreamer

from checks import (
    NUM_SINK_TOKENS,
    RECORD,
    WINDOW,
    WINDOW_LENGTH,
    assert_same,
    difference,
    feed,
    interrupted_at,
    left_padded,
    random_ids,
    rings_of,
)
from custom_generate.generate import SinkCache, generate
from custom_generate.releases import CACHE_NAME
from families import ORDERED, build_model
from oracle import known_oracle_logits, oracle_logits

MODEL = "qwen3"


@functools.cache
def shared_model(name: str) -> torch.nn.Module:
    return build_model(name)


def assert_logits_follow_the_rules(model, outputs, num_prompt_tokens: int, row: int = 0, num_padding: int = 0, history=None):
    """Each step's logits are the oracle's for the text up to there."""
    sequence = outputs.sequences[row : row + 1, num_padding:]
    if history is not None:
        sequence = torch.cat([history, sequence], dim=1)
        num_prompt_tokens += history.shape[1]
    logits = torch.stack([step[row] for step in outputs.logits])[None]
    expected = known_oracle_logits(model, sequence[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)
    assert_same(logits, expected[:, num_prompt_tokens - 1 :])


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "gpt-j", "deepseek-v3", "mistral-short-window", "bloom", "mpt", "falcon-alibi"]
)
@pytest.mark.parametrize("num_prompt_tokens", [1, WINDOW_LENGTH - 1, WINDOW_LENGTH, WINDOW_LENGTH + 1, 75])
def test_greedy_decoding_past_the_window(name, num_prompt_tokens):
    model = shared_model(name)
    prompt = random_ids(num_prompt_tokens)
    outputs = generate(prompt, model=model, max_new_tokens=40, do_sample=False, **WINDOW, **RECORD)
    assert outputs.sequences.shape == (1, num_prompt_tokens + 40)
    assert outputs.sequences[:, :num_prompt_tokens].equal(prompt)
    assert_logits_follow_the_rules(model, outputs, num_prompt_tokens)
    assert type(outputs.past_key_values).__name__ == "SinkCache"
    assert outputs.past_key_values.get_seq_length() == num_prompt_tokens + 39


@pytest.mark.parametrize("prefill_chunk_size", [1, 5, 16, 500])
def test_the_chunk_length_does_not_change_the_logits(model, prefill_chunk_size):
    prompt = random_ids(75)
    outputs = generate(prompt, model=model, max_new_tokens=3, prefill_chunk_size=prefill_chunk_size, **WINDOW, **RECORD)
    assert_logits_follow_the_rules(model, outputs, 75)


def test_a_long_prompt_never_has_all_its_logits_in_memory(model, monkeypatch):
    """Nor more keys in one pass than the window, a chunk and its copies of the sinks."""
    SinkCache.from_model(model, **WINDOW)  # asked before
    seen = []
    forward = type(model).forward

    @functools.wraps(forward)  # transformers looks at the signature
    def spy(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        seen.append((kwargs["input_ids"].numel(), outputs.logits.shape[1]))
        return outputs

    monkeypatch.setattr(type(model), "forward", spy)
    generate(random_ids(1000), model=model, max_new_tokens=2, prefill_chunk_size=8, **WINDOW)
    assert max(tokens for tokens, _ in seen) <= 32 and max(logits for _, logits in seen) == 1
    assert sum(tokens for tokens, _ in seen) == 1001


def test_a_long_prompt_over_a_full_window_comes_in_parts(model, monkeypatch):
    """Would catch that all of it is undivided: as exact, and slower. What `generate` begins with is one part at most."""
    shapes = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    try:
        outputs = generate(random_ids(100), model=model, max_new_tokens=2, **WINDOW, **RECORD)
    finally:
        handle.remove()
    full, last = shapes[1:-2], shapes[-2]
    assert shapes[0] == (1, WINDOW_LENGTH) and sum(rows * columns for rows, columns in shapes) == 101
    assert len(full) > 2 and all(rows > 1 and 1 < columns <= 4 for rows, columns in full) and last[0] == 1 and last[1] <= 4
    assert_logits_follow_the_rules(model, outputs, 100)


@pytest.mark.parametrize("counts", [(70, 3), (3, 70), (50, 50)])
def test_turns_of_several_lengths_for_rows_with_full_windows(model, counts):
    """Padding comes in the middle of the texts here, where a pass can't come in parts."""
    first = random_ids(30, num_rows=2, seed=4)
    cache = SinkCache.from_model(model, **WINDOW)
    text = generate(first, model=model, past_key_values=cache, max_new_tokens=2, do_sample=False, **WINDOW)
    turns = [torch.cat([text[row : row + 1], random_ids(num, seed=row)], dim=1) for row, num in enumerate(counts)]
    ids, mask = left_padded([turn[:, 31:] for turn in turns])
    mask = torch.cat([torch.ones(2, 31, dtype=torch.long), mask], dim=1)
    outputs = generate(ids, attention_mask=mask, model=model, past_key_values=cache, max_new_tokens=1, **RECORD)
    for row, turn in enumerate(turns):
        assert_same(outputs.logits[0][row : row + 1, None], oracle_logits(model, turn, **WINDOW)[:, -1:])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_by_either_name_and_returned_by_that_of_the_release(model, name):
    """`past_key_values` has become `cache` in transformers 5.24. What the release itself gets is by its own name, or it would warn."""
    cache = SinkCache.from_model(model, **WINDOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        outputs = generate(random_ids(20), model=model, max_new_tokens=2, return_dict_in_generate=True, **{name: cache})
        assert model(**cache.prepare(outputs.sequences[:, -1:])).logits.shape[1] == 1
    assert outputs[CACHE_NAME] is cache and outputs.past_key_values is cache and cache.num_tokens_seen == 22
    with pytest.raises(ValueError, match="passed twice, as cache and as past_key_values"):
        generate(random_ids(20), model=model, cache=cache, past_key_values=SinkCache(**WINDOW))


def test_nothing_but_the_ids_grows_with_the_text(model, monkeypatch):
    """transformers extends mask and positions at each step, in time that grows with the text. Nobody reads them."""
    sizes = []
    prepare = type(model).prepare_inputs_for_generation

    @functools.wraps(prepare)
    def spy(self, input_ids, *args, **kwargs):
        sizes.append([x.numel() for x in (input_ids, *args, *kwargs.values()) if isinstance(x, torch.Tensor)])
        return prepare(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", spy)
    generate(random_ids(5), model=model, max_new_tokens=60, do_sample=False, **WINDOW)
    assert len(sizes) == 60 and max(max(each) for each in sizes[1:]) == 1


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "bloom"])
def test_left_padded_prompts_of_very_different_lengths(name):
    """One shorter than the sinks, one just past the window, one of many windows, in one batch; also fed in chunks, some of which
    are padding only for a row."""
    model = build_model(name)
    prompts = [random_ids(length, seed=length) for length in (2, 17, 70)]
    ids, mask = left_padded(prompts)
    outputs = generate(ids, attention_mask=mask, model=model, max_new_tokens=40, do_sample=False, **WINDOW, **RECORD)
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        assert_logits_follow_the_rules(model, outputs, length, row, num_padding=70 - length)


def test_the_mask_is_inferred_from_padding_as_in_transformers(model):
    ids, mask = left_padded([random_ids(3) + 1, random_ids(20) + 1])
    ids[mask == 0] = 0
    outputs = generate(ids, model=model, pad_token_id=0, max_new_tokens=20, do_sample=False, **WINDOW, **RECORD)
    assert_logits_follow_the_rules(model, outputs, 3, 0, num_padding=17)


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_sampling_is_that_of_transformers_while_nothing_is_evicted(model, num_return_sequences):
    """Parity of the whole of generate: seed for seed the same text as with DynamicCache, scores and all."""
    arguments = {
        "max_new_tokens": 20,
        "do_sample": True,
        "top_k": 20,
        "temperature": 0.9,
        "num_return_sequences": num_return_sequences,
    }
    prompt = random_ids(10, num_rows=2)
    torch.manual_seed(0)
    expected = model.generate(prompt, **arguments, **RECORD, output_scores=True)
    torch.manual_seed(0)
    outputs = generate(prompt, model=model, window_length=64, **arguments, **RECORD, output_scores=True)
    assert outputs.sequences.equal(expected.sequences)
    for ours, theirs in zip(outputs.scores + outputs.logits, expected.scores + expected.logits):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_several_return_sequences_past_the_window_each_follow_the_rules(model):
    torch.manual_seed(0)
    prompt = random_ids(30, num_rows=2)
    outputs = generate(prompt, model=model, max_new_tokens=30, do_sample=True, num_return_sequences=2, **WINDOW, **RECORD)
    assert outputs.sequences.shape == (4, 60) and outputs.past_key_values.batch_size == 4
    for row in range(4):
        assert_logits_follow_the_rules(model, outputs, 30, row)


def beams_without_a_cache(model, prompt: torch.Tensor, num_beams: int, num_new_tokens: int) -> torch.Tensor:
    """The best text of plain beam search of a fixed length, each step's scores from the oracle."""
    beams = [(0.0, prompt)]
    for _ in range(num_new_tokens):
        candidates = []
        for score, ids in beams:
            logits = oracle_logits(model, ids, WINDOW_LENGTH, NUM_SINK_TOKENS)[0, -1]
            scores, tokens = torch.log_softmax(logits, -1).topk(2 * num_beams)
            candidates += [(score + s, torch.cat([ids, t[None, None]], 1)) for s, t in zip(scores.tolist(), tokens)]
        beams = sorted(candidates, key=lambda beam: -beam[0])[:num_beams]
    return beams[0][1]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_beams_past_the_window_equal_beams_without_a_cache(model, seed):
    prompt = random_ids(14, seed=seed)
    ours = generate(prompt, model=model, num_beams=3, max_new_tokens=12, do_sample=False, **WINDOW)
    assert ours.equal(beams_without_a_cache(model, prompt, num_beams=3, num_new_tokens=12))


def test_eos_in_one_row_before_the_others(model):
    """The finished row is filled with padding; the other goes on as if alone."""
    prompt = random_ids(20, num_rows=2)
    free = generate(prompt, model=model, max_new_tokens=30, do_sample=False, **WINDOW)
    row_0, row_1 = free[0, 20:].tolist(), free[1, 20:].tolist()
    eos = next(token for token in row_0 if token not in row_1)
    stop = row_0.index(eos)
    outputs = generate(
        prompt, model=model, max_new_tokens=30, do_sample=False, eos_token_id=eos, pad_token_id=0, **WINDOW, **RECORD
    )
    assert outputs.sequences[0, 20:].tolist() == row_0[: stop + 1] + [0] * (29 - stop)
    assert outputs.sequences[1].equal(free[1])
    assert_logits_follow_the_rules(model, outputs, 20, row=1)


def test_streamers_criteria_and_processors_are_called_as_in_transformers(model, tokenizer):
    prompt, calls = random_ids(20), {"lengths": [], "streamed": []}

    class Record(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls["lengths"].append(input_ids.shape[1])
            return scores.index_fill(1, torch.tensor([5]), float("inf"))

    class StopAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 50)

    class Collect(TextStreamer):
        def put(self, value):
            calls["streamed"].append(value.flatten().tolist())

        def end(self):
            calls["streamed"].append("end")

    ids = generate(
        prompt,
        model=model,
        logits_processor=[Record()],
        stopping_criteria=[StopAt()],
        streamer=Collect(tokenizer),
        max_new_tokens=100,
        **WINDOW,
    )
    assert ids[0, 20:].tolist() == [5] * 30
    assert calls["lengths"] == list(range(20, 50))
    assert calls["streamed"] == [prompt[0].tolist(), *[[5]] * 30, "end"]


def test_attentions_and_hidden_states_are_returned():
    model = build_model("qwen3", "eager")
    prompt = random_ids(10)
    arguments = {"max_new_tokens": 20, "do_sample": False, "output_attentions": True, "output_hidden_states": True, **RECORD}
    outputs = generate(prompt, model=model, **WINDOW, **arguments)
    expected = model.generate(prompt, **arguments)
    for name in ("attentions", "hidden_states"):
        ours, theirs = getattr(outputs, name), getattr(expected, name)
        assert [step[-1].shape for step in ours[:6]] == [step[-1].shape for step in theirs[:6]]
    torch.testing.assert_close(outputs.attentions[0][0], expected.attentions[0][0])
    past_the_window = outputs.attentions[-1][0]
    assert past_the_window.shape == (1, 4, 1, WINDOW_LENGTH)
    torch.testing.assert_close(past_the_window.sum(-1), torch.ones(1, 4, 1))


def test_embeddings_in_place_of_ids(model):
    prompt = random_ids(40)
    embeds = model.get_input_embeddings()(prompt).detach()
    outputs = generate(inputs_embeds=embeds, model=model, max_new_tokens=20, do_sample=False, **WINDOW, **RECORD)
    expected = generate(prompt, model=model, max_new_tokens=20, do_sample=False, **WINDOW)
    assert outputs.sequences.equal(expected[:, 40:])


@pytest.mark.parametrize("options", [{"pad_token_id": 0}, {"repetition_penalty": 30.0}])
def test_embeddings_beside_padded_ids(model, options):
    """As in transformers, the ids say what is padding, if no mask does; and padding is not penalized, whatever stands there."""
    ids, mask = left_padded([random_ids(3) + 1, random_ids(9) + 1])
    options = {"model": model, "max_new_tokens": 20, "do_sample": False, **options, **WINDOW}
    likeliest = generate(ids, attention_mask=mask, **options | {"max_new_tokens": 1})[0, -1]
    ids[mask == 0] = options.get("pad_token_id", int(likeliest))
    embeds = model.get_input_embeddings()(ids).detach()
    expected = generate(ids, attention_mask=mask, **options)[:, 9:]
    mask = None if "pad_token_id" in options else mask
    assert generate(ids, inputs_embeds=embeds, attention_mask=mask, **options)[:, 9:].equal(expected)


# ---- several turns with one cache


def turns(model, how: str, num_turns: int = 4, **kwargs):
    """A conversation; `how` the cache is told of the history. Yields the outputs and the text they belong to."""
    cache = SinkCache(WINDOW_LENGTH, NUM_SINK_TOKENS)
    text = random_ids(6, seed=50)
    for turn in range(num_turns):
        seen = cache.get_seq_length()
        inputs = {"whole": {"input_ids": text}, "cropped": {"input_ids": text[:, -WINDOW_LENGTH:]}}.get(how)
        if how.startswith("new"):
            inputs = {"input_ids": text[:, seen:]}
            if how == "new-with-mask":
                inputs["attention_mask"] = torch.ones_like(text, dtype=torch.bool)
        outputs = generate(**inputs, model=model, past_key_values=cache, max_new_tokens=5, do_sample=False, **RECORD, **kwargs)
        assert outputs.past_key_values is cache
        text = torch.cat([text, outputs.sequences[:, inputs["input_ids"].shape[1] :]], dim=1)
        yield outputs, text
        text = torch.cat([text, random_ids(3, seed=60 + turn)], dim=1)


@pytest.mark.parametrize("how", ["whole", "new", "new-with-mask", "cropped"])
def test_several_turns_with_one_cache(model, how):
    """The whole history, only what is new, or the history's last window: the same text, with the logits that the rules demand."""
    for outputs, text in turns(model, how):
        logits = torch.stack([step[0] for step in outputs.logits])[None]
        assert_same(logits, oracle_logits(model, text[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -5:])


def test_several_turns_of_a_padded_batch(model):
    """Rows go on by different numbers of tokens: each turn is padded anew, as a tokenizer does it."""
    cache = SinkCache(WINDOW_LENGTH, NUM_SINK_TOKENS)
    texts = [random_ids(length, seed=length) for length in (2, 13, 40)]
    for turn in range(3):
        ids, mask = left_padded(texts)
        outputs = generate(
            ids, attention_mask=mask, model=model, past_key_values=cache, max_new_tokens=6, do_sample=False, **RECORD
        )
        for row, text in enumerate(texts):
            assert_logits_follow_the_rules(model, outputs, text.shape[1], row, num_padding=ids.shape[1] - text.shape[1])
            answer = outputs.sequences[row : row + 1, ids.shape[1] :]
            texts[row] = torch.cat([text, answer, random_ids(1 + 4 * row, seed=70 + turn)], dim=1)


def test_the_longest_row_may_be_another_one_after_a_turn(model):
    """Rows go on by different numbers of tokens. Would catch new tokens that are counted from the row that was the longest before:
    the next pass would be given tokens that the cache has seen."""
    cache, texts = SinkCache(**WINDOW), [random_ids(40, seed=2), random_ids(36, seed=3)]
    for num_new in (1, 1), (1, 10), (12, 1), (1, 9):
        texts = [torch.cat([text, random_ids(num)], dim=1) for text, num in zip(texts, num_new)]
        ids, mask = left_padded(texts)
        outputs = generate(ids, attention_mask=mask, model=model, past_key_values=cache, max_new_tokens=5, **WINDOW, **RECORD)
        for row, text in enumerate(texts):
            num_padding = ids.shape[1] - text.shape[1]
            assert_logits_follow_the_rules(model, outputs, text.shape[1], row=row, num_padding=num_padding)
            texts[row] = outputs.sequences[row : row + 1, num_padding:]
        assert cache.num_tokens_seen_by_row == [text.shape[1] - 1 for text in texts]


def test_of_the_ends_of_a_history_that_fit_the_longest_is_meant(model):
    """The last tokens of a text are passed, and by chance the first of them is also the last that the cache has seen."""
    cache, text = SinkCache.from_model(model, **WINDOW), random_ids(45)
    text[0, 45 - WINDOW_LENGTH] = text[0, 39]
    feed(model, cache, text[:, :40], [40])
    generate(text[:, -WINDOW_LENGTH:], model=model, past_key_values=cache, max_new_tokens=1)
    assert cache.num_tokens_seen == 45


@pytest.mark.parametrize("fed_by_hand", [True, False])
def test_the_token_returned_last_counts_only_until_the_cache_goes_on(model, fed_by_hand):
    """What `generate` has chosen last is what new tokens have to begin with; but not once it was fed, or taken back with others."""
    cache, text = SinkCache(**WINDOW), random_ids(40)
    text = generate(text, model=model, past_key_values=cache, max_new_tokens=5)
    if fed_by_hand:
        with torch.no_grad():
            model(**cache.prepare(text[:, -1:]))
    else:
        cache.reset()
        text = generate(text[:, :10], model=model, past_key_values=cache, max_new_tokens=5)[:, :-2]
        cache.crop(-1)
    assert cache.unseen_token_ids is None
    new = random_ids(4, seed=9)
    outputs = generate(new, model=model, past_key_values=cache, max_new_tokens=5, **RECORD)
    assert_logits_follow_the_rules(model, outputs, 4, history=text)


def test_the_token_returned_last_goes_along_with_its_row(model):
    cache, texts = SinkCache(**WINDOW), random_ids(20, num_rows=3)
    texts = generate(texts, model=model, past_key_values=cache, max_new_tokens=5)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.unseen_token_ids == texts[[2, 0], -1].tolist()
    new = torch.cat([texts[[2, 0], -1:], random_ids(3, num_rows=2)], dim=1)
    outputs = generate(new, model=model, past_key_values=cache, max_new_tokens=5, **RECORD)
    for row, text in enumerate(texts[[2, 0], None, :-1]):
        assert_logits_follow_the_rules(model, outputs, 4, row=row, history=text)


def test_a_turn_after_beams_goes_on_with_every_beam(model):
    prompt = random_ids(20)
    cache = SinkCache(WINDOW_LENGTH, NUM_SINK_TOKENS)
    first = generate(prompt, model=model, past_key_values=cache, num_return_sequences=2, do_sample=True, max_new_tokens=5)
    assert cache.batch_size == 2
    outputs = generate(first, model=model, past_key_values=cache, do_sample=False, max_new_tokens=5, **RECORD)
    for row in range(2):
        assert_logits_follow_the_rules(model, outputs, 25, row)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda text: text.index_fill(1, torch.tensor([2]), 1), "edited in the part that is a sink"),
        (lambda text: text.index_fill(1, torch.tensor([30]), 1), "edited in the window"),
        (lambda text: text[:, :20], "an earlier state of the history"),
        (lambda text: text[:, 36:], "new tokens without the one that was returned last"),
    ],
)
def test_a_history_that_is_not_the_one_seen_is_refused(model, change, reason):
    prompt = random_ids(30)
    cache = SinkCache(WINDOW_LENGTH, NUM_SINK_TOKENS)
    text = generate(prompt, model=model, past_key_values=cache, do_sample=False, max_new_tokens=5)
    text = torch.cat([text, random_ids(10, seed=9)], dim=1)
    with pytest.raises(ValueError, match="Can't tell which"):
        generate(change(text), model=model, past_key_values=cache, max_new_tokens=5)
    assert cache.get_seq_length() == 34
    outputs = generate(text, model=model, past_key_values=cache, do_sample=False, max_new_tokens=5, **RECORD)
    assert_logits_follow_the_rules(model, outputs, 45)


def test_generate_goes_on_after_one_long_pass(model):
    """Positions of a pass that `prepare` was given whole may lie far beyond those at which keys are turned back."""
    prompt = random_ids(90)
    cache = SinkCache.from_model(model, **WINDOW)
    model(**cache.prepare(prompt[:, :70]))
    outputs = generate(prompt, model=model, past_key_values=cache, max_new_tokens=20, do_sample=False, **RECORD)
    assert_logits_follow_the_rules(model, outputs, 90)


# ---- where the numbers come from, and what is left behind


def test_the_numbers_may_stand_in_a_generation_config(model):
    config = GenerationConfig(max_new_tokens=5, window_length=12, num_sink_tokens=3, return_dict_in_generate=True)
    prompt = random_ids(30)
    cache = generate(prompt, generation_config=config, model=model).past_key_values
    assert (cache.window_length, cache.num_sink_tokens) == (12, 3)
    own = copy.deepcopy(model)
    own.generation_config.window_length, own.generation_config.num_sink_tokens = 10, 2
    cache = generate(prompt, model=own, max_new_tokens=5, return_dict_in_generate=True).past_key_values
    assert (cache.window_length, cache.num_sink_tokens) == (10, 2)
    cache = generate(prompt, generation_config=config, model=own, window_length=20, return_dict_in_generate=True).past_key_values
    assert (cache.window_length, cache.num_sink_tokens) == (20, 3)
    cache = generate(prompt, model=model, max_new_tokens=5, return_dict_in_generate=True).past_key_values
    assert (cache.window_length, cache.num_sink_tokens) == (256, 4)


def snapshot(model) -> dict:
    state = {name: dict(module.__dict__) for name, module in model.named_modules()}
    return {
        "attributes": {name: {k: v for k, v in d.items() if not k.startswith("_")} for name, d in state.items()},
        "tensors": {name: (t.data_ptr(), t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "generation_config": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "class": {name: id(value) for name, value in vars(type(model)).items()},
    }


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("when", ["never", "in the prompt", "while decoding"])
def test_the_model_is_left_as_it_was(when):
    """Also after Ctrl-C in the middle: no attribute, no hook, no changed config, on the model and on its class."""
    model = build_model("gemma3")
    model.generation_config.prefill_chunk_size = 7
    before = snapshot(model)
    num_calls = 0

    def interrupt(module, args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == {"never": -1, "in the prompt": 4, "while decoding": 30}[when]:
            raise Stop

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        generate(random_ids(40), model=model, max_new_tokens=30, do_sample=False, **WINDOW)
        assert when == "never"
    except Stop:
        assert when != "never"
    finally:
        hook.remove()
    after = snapshot(model)
    for key in ("attributes", "generation_config", "config", "class"):
        assert after[key] == before[key]
    for name, (pointer, value) in before["tensors"].items():
        assert after["tensors"][name][0] == pointer and after["tensors"][name][1].equal(value)


@pytest.mark.parametrize("num_before", [0, 5])
def test_a_call_that_is_interrupted_in_its_first_pass_changes_nothing(model, num_before):
    """Neither the rows, of which it makes copies, nor the token that was returned last; and an empty cache takes another batch."""
    cache, options = SinkCache.from_model(model, **WINDOW), {"max_new_tokens": 3, "do_sample": False}
    if num_before:
        generate(random_ids(num_before), model=model, past_key_values=cache, **options)
    cache.activate_past_recording()
    before = cache.batch_size, cache.unseen_token_ids, cache.num_tokens_seen
    call = {"num_return_sequences": 2, "do_sample": True} if num_before else {"inputs": random_ids(4, num_rows=3)}
    with interrupted_at(model.model.layers[1]):
        generate(model=model, past_key_values=cache, **options | call)
    assert before == (cache.batch_size, cache.unseen_token_ids, cache.num_tokens_seen) and cache.stream.is_recording
    cache.activate_past_recording(False)
    call = {} if num_before else {"inputs": random_ids(5)}
    text = generate(**call, model=model, past_key_values=cache, **options)
    expected = generate(random_ids(5), model=model, **options | {"max_new_tokens": 6 if num_before else 3}, **WINDOW)
    assert text.equal(expected[:, 7:] if num_before else expected)


def test_an_interrupted_call_can_be_taken_up_again(model):
    """The cache is at a whole token: what it has seen is what it says."""
    prompt, cache = random_ids(30), SinkCache(WINDOW_LENGTH, NUM_SINK_TOKENS)

    class Interrupt(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == 40:
                raise Stop
            self.ids = input_ids
            return scores

    interrupt = Interrupt()
    with pytest.raises(Stop):
        generate(prompt, model=model, past_key_values=cache, logits_processor=[interrupt], max_new_tokens=30, do_sample=False)
    expected = generate(prompt, model=model, max_new_tokens=30, do_sample=False, **WINDOW)
    assert cache.get_seq_length() == 40
    ids = generate(expected[:, :41], model=model, past_key_values=cache, max_new_tokens=19, do_sample=False)
    assert ids.equal(expected)


def test_gradients_are_off_and_a_positional_prompt_is_one(model):
    outputs = generate(random_ids(20), None, model=model, max_new_tokens=2, **WINDOW, **RECORD)
    assert not outputs.logits[0].requires_grad
    assert not any(ring.slots.requires_grad for ring in rings_of(outputs.past_key_values))


def test_parity_in_wall_of_options(model):
    """Options that are transformers' business, together, while nothing is evicted."""
    arguments = {
        "max_new_tokens": 25,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 20,
        "bad_words_ids": [[3], [4, 5]],
        "suppress_tokens": [9],
        "do_sample": False,
    }
    prompt = random_ids(12, num_rows=3)
    assert generate(prompt, model=model, window_length=64, **arguments).equal(model.generate(prompt, **arguments))
    past = generate(prompt, model=model, **WINDOW, **arguments)
    assert difference(past.float(), model.generate(prompt, **arguments).float()) > 0


@pytest.mark.parametrize("name", sorted(ORDERED))
def test_ordered_families_are_those_without_rotation(name):
    assert SinkCache.from_model(build_model(name), **WINDOW).traits.is_ordered
