"""Assisted decoding: drafts change how a text comes about, not the text, its logits, or what the cache has seen."""

import contextlib
import copy
import itertools
import sys
from unittest.mock import Mock

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoTokenizer, LogitsProcessor
from transformers.generation import candidate_generator

from checks import WINDOW, assert_same, left_padded, random_ids, rings_of
from custom_generate.drafting import Drafter
from custom_generate.generate import SinkCache, generate
from families import TRANSFORMERS, VOCAB_SIZE, build_model
from oracle import oracle_logits
from zoo import ZOO_RELEASE, zoo_config

RECORD = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
NO_END = {"eos_token_id": VOCAB_SIZE - 1}  # prompt lookup of transformers 4.57 fails without one
ALL_DRAFTS = [(num_draft, num_right) for num_draft in (1, 2, 5, 11) for num_right in range(num_draft + 1)]


def assistant_like(model, noise: float, **schedule):
    """A copy of a model, off by some noise."""
    assistant = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in assistant.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    schedule = {
        "num_assistant_tokens": 6,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    } | schedule
    for name, value in schedule.items():
        setattr(assistant.generation_config, name, value)
    return assistant


@contextlib.contextmanager
def passes_of(model):
    """The number of columns of each pass through a model."""
    columns = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: columns.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield columns
    finally:
        handle.remove()


def assert_like_plain_decoding(model, prompt, outputs, window=WINDOW, **options):
    """Token for token, with the same logits (`test_generate.py` has compared those with the oracle), and as long a cache."""
    plain = generate(prompt, model=model, **RECORD, **window, **options)
    assert outputs.sequences.equal(plain.sequences)
    assert_same(torch.stack(outputs.logits, 1), torch.stack(plain.logits, 1))
    cache = outputs.past_key_values
    assert cache.num_tokens_seen == plain.sequences.shape[1] - 1
    assert cache.unseen_token_ids == plain.sequences[:, -1].tolist()
    assert not cache.stream.is_recording and not any(ring.log for ring in rings_of(cache))
    assert all(type(number) is int for number in (*cache.stream.num_seen, *cache.stream.base))


@pytest.mark.parametrize(
    "name, num_prompt_tokens",
    [("llama", 1), ("llama", 14), ("llama", 40), ("gpt-j", 40), ("gemma3", 14), ("deepseek-v3", 1), ("mistral-short-window", 40)],
)
def test_drafts_of_every_length_rejected_at_every_place(name, num_prompt_tokens, monkeypatch):
    """Drafts are made up: all lengths and numbers of right tokens, so that edges of the window and of positions fall everywhere in them.

    Would catch a token that a rejected one evicted for good, and positions that were lowered within a draft.
    """
    model, prompt = build_model(name), random_ids(num_prompt_tokens)
    options = {"max_new_tokens": 110, **NO_END}
    text = generate(prompt, model=model, do_sample=False, **options, **WINDOW)
    drafts = itertools.cycle(ALL_DRAFTS)

    def get_candidates(self, input_ids, *args, **kwargs):
        num_draft, num_right = next(drafts)
        draft = text[:, input_ids.shape[1] :][:, :num_draft].clone()
        draft[:, num_right : num_right + 1] += 1
        return torch.cat([input_ids, draft % VOCAB_SIZE], 1), None

    monkeypatch.setattr(candidate_generator.PromptLookupCandidateGenerator, "get_candidates", get_candidates)
    with passes_of(model) as columns:
        outputs = generate(prompt, model=model, prompt_lookup_num_tokens=11, **options, **RECORD, **WINDOW)
    num_recent = 6 if name in ("gemma3", "mistral-short-window") else 12
    assert max(columns[5:]) == num_recent, "a longer pass could not be taken back"
    assert len(columns) < 90
    assert_like_plain_decoding(model, prompt, outputs, **options)


