"""The options of `generate`, five windows long: what each makes of the logits that the rules demand.

Logits come from the oracle, for the text that was generated; the processors that an option stands for are applied to them here, one by
one, and tokens are chosen from that. Tokens, logits and scores have to be those of `generate`.
"""

import inspect
import threading

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessorList, TextIteratorStreamer, TextStreamer
from transformers.generation import logits_process

from checks import assert_same, left_padded, random_ids
from custom_generate.generate import SinkCache, generate
from families import VOCAB_SIZE, build_model
from oracle import oracle_logits

MODEL = "qwen3"

WINDOW_LENGTH, NUM_SINK_TOKENS = 8, 2
WINDOW = {"window_length": WINDOW_LENGTH, "num_sink_tokens": NUM_SINK_TOKENS}
NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 5, 37
LENGTH = NUM_PROMPT_TOKENS + NUM_NEW_TOKENS
RECORD = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
EOS = 60
PROMPT = random_ids(NUM_PROMPT_TOKENS)


def processor(name: str, *args, **kwargs):
    """A processor of transformers, where the release has it."""
    if not hasattr(logits_process, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(logits_process, name)(*args, **kwargs)


def rows_of_oracle(model, sequences: torch.Tensor, num_steps: int, num_padding=None) -> torch.Tensor:
    """The logits from which the last `num_steps` tokens were chosen: `[steps, rows, vocab]`."""
    rows = []
    for row, padding in zip(sequences, num_padding or [0] * len(sequences)):
        rows.append(oracle_logits(model, row[None, padding:-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[0, -num_steps:])
    return torch.stack(rows, dim=1)


def assert_chosen(outputs, logits: torch.Tensor, processors=(), seed: int | None = None) -> None:
    """The scores are what the processors make of these logits `[steps, rows, vocab]`, and the tokens are chosen from them: the
    likeliest, or as with this seed."""
    sequences, num_steps = outputs.sequences, len(logits)
    processors = LogitsProcessorList(processors)
    torch.manual_seed(seed or 0)
    for step in range(num_steps):
        ids = sequences[:, : sequences.shape[1] - num_steps + step]
        expected = processors(ids, logits[step].clone())
        scores = outputs.scores[step]
        assert scores.isinf().equal(expected.isinf()), step
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)
        chosen = expected.argmax(-1) if seed is None else torch.multinomial(expected.softmax(-1), 1)[:, 0]
        assert chosen.equal(sequences[:, ids.shape[1]]), step


# name: (options, the processors that they stand for). All past the window, all with the same prompt.
P = processor
CASES = {
    "greedy": ({}, lambda: []),
    "temperature": ({"do_sample": True, "temperature": 0.6}, lambda: [P("TemperatureLogitsWarper", 0.6)]),
    "top_k": ({"do_sample": True, "top_k": 9}, lambda: [P("TopKLogitsWarper", 9)]),
    "top_p": ({"do_sample": True, "top_p": 0.7}, lambda: [P("TopPLogitsWarper", 0.7)]),
    "min_p": ({"do_sample": True, "min_p": 0.1}, lambda: [P("MinPLogitsWarper", 0.1)]),
    "top_h": ({"do_sample": True, "top_h": 0.4}, lambda: [P("TopHLogitsWarper", 0.4)]),
    "typical_p": ({"do_sample": True, "typical_p": 0.6}, lambda: [P("TypicalLogitsWarper", 0.6)]),
    "epsilon_cutoff": ({"do_sample": True, "epsilon_cutoff": 0.01}, lambda: [P("EpsilonLogitsWarper", 0.01)]),
    "eta_cutoff": ({"do_sample": True, "eta_cutoff": 0.02}, lambda: [P("EtaLogitsWarper", 0.02)]),
    "repetition_penalty": ({"repetition_penalty": 1.4}, lambda: [P("RepetitionPenaltyLogitsProcessor", 1.4)]),
    "encoder_repetition_penalty": (
        {"encoder_repetition_penalty": 1.4},
        lambda: [P("EncoderRepetitionPenaltyLogitsProcessor", 1.4, PROMPT)],
    ),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, lambda: [P("NoRepeatNGramLogitsProcessor", 2)]),
    "encoder_no_repeat_ngram_size": (
        {"encoder_no_repeat_ngram_size": 1},
        lambda: [P("EncoderNoRepeatNGramLogitsProcessor", 1, PROMPT)],
    ),
    "bad_words_ids": (
        {"bad_words_ids": [[3], [4, 6]], "eos_token_id": EOS, "min_new_tokens": NUM_NEW_TOKENS},
        lambda: [
            P("NoBadWordsLogitsProcessor", [[3], [4, 6]], torch.tensor([EOS])),
            P("MinNewTokensLengthLogitsProcessor", NUM_PROMPT_TOKENS, NUM_NEW_TOKENS, torch.tensor([EOS])),
        ],
    ),
    "sequence_bias": (
        {"sequence_bias": [[[8], 2.0], [[9, 10], -3.0]]},
        lambda: [P("SequenceBiasLogitsProcessor", {(8,): 2.0, (9, 10): -3.0})],
    ),
    "forced_eos_token_id": (
        {"forced_eos_token_id": EOS},
        lambda: [P("ForcedEOSTokenLogitsProcessor", LENGTH, EOS)],
    ),
    "suppress_tokens": ({"suppress_tokens": [11, 12]}, lambda: [P("SuppressTokensLogitsProcessor", [11, 12])]),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": list(range(2, 60))},
        lambda: [P("SuppressTokensAtBeginLogitsProcessor", list(range(2, 60)), NUM_PROMPT_TOKENS)],
    ),
    "exponential_decay_length_penalty": (
        {"exponential_decay_length_penalty": (20, 1.01), "eos_token_id": EOS},
        lambda: [P("ExponentialDecayLengthPenalty", (20, 1.01), torch.tensor([EOS]), NUM_PROMPT_TOKENS)],
    ),
    "min_length": (
        {"min_length": LENGTH, "eos_token_id": list(range(2, 50))},
        lambda: [P("MinLengthLogitsProcessor", LENGTH, torch.arange(2, 50))],
    ),
    "min_new_tokens": (
        {"min_new_tokens": NUM_NEW_TOKENS, "eos_token_id": list(range(2, 50))},
        lambda: [P("MinNewTokensLengthLogitsProcessor", NUM_PROMPT_TOKENS, NUM_NEW_TOKENS, torch.arange(2, 50))],
    ),
    "renormalize_logits": (
        {"renormalize_logits": True, "do_sample": True, "temperature": 2.0},
        lambda: [P("TemperatureLogitsWarper", 2.0), P("LogitNormalization")],
    ),
    "remove_invalid_values": (
        {"remove_invalid_values": True, "sequence_bias": [[[8], float("-inf")]]},
        lambda: [P("SequenceBiasLogitsProcessor", {(8,): float("-inf")}), P("InfNanRemoveLogitsProcessor")],
    ),
    "watermarking_config": (
        {"watermarking_config": transformers.WatermarkingConfig(bias=3.0, seeding_scheme="selfhash")},
        lambda: [transformers.WatermarkingConfig(bias=3.0, seeding_scheme="selfhash").construct_processor(VOCAB_SIZE, "cpu")],
    ),
    "synthid": (
        {"do_sample": True, "watermarking_config": transformers.SynthIDTextWatermarkingConfig(4, [1, 7, 9, 30])},
        lambda: [transformers.SynthIDTextWatermarkingConfig(4, [1, 7, 9, 30]).construct_processor(VOCAB_SIZE, "cpu")],
    ),
    "prefix_allowed_tokens_fn": (
        {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1] * 3 + k) % VOCAB_SIZE for k in range(5)]},
        lambda: [P("PrefixConstrainedLogitsProcessor", lambda row, ids: [int(ids[-1] * 3 + k) % VOCAB_SIZE for k in range(5)], 1)],
    ),
    "several at once": (
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        lambda: [
            P("RepetitionPenaltyLogitsProcessor", 1.2),
            P("NoRepeatNGramLogitsProcessor", 3),
            P("TemperatureLogitsWarper", 0.8),
            P("TopKLogitsWarper", 20),
            P("TopPLogitsWarper", 0.9),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_option_makes_of_the_logits_what_it_stands_for(model, name):
    options, processors = CASES[name]
    processors = processors()
    options = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS} | options
    if options["do_sample"]:
        options = {"top_k": 0} | options
    torch.manual_seed(3)
    outputs = generate(PROMPT, model=model, **options, **WINDOW, **RECORD)
    assert outputs.sequences.shape == (1, LENGTH) and LENGTH >= 5 * WINDOW_LENGTH
    logits = rows_of_oracle(model, outputs.sequences, NUM_NEW_TOKENS)
    assert_same(torch.stack(outputs.logits), logits)
    assert_chosen(outputs, logits, processors, seed=3 if options["do_sample"] else None)
    if name != "greedy":
        assert any(not score.equal(logits) for score, logits in zip(outputs.scores, outputs.logits)), "the option did nothing"


def test_rows_of_a_padded_batch_are_processed_each_by_itself(model):
    """Sampled together, with a penalty that looks at the text: of padding, nothing is repeated where the release says so."""
    prompts = [PROMPT, random_ids(30, seed=2)]
    ids, mask = left_padded(prompts)
    options = {"do_sample": True, "top_k": 0, "temperature": 0.7, "repetition_penalty": 1.5, "num_return_sequences": 2}
    torch.manual_seed(4)
    outputs = generate(ids, attention_mask=mask, model=model, max_new_tokens=20, **options, **WINDOW, **RECORD)
    padding = [25, 25, 0, 0]
    logits = rows_of_oracle(model, outputs.sequences, 20, padding)
    try:
        penalty = P("RepetitionPenaltyLogitsProcessor", 1.5, prompt_ignore_length=torch.tensor(padding))
    except ValueError:  # before 5.23
        penalty = P("RepetitionPenaltyLogitsProcessor", 1.5)
    assert_chosen(outputs, logits, [penalty, P("TemperatureLogitsWarper", 0.7)], seed=4)


# ---- how a text begins and ends


def test_forced_bos_token_id(model):
    """It is the second token of a text that begins with one."""
    ids = generate(torch.tensor([[7]]), model=model, max_new_tokens=40, do_sample=False, forced_bos_token_id=9, **WINDOW)
    after = generate(torch.tensor([[7, 9]]), model=model, max_new_tokens=39, do_sample=False, **WINDOW)
    assert ids.equal(after) and ids[0, 1] == 9


def test_bos_token_id_in_place_of_a_prompt(model):
    outputs = generate(bos_token_id=7, model=model, max_new_tokens=40, do_sample=False, **WINDOW, **RECORD)
    assert outputs.sequences[0, 0] == 7
    assert_chosen(outputs, rows_of_oracle(model, outputs.sequences, 40))


@pytest.fixture(scope="module")
def greedy(model):
    """A text past four windows."""
    return generate(PROMPT, model=model, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, **WINDOW)


def test_lengths_count_what_transformers_counts(model, greedy):
    """`max_length` the prompt too, `max_new_tokens` not; and the latter wins."""
    for options, length in [
        ({"max_length": 40}, 40),
        ({"max_new_tokens": 35}, 40),
        ({"max_new_tokens": 35, "max_length": 10}, 40),
        ({"generation_config": GenerationConfig(max_length=40)}, 40),
        ({}, None),
    ]:
        ids = generate(PROMPT, model=model, do_sample=False, **options, **WINDOW)
        assert ids.equal(greedy[:, : length or ids.shape[1]]) and ids.shape[1] == (length or model.generate(PROMPT).shape[1])


def test_several_tokens_that_end_a_text(model, greedy):
    new = greedy[0, NUM_PROMPT_TOKENS:].tolist()
    first = max(at for at, token in enumerate(new) if new.index(token) == at)
    assert NUM_PROMPT_TOKENS + first > 4 * WINDOW_LENGTH
    ends = [next(token for token in range(VOCAB_SIZE) if token not in new), new[first]]
    ids = generate(PROMPT, model=model, max_new_tokens=100, do_sample=False, eos_token_id=ends, pad_token_id=0, **WINDOW)
    assert ids.equal(greedy[:, : NUM_PROMPT_TOKENS + first + 1])


def test_time_that_is_up(model, greedy):
    """One token is always generated, here of a text that is past the window."""
    ids = generate(greedy[:, :-1], model=model, max_new_tokens=50, do_sample=False, max_time=1e-9, **WINDOW)
    assert ids.equal(greedy)


def test_stop_strings_and_streamers_past_the_window(tiny_model, tokenizer, capsys):
    """A stop string that comes late is found, and what is streamed is the text."""
    inputs = tokenizer("import os\n", return_tensors="pt")
    options = {"model": tiny_model, "do_sample": False, "repetition_penalty": 1.3, "window_length": 16}
    ids = generate(**inputs, **options, max_new_tokens=120, eos_token_id=None, streamer=TextStreamer(tokenizer))
    text = tokenizer.decode(ids[0])
    assert capsys.readouterr().out.strip() == text.strip()

    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    arguments = {**inputs, **options, "max_new_tokens": 120, "eos_token_id": None, "streamer": streamer}
    thread = threading.Thread(target=generate, kwargs=arguments)
    thread.start()
    assert "".join(streamer) == text
    thread.join()

    late = range(len(tokenizer.decode(ids[0, : 5 * 16])), len(text))
    stop = next(text[at : at + 4] for at in late if text.index(text[at : at + 4]) == at)
    stopped = generate(**inputs, **options, max_new_tokens=120, eos_token_id=None, stop_strings=[stop], tokenizer=tokenizer)
    assert stopped.shape[1] < ids.shape[1] and stopped.equal(ids[:, : stopped.shape[1]])
    assert stop in tokenizer.decode(stopped[0]) and stop not in tokenizer.decode(stopped[0, :-1])
    with pytest.raises(ValueError, match="tokenizer"):
        generate(**inputs, **options, stop_strings=[stop])


# ---- what comes in and what comes out


def test_a_generation_config_says_the_same_as_arguments(model):
    options = {"do_sample": True, "top_k": 12, "temperature": 0.8, "repetition_penalty": 1.3, "max_new_tokens": NUM_NEW_TOKENS}
    config = GenerationConfig(**options, **WINDOW)
    before = config.to_dict()
    texts = []
    for how in (options | WINDOW, {"generation_config": config}, {"generation_config": config, "temperature": 0.8}):
        torch.manual_seed(5)
        texts.append(generate(PROMPT, model=model, **how))
    assert texts[0].equal(texts[1]) and texts[0].equal(texts[2]) and texts[0].shape == (1, LENGTH)
    assert config.to_dict() == before


def test_special_tokens_may_be_tensors(model):
    """As in transformers, in the call or in a generation config."""
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), random_ids(5, num_rows=2)], 1)
    expected = generate(ids, model=model, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=[11, 12], **WINDOW)
    options = {"eos_token_id": torch.tensor([11, 12]), "pad_token_id": torch.tensor(0), "max_new_tokens": 30}
    assert generate(ids, model=model, do_sample=False, **options, **WINDOW).equal(expected)
    assert generate(ids, GenerationConfig(**options), model=model, **WINDOW).equal(expected)


