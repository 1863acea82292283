"""Threads: one model serves several streams at once, and no cache serves two."""

import copy
import threading

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer

from checks import NUM_SINK_TOKENS, WINDOW, WINDOW_LENGTH, assert_same, feed, random_ids
from custom_generate.generate import SinkCache, generate
from families import build_model
from oracle import oracle_logits

NUM_NEW = 4 * WINDOW_LENGTH


class Meet(LogitsProcessor):
    """Wait for the other threads at each token, so that all of them are under way from the first to the last one."""

    def __init__(self, barrier: threading.Barrier):
        self.barrier = barrier

    def __call__(self, input_ids, scores):
        self.barrier.wait(timeout=60)
        return scores


def in_threads(*functions) -> list:
    """What the functions return when they run at the same time; an error of one is raised here."""
    results, threads = [None] * len(functions), []

    def run(index, function):
        try:
            results[index] = function()
        except BaseException as error:
            results[index] = error

    for index, function in enumerate(functions):
        threads.append(threading.Thread(target=run, args=(index, function)))
        threads[-1].start()
    for thread in threads:
        thread.join(timeout=120)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, ValueError):
            raise result
    return results


@pytest.mark.parametrize("name, options", [("llama", {}), ("gemma3", {}), ("llama", {"cache_implementation": "static"})])
def test_streams_in_threads_do_not_touch_each_other(name, options):
    """Three streams over one model that no thread has looked at before, in several rounds: new caches, then the same ones."""
    model = build_model(name, "sdpa")
    prompts = [random_ids(length, seed=length) for length in (3, 30, 75)]
    before = dict(vars(model))
    caches, texts, reference = [None] * 3, list(prompts), build_model(name, "sdpa")

    def stream(index, barrier):
        arguments = {"past_key_values": caches[index]} if caches[index] is not None else WINDOW | options
        return generate(
            texts[index], model=model.eval(), max_new_tokens=NUM_NEW, logits_processor=[Meet(barrier)],
            return_dict_in_generate=True, **arguments,
        )  # fmt: skip

    for _ in range(3):
        barrier = threading.Barrier(3)
        outputs = in_threads(*(lambda index=index: stream(index, barrier) for index in range(3)))
        caches, texts = [each.past_key_values for each in outputs], [each.sequences for each in outputs]
    for index, text in enumerate(prompts):  # one after the other, on a model of its own
        arguments = WINDOW | options
        for _ in range(3):
            output = generate(text, model=reference, max_new_tokens=NUM_NEW, return_dict_in_generate=True, **arguments)
            text, arguments = output.sequences, {"past_key_values": output.past_key_values}
        assert texts[index].equal(text)
    assert len({tuple(text[0, -20:].tolist()) for text in texts}) == 3
    assert vars(model) == before
    for cache in caches:
        with cache.in_one_call():
            pass  # none of them is still in one


class InTheMiddle(StoppingCriteria):
    """Call a function at one token of a text, in the thread that generates it or in another one."""

    def __init__(self, function, in_another_thread: bool, at: int):
        self.function, self.in_another_thread, self.at, self.results, self.num_tokens = function, in_another_thread, at, [], 0

    def __call__(self, input_ids, scores, **kwargs):
        self.num_tokens += 1
        if self.num_tokens == self.at:
            if self.in_another_thread:
                self.results += in_threads(self.function)
            else:
                try:
                    self.results.append(self.function())
                except ValueError as error:
                    self.results.append(error)
        return torch.full((len(input_ids),), False)