@pytest.mark.parametrize("noise", [0, 0.02])
def test_a_release_that_says_nothing_where_a_whole_draft_stands(model, noise, monkeypatch, tmp_path):
    """As transformers 5.14, which counts what it takes back in tensors, too. Would catch a record that grows from draft to draft, and is
    taken back in the end."""
    crop, num_recorded = SinkCache.crop, []

    def crop_of_5_14(self, num_tokens):
        num_recorded.append(self.stream.num_recorded)
        is_ours = sys._getframe(1).f_globals["__name__"].startswith("custom_generate.")
        if is_ours or num_tokens != 0:
            crop(self, num_tokens if is_ours else torch.tensor(num_tokens))

    monkeypatch.setattr(SinkCache, "crop", crop_of_5_14)
    prompt, assistant = random_ids(20), assistant_like(model, noise)
    outputs = generate(prompt, model=model, assistant_model=assistant, max_new_tokens=60, **RECORD, **WINDOW)
    assert_like_plain_decoding(model, prompt, outputs, max_new_tokens=60)
    assert 0 < max(num_recorded) <= 7
    outputs.past_key_values.save(tmp_path / "cache")


@pytest.mark.parametrize("window_length, num_prompt_tokens", [(16, 1), (16, 40), (6, 15), (5, 8)], ids=lambda number: str(number))
def test_an_assistant_has_a_window_of_its_own(model, window_length, num_prompt_tokens, monkeypatch):
    """One like the model itself drafts what the model says, past its window too; and its cache never holds more than a window.

    A window of 5 with 4 sinks has room for one recent token, and so for no draft.
    """
    window = {"window_length": window_length, "num_sink_tokens": 4}
    num_tokens = 4 * window_length + 6
    caches = []
    init = Drafter.__init__
    monkeypatch.setattr(
        Drafter, "__init__", lambda self, model, cache, *args: (caches.append(cache), init(self, model, cache, *args))[1]
    )
    prompt, assistant = random_ids(num_prompt_tokens), assistant_like(model, 0)
    with passes_of(model) as columns:
        outputs = generate(prompt, model=model, assistant_model=assistant, max_new_tokens=num_tokens, **RECORD, **window)
    num_draft = min(6, window_length - 4 - 1)
    num_asked = 3  # passes in which the model is asked how it treats positions
    assert len(columns) - num_asked <= num_tokens / (num_draft + 1) + num_prompt_tokens / 5 + 2, "drafts were rejected"
    assert_like_plain_decoding(model, prompt, outputs, window, max_new_tokens=num_tokens)
    (cache,) = caches
    assert cache.num_tokens_seen > 4 * window_length == 4 * cache.window_length
    assert all(ring.slots.shape[2] <= window_length for ring in rings_of(cache))


@pytest.mark.parametrize(
    "options",
    [
        {"num_assistant_tokens_schedule": "heuristic"},
        {"num_assistant_tokens_schedule": "heuristic_transient"},
        {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4},
        {"num_assistant_tokens": 20},
    ],
    ids=str,
)
def test_an_assistant_that_is_sometimes_right(model, options):
    prompt, assistant = random_ids(20), assistant_like(model, 0.02, **options)
    before = copy.deepcopy(vars(assistant.generation_config)), set(vars(assistant)), assistant.config.to_dict()
    with passes_of(model) as columns:
        outputs = generate(prompt, model=model, assistant_model=assistant, max_new_tokens=70, **RECORD, **WINDOW)
    assert 10 < len(columns) < 66, "all drafts were accepted, or none"
    assert_like_plain_decoding(model, prompt, outputs, max_new_tokens=70)
    assert before == (vars(assistant.generation_config), set(vars(assistant)), assistant.config.to_dict())