def test_a_decoding_loop_of_ones_own(model):
    """transformers takes a function as custom_generate: it gets its passes from here, too."""
    calls = []

    def decode(*args, **kwargs):
        calls.append(len(args))
        return transformers.GenerationMixin._sample(*args, **kwargs)

    options = {"model": model, "max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, **WINDOW}
    assert generate(PROMPT, custom_generate=decode, **options).equal(generate(PROMPT, **options)) and calls


@pytest.mark.parametrize(
    "brought, options",
    [
        ({"guidance_scale": 1.5}, {"guidance_scale": None}),
        ({"penalty_alpha": 0.6}, {"penalty_alpha": None}),
        ({"pad_token_id": 0, "eos_token_id": 3}, {"pad_token_id": None}),
        ({"pad_token_id": 0, "eos_token_id": 0}, {"eos_token_id": None}),
    ],
)
def test_none_switches_off_what_the_model_brings(brought, options):
    """As in transformers. The prompt begins with what may be padding."""
    model, ids = build_model("qwen3", "sdpa"), torch.cat([torch.zeros(2, 3, dtype=torch.long), random_ids(5, num_rows=2)], 1)
    ids[1, :3] = 5
    for name, value in brought.items():
        setattr(model.generation_config, name, value)
    options = {"max_new_tokens": 12, "do_sample": False} | options
    assert generate(ids, model=model, window_length=32, **options).equal(model.generate(ids, **options))


@pytest.mark.parametrize("prefill_chunk_size", [None, 5])
def test_shapes_of_what_is_recorded_past_the_window(prefill_chunk_size):
    """One entry a token. The first belongs to the last pass over the prompt, whose keys are: one copy of the sinks for each of its
    queries, what the window held, and its own tokens; all others have a column for each slot."""
    model = build_model("qwen3", "eager")
    chunk = prefill_chunk_size or 24 - 8  # of the last pass: a prompt is split where the window gets full
    prompt = random_ids(8 + 3 * chunk + 1 if prefill_chunk_size else 24)
    record = {"output_attentions": True, "output_hidden_states": True, **RECORD}
    options = {"max_new_tokens": 32, "do_sample": False, "prefill_chunk_size": prefill_chunk_size}
    outputs = generate(prompt, model=model, **options, **record, **WINDOW)
    for name in ("scores", "logits", "attentions", "hidden_states"):
        assert len(outputs[name]) == 32
    last = outputs.hidden_states[0][0].shape[1]
    assert 1 < last <= chunk
    num_keys = NUM_SINK_TOKENS * last + (WINDOW_LENGTH - NUM_SINK_TOKENS) + last
    assert [layer.shape for layer in outputs.attentions[0]] == 3 * [(1, 4, last, num_keys)]
    assert [state.shape for state in outputs.hidden_states[0]] == 4 * [(1, last, 32)]
    for attentions, states in zip(outputs.attentions[1:], outputs.hidden_states[1:]):
        assert [layer.shape for layer in attentions] == 3 * [(1, 4, 1, WINDOW_LENGTH)]
        assert [state.shape for state in states] == 4 * [(1, 1, 32)]
    for layers in outputs.attentions:
        torch.testing.assert_close(layers[-1].sum(-1), torch.ones(1, 4, len(layers[-1][0, 0])))
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1][-1][:, -1]), outputs.logits[-1])