USES = {
    "generate": (lambda model, cache: generate(random_ids(5), model=model, past_key_values=cache, max_new_tokens=3), True),
    "prepare": (lambda model, cache: model(**cache.prepare(random_ids(1))), False),
    "by the model alone": (lambda model, cache: model(random_ids(1), past_key_values=cache), False),
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", USES)
def test_a_cache_in_a_call_of_generate_is_refused_to_others(model, name, static):
    """The call gets the right tokens. `also_here` is refused to a second call in the same thread, too."""
    use, also_here = USES[name]
    expected = generate(random_ids(30), model=model, max_new_tokens=NUM_NEW, **WINDOW)
    for in_another_thread in (True, False)[: 1 + also_here]:
        cache = SinkCache.from_model(model, **WINDOW, static=static)
        # Before positions are lowered, or a pass that the model prepares would be refused for that.
        intruder = InTheMiddle(lambda: use(model, cache), in_another_thread, at=2)
        text = generate(random_ids(30), model=model, past_key_values=cache, max_new_tokens=NUM_NEW, stopping_criteria=[intruder])
        assert text.equal(expected)
        (error,) = intruder.results
        assert isinstance(error, ValueError) and "in use by another thread or call" in str(error)


@pytest.mark.parametrize("static", [False, True])
def test_two_threads_that_begin_at_once(model, static):
    """One of them has it, or none: never both. Whoever had it got the right tokens."""
    prompts = [random_ids(30, seed=1), random_ids(30, seed=2)]
    expected = [generate(prompt, model=model, max_new_tokens=5, **WINDOW) for prompt in prompts]
    num_refused = 0
    for _ in range(10):
        cache, barrier = SinkCache.from_model(model, **WINDOW, static=static), threading.Barrier(2)

        def begin(prompt):
            barrier.wait(timeout=60)
            return generate(prompt, model=model, past_key_values=cache, max_new_tokens=5)

        results = in_threads(*(lambda prompt=prompt: begin(prompt) for prompt in prompts))
        for result, text in zip(results, expected):
            assert isinstance(result, ValueError) or result.equal(text)
            num_refused += isinstance(result, ValueError)
    assert num_refused >= 10  # the second one too late to be at once is refused for its text


@pytest.mark.parametrize("static", [False, True])
def test_a_loop_that_goes_on_in_other_threads(model, static):
    """One after the other: a pass that has ended belongs to nobody."""
    cache, stream = SinkCache.from_model(model, **WINDOW, static=static), random_ids(80)
    logits = [feed(model, cache, stream[:, :40], [40])]
    for start in range(40, 80, 5):
        assert in_threads(lambda: cache.num_tokens_seen) == [start]
        logits += in_threads(lambda: feed(model, cache, stream[:, start : start + 5], [1, 1, 3]))
    assert_same(torch.cat(logits, 1), oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS))


class Broken(Exception):
    pass


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("where", ["in a pass", "between passes", "before"])
def test_an_exception_gives_the_cache_back(model, where, static):
    """To any thread; and one in the middle of a token leaves the cache before that token."""
    cache, stream = SinkCache.from_model(model, **WINDOW, static=static), random_ids(30)
    options, hook, calls = {}, None, []

    def fail(*_, **__):
        calls.append(1)
        if len(calls) == 40:
            raise Broken
        return torch.tensor([False])

    if where == "in a pass":
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: [fail()] and None)
    elif where == "between passes":
        options["stopping_criteria"] = [fail]
    else:
        options["attention_mask"] = torch.ones(1, 7)
    with pytest.raises(ValueError if where == "before" else Broken):
        generate(stream, model=model, past_key_values=cache, max_new_tokens=NUM_NEW, **options)
    if hook is not None:
        hook.remove()
    text = generate(stream, model=model, max_new_tokens=NUM_NEW, **WINDOW)
    num_seen = cache.num_tokens_seen
    assert num_seen == {"in a pass": 66, "between passes": 69, "before": 0}[where]
    more = {"past_key_values": cache, "max_new_tokens": 10}
    (again,) = in_threads(lambda: generate(text[:, : max(num_seen + 1, 30)], model=model, **more))
    assert again.equal(text[:, : again.shape[1]]) and again.shape[1] >= 40


def test_a_copy_made_in_the_middle_is_free(model):
    """Checkpoints of an endless stream: its copy belongs to nobody."""
    copies, cache = [], SinkCache.from_model(model, **WINDOW)
    keep = InTheMiddle(lambda: copies.append(copy.deepcopy(cache)), in_another_thread=False, at=20)
    text = generate(random_ids(30), model=model, past_key_values=cache, max_new_tokens=NUM_NEW, stopping_criteria=[keep])
    (branch,) = copies
    assert branch.num_tokens_seen == 49
    (again,) = in_threads(lambda: generate(text[:, :50], model=model, past_key_values=branch, max_new_tokens=NUM_NEW - 20))
    assert again.equal(text)


@pytest.mark.parametrize("static", [{}, {"cache_implementation": "static"}])
def test_a_streamer_in_a_thread(tiny_model, tokenizer, static):
    """The most usual use: the text is read here, and so is what the cache says of itself, while it is made there."""
    prompt = tokenizer("import os\n", return_tensors="pt").input_ids
    expected = generate(prompt, model=tiny_model, max_new_tokens=NUM_NEW, **WINDOW)
    for _ in range(2):
        cache = SinkCache.from_model(tiny_model, **WINDOW, static=bool(static))
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        arguments = {"model": tiny_model, "past_key_values": cache, "max_new_tokens": NUM_NEW, "streamer": streamer}
        thread = threading.Thread(target=generate, args=(prompt,), kwargs=arguments)
        thread.start()
        text, seen = "", []
        for piece in streamer:
            text += piece
            seen.append(cache.num_tokens_seen)
            assert "SinkCache" in repr(cache)
        thread.join(timeout=60)
        assert text == tokenizer.decode(expected[0, prompt.shape[1] :])
        assert seen == sorted(seen) and cache.num_tokens_seen == expected.shape[1] - 1