@pytest.mark.parametrize("num_prompt_tokens", [2, 30])
def test_the_first_layers_draft(model, num_prompt_tokens):
    """With a last layer that does nothing, they say what the model says: each draft is right."""
    own = copy.deepcopy(model)
    torch.nn.init.zeros_(own.model.layers[2].self_attn.o_proj.weight)
    torch.nn.init.zeros_(own.model.layers[2].mlp.down_proj.weight)
    own.generation_config.update(
        num_assistant_tokens=6, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    before, prompt = own.config.to_dict(), random_ids(num_prompt_tokens)
    columns = []
    handle = own.model.layers[2].register_forward_pre_hook(lambda module, args: columns.append(args[0].shape[1]))
    outputs = generate(prompt, model=own, assistant_early_exit=2, max_new_tokens=70, **RECORD, **WINDOW)
    handle.remove()
    assert len(columns) <= 70 / 7 + 6 and columns.count(7) >= 9, "the last layer has drafted, or drafts were rejected"
    assert_like_plain_decoding(own, prompt, outputs, max_new_tokens=70)
    assert own.config.to_dict() == before


@pytest.mark.parametrize("how", ["model.compile", "compiled forward", "compiled forward of its body", "hooks"])
def test_the_first_layers_of_a_model_that_was_changed_draft(model, how):
    """What torch.compile and accelerate put on a model leads to all of its layers."""
    own, prompt = copy.deepcopy(model), random_ids(30)
    if how == "model.compile":
        own.compile(backend="eager")
    elif how == "hooks":
        hooks = pytest.importorskip("accelerate.hooks")
        for each in (own, own.model, *own.model.layers):
            hooks.add_hook_to_module(each, hooks.AlignDevicesHook(torch.device("cpu")))
    else:
        called = own if how == "compiled forward" else own.model
        called.forward = torch.compile(called.forward, backend="eager")
    with passes_of(model if how == "model.compile" else own) as columns:
        outputs = generate(prompt, model=own, assistant_early_exit=1, max_new_tokens=20, **RECORD, **WINDOW)
    assert len(columns) > 5 or how == "model.compile"
    assert_like_plain_decoding(model, prompt, outputs, max_new_tokens=20)


def test_a_model_that_is_offloaded_can_not_draft(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(own := copy.deepcopy(model), execution_device=torch.device("cpu"))
    for options in ({"assistant_early_exit": 1}, {"assistant_model": own}):
        with pytest.raises(ValueError, match="model that drafts is offloaded.*Load it as a whole"):
            generate(random_ids(30), model=own, max_new_tokens=20, **options, **WINDOW)


@pytest.mark.parametrize("name", ["gemma3", "gpt-neox", "phi3-longrope"])
def test_the_first_layers_of_other_families_draft(name):
    """GPT-NeoX runs all layers that it has, whatever its config says."""
    model, prompt = build_model(name), random_ids(30)
    with passes_of(model) as columns:
        outputs = generate(prompt, model=model, assistant_early_exit=1, max_new_tokens=40, **RECORD, **WINDOW)
    assert len(columns) > 5
    assert_like_plain_decoding(model, prompt, outputs, max_new_tokens=40)


@pytest.mark.parametrize(
    "options", [{"max_matching_ngram_size": 1}, {"repetition_penalty": 1.2}, {"min_new_tokens": 20}], ids=str
)
def test_looking_up_the_prompt(model, options):
    prompt = random_ids(10).repeat(1, 4)
    options = options | {"max_new_tokens": 60, "eos_token_id": [5, 7, 9]}
    with passes_of(model) as columns:
        outputs = generate(prompt, model=model, prompt_lookup_num_tokens=4, **options, **RECORD, **WINDOW)
    assert 5 in columns
    assert_like_plain_decoding(model, prompt, outputs, **options)


# ---- two tokenizers


@pytest.fixture(scope="module")
def larger_vocabulary(tiny_model_folder):
    """The tiny model with three more ids, which no tokenizer knows: transformers takes it for one with another tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_folder).float().eval()
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    return model


@pytest.mark.parametrize("do_sample", [False, True])
def test_two_tokenizers(tiny_model, larger_vocabulary, tokenizer, tiny_model_folder, do_sample):
    """Drafts go through text, which is cut anew at its end: the assistant takes back tokens that stood. Nothing is left on it."""
    prompt = tokenizer("import os\n\n\ndef walk(path):\n    for name in os.", return_tensors="pt").input_ids
    window = {"window_length": 32, "num_sink_tokens": 4}
    own = AutoTokenizer.from_pretrained(tiny_model_folder)
    before = dict(larger_vocabulary.named_modules()), copy.deepcopy(vars(larger_vocabulary.generation_config))
    known = len(candidate_generator.AssistantVocabTranslatorCache._cache)
    torch.manual_seed(0)
    with passes_of(tiny_model) as columns:
        outputs = generate(
            prompt, model=tiny_model, assistant_model=larger_vocabulary, tokenizer=tokenizer, assistant_tokenizer=own,
            max_new_tokens=110, eos_token_id=0, **RECORD | {"do_sample": do_sample}, **window,
        )  # fmt: skip
    if do_sample:
        expected = oracle_logits(tiny_model, outputs.sequences[:, :-1], *window.values())
        assert_same(torch.stack(outputs.logits, 1), expected[:, prompt.shape[1] - 1 :])
    else:
        assert len(columns) < 90, "all drafts were rejected"
        assert_like_plain_decoding(tiny_model, prompt, outputs, window, max_new_tokens=110, eos_token_id=0)
    assert before == (dict(larger_vocabulary.named_modules()), vars(larger_vocabulary.generation_config))
    assert len(candidate_generator.AssistantVocabTranslatorCache._cache) == known


# ---- sampling


def test_sampled_texts_follow_the_rules(model):
    """Each token's logits are the oracle's, whichever draft it comes from."""
    torch.manual_seed(1)
    for options in (
        {"assistant_model": assistant_like(model, 0.02)},
        {"assistant_early_exit": 2},
        {"prompt_lookup_num_tokens": 3},
    ):
        sampled = RECORD | {"do_sample": True}
        outputs = generate(random_ids(20), model=model, max_new_tokens=60, **options, **NO_END, **sampled, **WINDOW)
        expected = oracle_logits(model, outputs.sequences[:, :-1], *WINDOW.values())
        assert_same(torch.stack(outputs.logits, 1), expected[:, 19:])


# ---- what stands around it


class Collect:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.ids, self.has_ended = [], False

    def put(self, ids):
        self.ids += ids.flatten().tolist()

    def end(self):
        self.has_ended = True


def test_streamers_processors_and_criteria(model):
    class Favour(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + torch.nn.functional.one_hot((input_ids[:, -1] * 7) % VOCAB_SIZE, VOCAB_SIZE) * 2.0

    prompt, streamer = random_ids(20), Collect()
    options = {"max_new_tokens": 60, "eos_token_id": [11, 12], "logits_processor": [Favour()]}
    outputs = generate(
        prompt, model=model, assistant_model=assistant_like(model, 0.02), streamer=streamer, **options, **RECORD, **WINDOW
    )
    assert streamer.ids == outputs.sequences[0].tolist() and streamer.has_ended
    assert_like_plain_decoding(model, prompt, outputs, **options)
    stop = [lambda ids, scores, **kwargs: torch.tensor([ids.shape[1] >= 50])]
    outputs = generate(
        prompt,
        model=model,
        assistant_model=assistant_like(model, 0.02),
        stopping_criteria=stop,
        max_new_tokens=60,
        **RECORD,
        **WINDOW,
    )
    assert 50 <= outputs.sequences.shape[1] <= 57  # transformers asks after each draft
    assert outputs.past_key_values.num_tokens_seen == outputs.sequences.shape[1] - 1


@pytest.mark.parametrize("num_padding, static", [(0, False), (5, False), (5, True)])
def test_several_turns(model, num_padding, static):
    """Assisted or not, whole history or only what is new: columns of the text and tokens seen are different numbers then."""
    cache, assistant = SinkCache(**WINDOW, static=static), assistant_like(model, 0.02)
    text, logits, is_answer = random_ids(20), [], torch.zeros(20, dtype=torch.bool)
    turns = [{"assistant_model": assistant}, {}, {"assistant_model": assistant}, {"prompt_lookup_num_tokens": 4}, {}]
    for turn, options in enumerate(turns):
        ids = torch.cat([torch.full((1, num_padding), 7), text], 1)
        mask = torch.arange(ids.shape[1])[None] >= num_padding
        if turn in (2, 3):
            ids, mask = text[:, cache.num_tokens_seen :], torch.ones_like(text)
        outputs = generate(
            ids, attention_mask=mask.long(), model=model, past_key_values=cache, max_new_tokens=12, **options, **NO_END, **RECORD
        )
        logits += outputs.logits
        text = torch.cat([text, outputs.sequences[:, ids.shape[1] :]], 1)
        assert cache.num_tokens_seen == text.shape[1] - 1 and cache.unseen_token_ids == text[:, -1].tolist()
        text = torch.cat([text, random_ids(3, seed=turn)], 1)
        is_answer = torch.cat([is_answer, torch.arange(15) < 12])
    expected = oracle_logits(model, text[:, :-1], *WINDOW.values())
    assert_same(torch.stack(logits, 1), expected[:, is_answer[1:]])


def test_a_prompt_is_not_recorded(model):
    """It stands: only what may be taken back is worth the memory."""
    cache, seen = SinkCache(**WINDOW), []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(cache.stream.is_recording))
    try:
        generate(random_ids(50), model=model, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=5, **NO_END)
    finally:
        handle.remove()
    num_prompt_passes = seen.index(True)
    assert num_prompt_passes >= 4 and all(seen[num_prompt_passes:])


def test_nothing_of_a_draft_is_left_after_an_interrupt(model):
    class Interrupt(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 40:
                raise KeyboardInterrupt
            return scores

    cache, prompt, assistant = SinkCache(**WINDOW), random_ids(30), assistant_like(model, 0)
    config = copy.deepcopy(vars(assistant.generation_config))
    assistant_early_exit = copy.deepcopy(model.config).to_dict()
    plain = generate(prompt, model=model, max_new_tokens=30, do_sample=False, **WINDOW)
    for options in ({"assistant_model": assistant}, {"assistant_early_exit": 1}):
        with pytest.raises(KeyboardInterrupt):
            generate(
                prompt,
                model=model,
                past_key_values=cache,
                max_new_tokens=30,
                logits_processor=[Interrupt()],
                do_sample=False,
                **options,
            )
        assert 29 <= cache.num_tokens_seen <= 40
        outputs = generate(plain[:, :45], model=model, past_key_values=cache, max_new_tokens=15, **RECORD)
        assert outputs.sequences.equal(plain)
        cache.reset()
    assert vars(assistant.generation_config) == config and model.config.to_dict() == assistant_early_exit


def test_recording_goes_on_after_a_call_with_drafts(model):
    """Who has switched it on can still take back what came after that call."""
    for was_recording in (True, False):
        cache = SinkCache.from_model(model, **WINDOW)
        cache.activate_past_recording(was_recording)
        options = {"model": model, "past_key_values": cache, "max_new_tokens": 5, **NO_END}
        text = generate(random_ids(40), prompt_lookup_num_tokens=3, **options)
        assert cache.stream.is_recording == was_recording
        generate(text, **options)
        with contextlib.nullcontext() if was_recording else pytest.raises(ValueError, match="Can't take back 3 tokens"):
            cache.crop(-3)


def test_an_interrupt_within_a_draft_is_what_its_user_gets(model):
    """Some layers had already let go of what a second try needs: whoever uses the cache next is told, and not in place of Ctrl-C."""
    cache, prompt, plain = SinkCache(**WINDOW), random_ids(30), generate(random_ids(30), model=model, max_new_tokens=30, **WINDOW, **RECORD)
    options = {"model": model, "past_key_values": cache, "max_new_tokens": 30, "assistant_model": assistant_like(model, 0)}

    def interrupt(layer, arguments):
        if cache.stream is not None and cache.stream.is_recording and arguments[0].shape[1] > 1:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(prompt, **options, do_sample=False)
    finally:
        handle.remove()
    with pytest.raises(ValueError, match=r"can't be repeated. Call reset\(\)"):
        generate(prompt, **options, do_sample=False)
    cache.reset()
    assert generate(prompt, **options, do_sample=False).equal(plain.sequences)


def test_a_stop_that_is_known_one_step_late(model, monkeypatch):
    """Where transformers decodes one step ahead (on Apple's GPUs), it takes the last one back."""
    if not hasattr(transformers.generation.utils, "DeferredStopCheck"):
        pytest.skip("this transformers does not")
    check = transformers.generation.utils.DeferredStopCheck
    seen = []
    monkeypatch.setattr(
        check, "is_supported", staticmethod(lambda device, cache, *args, **kwargs: seen.append(cache.is_croppable) or True)
    )
    monkeypatch.setattr(torch, "Event", Mock)  # a CPU has none
    cache, prompt = SinkCache(**WINDOW), random_ids(30)
    outputs = generate(prompt, model=model, past_key_values=cache, max_new_tokens=60, eos_token_id=[11, 12], **RECORD)
    assert seen == [True] and outputs.sequences.shape[1] < 90
    monkeypatch.undo()
    assert_like_plain_decoding(model, prompt, outputs, max_new_tokens=60, eos_token_id=[11, 12])


def test_a_stop_of_rows_that_is_known_one_step_late(model, monkeypatch):
    """The step that is taken back is one token of each row, also if the row with the longest text had ended before."""
    if not hasattr(transformers.generation.utils, "DeferredStopCheck"):
        pytest.skip("this transformers does not")
    ids, mask = left_padded([random_ids(12, seed=1), random_ids(3, seed=2)])
    first, second = generate(ids, attention_mask=mask, model=model, max_new_tokens=9, **WINDOW)[:, 12:].tolist()
    end = next(token for token in second[4:] if token not in first[:2] + second[:4])
    options = {"model": model, "eos_token_id": [first[1], end], "pad_token_id": 7, "max_new_tokens": 30}
    caches = SinkCache(**WINDOW), SinkCache(**WINDOW)
    for cache in caches:
        generate(ids, attention_mask=mask, past_key_values=cache, **options)
        monkeypatch.setattr(transformers.generation.utils.DeferredStopCheck, "is_supported", staticmethod(lambda *_, **__: True))
        monkeypatch.setattr(torch, "Event", Mock)  # a CPU has none
    monkeypatch.undo()
    at_once, late = caches
    assert late.num_tokens_seen_by_row == at_once.num_tokens_seen_by_row
    texts = [generate(model=model, past_key_values=cache, max_new_tokens=9, eos_token_id=None) for cache in caches]
    assert texts[0].equal(texts[1])


# ---- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inputs": random_ids(5, num_rows=2)}, "takes one text, and this would be 2"),
        ({"num_return_sequences": 2, "do_sample": True}, "takes one text, and this would be 2"),
        ({"num_beams": 3}, "takes one text, and this would be 3"),
        ({"inputs": None, "inputs_embeds": torch.zeros(1, 5, 32)}, "can't begin with inputs_embeds"),
        ({"assistant_early_exit": 3}, "one of the first 2 of 3 layers, got 3"),
        ({"assistant_early_exit": 0}, "one of the first 2 of 3 layers, got 0"),
        ({"assistant_early_exit": "one"}, "one of the first 2 of 3 layers, got 'one'"),
    ],
)
def test_what_can_not_be_assisted(model, options, message, monkeypatch):
    SinkCache.from_model(model, **WINDOW)
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=message):
        generate(**{"inputs": random_ids(5), "prompt_lookup_num_tokens": 3} | options, model=model, **WINDOW)