# ---- guidance by a second text


def streams_of(monkeypatch) -> list:
    """The caches that are made from now on."""
    made, init = [], SinkCache.__init__

    def recording(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(SinkCache, "__init__", recording)
    return made


def guided(model, outputs, negatives, scale: float, num_new_tokens: int, num_padding=None) -> torch.Tensor:
    """The scores of guidance from two oracles: one of each text, one of the negative prompt of each row and what was generated."""
    rows = []
    for row, negative in enumerate(negatives):
        text = torch.cat([negative, outputs.sequences[row : row + 1, -num_new_tokens:]], dim=1)
        rows.append(rows_of_oracle(model, text, num_new_tokens)[:, 0])
    negative = torch.stack(rows, dim=1).log_softmax(-1)
    positive = rows_of_oracle(model, outputs.sequences, num_new_tokens, num_padding).log_softmax(-1)
    return scale * (positive - negative) + negative


@pytest.mark.parametrize("num_negative", [None, 1, 3, 40])
@pytest.mark.parametrize("static", [False, True])
def test_guidance_follows_both_oracles(model, monkeypatch, num_negative, static):
    """With a negative prompt of its own, also one of many windows; or with the last token of the prompt. Both caches are bounded."""
    negative = PROMPT[:, -1:] if num_negative is None else random_ids(num_negative, seed=8)
    options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, "guidance_scale": 1.7, "sequence_bias": [[[8], 1.0]]}
    options |= {} if num_negative is None else {"negative_prompt_ids": negative}
    options |= {"cache_implementation": "static"} if static else {}
    made = streams_of(monkeypatch)
    outputs = generate(PROMPT, model=model, **options, **WINDOW, **RECORD)
    logits = rows_of_oracle(model, outputs.sequences, NUM_NEW_TOKENS)
    assert_same(torch.stack(outputs.logits), logits)
    expected = guided(model, outputs, [negative], 1.7, NUM_NEW_TOKENS)
    assert_chosen(outputs, expected, [P("SequenceBiasLogitsProcessor", {(8,): 1.0})])
    assert [(cache.window_length, cache.num_sink_tokens, cache.is_static) for cache in made] == 2 * [(8, 2, static)]
    assert made[0] is outputs.past_key_values and made[0].num_bytes_held == made[1].num_bytes_held
    assert [cache.get_seq_length() for cache in made] == [LENGTH - 1, negative.shape[1] + NUM_NEW_TOKENS - 1]


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 0.5}, {"negative": True}, {"num_return_sequences": 2}])
def test_guidance_is_that_of_transformers_while_nothing_is_evicted(model, options):
    """Row by row, sampled, seed for seed."""
    prompt = random_ids(10, num_rows=2)
    options = {"do_sample": True, "top_k": 20, "max_new_tokens": 20, "guidance_scale": 1.4} | options
    if options.pop("negative", False):
        options["negative_prompt_ids"], options["negative_prompt_attention_mask"] = left_padded([random_ids(9), random_ids(4)])
    torch.manual_seed(0)
    expected = model.generate(prompt, **options, **RECORD)
    torch.manual_seed(0)
    outputs = generate(prompt, model=model, window_length=64, **options, **RECORD)
    assert outputs.sequences.equal(expected.sequences)
    for ours, theirs in zip(outputs.scores, expected.scores):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_guidance_of_a_padded_batch_and_several_sequences(model):
    """Texts and negative prompts of different lengths, each padded to its own longest; two sequences of each."""
    prompts, negatives = [PROMPT, random_ids(30, seed=2)], [random_ids(20, seed=3), random_ids(2, seed=4)]
    (ids, mask), (negative_ids, negative_mask) = left_padded(prompts), left_padded(negatives)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "guidance_scale": 1.3, "max_new_tokens": 35}
    negative = {"negative_prompt_ids": negative_ids, "negative_prompt_attention_mask": negative_mask}
    torch.manual_seed(6)
    outputs = generate(ids, attention_mask=mask, model=model, **options, **negative, **WINDOW, **RECORD)
    of_rows = [negatives[0], negatives[0], negatives[1], negatives[1]]
    assert_chosen(outputs, guided(model, outputs, of_rows, 1.3, 35, [25, 25, 0, 0]), seed=6)


def test_guidance_when_a_text_is_continued(model):
    """As in transformers, the second text begins anew with each call: its history is passed as the negative prompt."""
    cache, negative = SinkCache(**WINDOW), random_ids(4, seed=9)
    options = {"do_sample": False, "guidance_scale": 1.5, "past_key_values": cache}
    first = generate(PROMPT, model=model, max_new_tokens=20, negative_prompt_ids=negative, **options)
    more = torch.cat([negative, first[:, NUM_PROMPT_TOKENS:]], dim=1)
    second = generate(first, model=model, max_new_tokens=20, negative_prompt_ids=more, **options)
    whole = generate(
        PROMPT, model=model, max_new_tokens=40, negative_prompt_ids=negative, **options | {"past_key_values": None}, **WINDOW
    )
    assert second.equal(whole)


def test_guidance_of_embeddings_and_from_a_generation_config(model):
    negative = random_ids(4, seed=9)
    options = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS, "negative_prompt_ids": negative, "prefill_chunk_size": 3}
    expected = generate(PROMPT, model=model, guidance_scale=1.5, **options, **WINDOW)
    embeds = model.get_input_embeddings()(PROMPT).detach()
    assert generate(inputs_embeds=embeds, model=model, guidance_scale=1.5, **options, **WINDOW).equal(
        expected[:, NUM_PROMPT_TOKENS:]
    )
    config = GenerationConfig(guidance_scale=1.5, max_new_tokens=NUM_NEW_TOKENS)
    assert generate(PROMPT, model=model, generation_config=config, **options, **WINDOW).equal(expected)
    assert config.guidance_scale == 1.5
    own = build_model("qwen3", "sdpa")
    own.generation_config.guidance_scale = 1.5
    before = dict(vars(own))
    assert generate(PROMPT, model=own, **options, **WINDOW).equal(expected)
    assert vars(own) == before and own.generation_config.guidance_scale == 1.5
    unguided = generate(PROMPT, model=own, guidance_scale=1.0, **options, **WINDOW)
    assert unguided.equal(generate(PROMPT, model=model, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, **WINDOW))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"negative_prompt_ids": random_ids(4, num_rows=3)}, "negative_prompt_ids has 3 rows, and the prompt 2. Pass as many"),
        ({"negative_prompt_ids": [[1, 2]]}, "negative_prompt_ids must be a Tensor"),
        ({"negative_prompt_ids": random_ids(4, num_rows=2)[:, :0]}, "negative_prompt_ids can't.*No tokens"),
        ({"negative_prompt_ids": torch.tensor(3)}, r"negative_prompt_ids can't.*pass input_ids \[batch, num_columns\].*got shape"),
        ({"negative_prompt_attention_mask": torch.ones(2, 1)}, "mask belongs to another text.*Pass negative_prompt_ids"),
        (
            {"negative_prompt_ids": random_ids(1, num_rows=2), "negative_prompt_attention_mask": [[1], [1]]},
            "mask must be a Tensor",
        ),
        (
            {"negative_prompt_ids": random_ids(2, num_rows=2), "negative_prompt_attention_mask": torch.tensor([[1, 0], [1, 1]])},
            "padding on the right",
        ),
        ({"guidance_scale": "strong"}, "guidance_scale must be a number, got 'strong'"),
        ({"num_beams": 2}, "guidance_scale=1.5 can't be used with num_beams"),
        ({"inputs_embeds": torch.zeros(2, 5, 32)}, "inputs_embeds.*negative_prompt_ids"),
    ],
)
def test_guidance_that_can_not_be_exact_is_refused(model, monkeypatch, options, message):
    SinkCache.from_model(model, **WINDOW)  # asked before
    monkeypatch.setattr(model.model, "forward", None)
    prompt = {} if "inputs_embeds" in options else {"inputs": random_ids(5, num_rows=2)}
    with pytest.raises(ValueError, match=message):
        generate(model=model, **{"guidance_scale": 1.5, "max_new_tokens": 3} | prompt | options, **WINDOW)