@pytest.mark.parametrize("is_recording", [False, True])
def test_what_transformers_refuses_leaves_the_cache_as_it_was(model, is_recording):
    """It begins to record before it looks at these numbers: recorded for good, what is evicted would never be let go."""
    cache = SinkCache.from_model(model, **WINDOW)
    text = generate(random_ids(30), model=model, past_key_values=cache, max_new_tokens=5, do_sample=False)
    cache.activate_past_recording(is_recording)
    model(**cache.prepare(text[:, -1:]))
    with pytest.raises(ValueError, match="num_output_tokens"):
        generate(random_ids(4, seed=6), model=model, past_key_values=cache, prompt_lookup_num_tokens=0)
    assert cache.stream.is_recording == is_recording and cache.stream.num_recorded == is_recording
    if is_recording:
        cache.crop(-1)
        assert cache.num_tokens_seen == 34


@pytest.mark.parametrize("kind, reason", [("bloom", "depends on the order of the keys"), ("lfm2", "has recurrent states")])
def test_models_that_can_not_take_tokens_back(model, kind, reason):
    if kind == "bloom":
        other = build_model(kind)
    elif TRANSFORMERS < version.parse(ZOO_RELEASE):
        pytest.skip("an older transformers may not have it, or not its states in the cache")
    else:
        other = transformers.AutoModelForCausalLM.from_config(zoo_config(kind)).eval()
    for options in ({"model": other, "prompt_lookup_num_tokens": 3}, {"model": model, "assistant_model": other}):
        with pytest.raises(ValueError, match=f"can't be used with {type(other).__name__}, which {reason}"):
            generate(random_ids(5), **options, **WINDOW)


def test_an_assistant_for_which_the_rules_can_not_be_kept(model):
    assistant = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB_SIZE)
    ).eval()
    with pytest.raises(ValueError, match="for GPT2LMHeadModel .*absolute or learned position"):
        generate(random_ids(5), model=model, assistant_model=assistant, **WINDOW)