def test_defaults_of_the_model(model):
    """transformers 4 may be told not to take them."""
    if "use_model_defaults" not in inspect.signature(model.generate).parameters:
        pytest.skip("an option of transformers 4")
    own = build_model("qwen3", "sdpa")
    own.generation_config.repetition_penalty = 1.5
    config = GenerationConfig(max_new_tokens=NUM_NEW_TOKENS)
    for use_model_defaults, penalty in ((True, 1.5), (False, 1.0)):
        ids = generate(PROMPT, config, model=own, use_model_defaults=use_model_defaults, **WINDOW)
        assert ids.equal(generate(PROMPT, config, model=model, repetition_penalty=penalty, **WINDOW))


@pytest.mark.parametrize("passes_config", [False, True])
def test_beams_and_guidance_that_only_the_model_asks_for(passes_config):
    """In transformers 4, the config of a call leaves to the model what has its default value, and `num_beams` has 1."""
    own = build_model("qwen3", "sdpa")
    own.generation_config.num_beams = own.generation_config.num_return_sequences = 2
    options = {"max_new_tokens": NUM_NEW_TOKENS}
    options = {"generation_config": GenerationConfig(**options)} if passes_config else options
    cache = SinkCache(**WINDOW)
    texts = generate(PROMPT[:1], model=own, past_key_values=cache, **options)
    assert len(texts) == 2 and cache.num_tokens_seen_by_row == [PROMPT.shape[1] - 1] * 2  # it stays at the prompt
    with pytest.raises(ValueError, match="guidance_scale=1.5 can't be used with num_beams"):
        generate(PROMPT[:1], model=own, guidance_scale=1.5, **options, **WINDOW)
    if "use_model_defaults" in inspect.signature(own.generate).parameters and passes_config:
        own.generation_config.guidance_scale = 1.5
        ids = generate(PROMPT, model=own, use_model_defaults=False, **options, **WINDOW)
        assert ids.equal(generate(PROMPT, model=build_model("qwen3", "sdpa"), **options, **WINDOW))
