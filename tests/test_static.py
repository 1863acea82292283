"""The static mode: the same rules, and one compiled graph for the whole stream.

The code is captured, not translated (`backend="eager"`): what a backend makes of the graph is torch's business, but what makes it
capture another one is ours.
"""

import copy

import pytest
import torch
from packaging import version
from torch._dynamo.utils import counters
from transformers import CompileConfig

from checks import (
    NUM_SINK_TOKENS,
    WINDOW,
    WINDOW_LENGTH,
    assert_same,
    build_recurrent_model,
    feed,
    interrupted_at,
    left_padded,
    random_ids,
    rings_of,
)
from custom_generate.generate import SinkCache, generate
from custom_generate.releases import LinearAttentionLayer, named_states
from families import EAGER_ONLY, FAMILIES, ROTATIONS_ONLY, TRANSFORMERS, build_model, is_refused
from oracle import oracle_logits
from test_memory import reachable

NUM_STEPS = 5 * WINDOW_LENGTH
OLD_TORCH = version.parse(torch.__version__) < version.parse("2.13")
compiling = pytest.mark.skipif(
    OLD_TORCH, reason="older releases of torch can't capture all that transformers has in a forward pass"
)
CASES = [
    pytest.param(
        name,
        "eager" if name in EAGER_ONLY else "sdpa",
        id=name,
        marks=[pytest.mark.slow] if name in ROTATIONS_ONLY else [],
    )
    for name in FAMILIES
    if not is_refused(name)
]
CASES.append(pytest.param("llama", "eager", id="llama-eager"))


def static_cache(model) -> SinkCache:
    """One for this model, or a skip: what can't be served is refused before anything is run."""
    cache = SinkCache(**WINDOW, static=True)
    try:
        cache.bind(model)
    except ValueError as error:
        assert "The static mode can't serve" in str(error)
        pytest.skip(str(error))
    return cache


# What no graph holds, with the newest release: this one looks at the positions to choose its frequencies.
NOT_CAPTURED = {"llama-dynamic"}


def capture(name: str, model):
    """The model's forward pass, to be captured as a whole, and how many graphs that makes: none where it can't be captured even
    without a cache (older mixtures of experts, RoPE with frequencies that depend on the length)."""
    if OLD_TORCH:
        return model.forward, counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    if name in NOT_CAPTURED or TRANSFORMERS < version.parse("5.20"):  # all others have to be captured, and with the cache at once
        try:
            compiled(random_ids(1), position_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        except Exception:
            compiled = None
    torch._dynamo.reset()
    counters.clear()
    return (model.forward, 0) if compiled is None else (compiled, 1)


@pytest.mark.parametrize("name, implementation", CASES)
def test_one_graph_serves_the_whole_stream(name, implementation):
    """From the first token on: filling, over the edge, round the ring, and where the positions are lowered."""
    model = build_model(name, implementation)
    cache = static_cache(model)
    stream = random_ids(NUM_STEPS)
    forward, num_graphs = capture(name, model)
    with torch.no_grad():
        logits = torch.cat([forward(**cache.prepare(stream[:, t : t + 1])).logits for t in range(NUM_STEPS)], dim=1)
    assert_same(logits, oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS))
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert cache.num_tokens_seen == NUM_STEPS and any(cache.stream.base)


@pytest.mark.parametrize(
    "name, implementation",
    [case for case in CASES if case.id in ("llama", "llama-eager", "qwen2-half-sliding", "gemma3", "falcon")],
)
def test_one_graph_serves_a_padded_batch(name, implementation):
    """Rows of 30, 2 and 19 tokens: behind, before and over the edge at the same step."""
    model = build_model(name, implementation)
    cache = static_cache(model)
    stream = random_ids(30 + NUM_STEPS)
    rows = [stream[:, : length + NUM_STEPS] for length in (30, 2, 19)]
    ids, mask = left_padded(rows)
    feed(model, cache, ids[:, :30], [30], mask[:, :30])
    forward, num_graphs = capture(name, model)
    with torch.no_grad():
        logits = torch.cat([forward(**cache.prepare(ids[:, 30 + t : 31 + t])).logits for t in range(NUM_STEPS)], dim=1)
    for row, tokens in enumerate(rows):
        assert_same(logits[row : row + 1], oracle_logits(model, tokens, WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -NUM_STEPS:])
    assert counters["stats"]["unique_graphs"] == num_graphs


@compiling
@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next", "falcon_h1"])
def test_one_graph_serves_recurrent_states(model_type):
    """From the second token on: the first one finds none, and has a graph of its own. A second text has the same two, and the same
    places."""
    model, stream = build_recurrent_model(model_type, "5.20"), random_ids(50)
    cache = static_cache(model)
    expected = oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS)
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    places = set()
    for _ in range(2):
        logits = []
        for token in stream.split(1, dim=1):
            with torch.no_grad():
                logits.append(forward(**cache.prepare(token)).logits)
            places.add(tuple(state.data_ptr() for state in recurrent_states(cache)))
        assert_same(torch.cat(logits, dim=1), expected)
        cache.reset()
    assert counters["stats"]["unique_graphs"] == 2 and len(places) == 1


def recurrent_states(cache: SinkCache) -> list[torch.Tensor]:
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    return [state for layer in layers for state in named_states(layer).values()]


@pytest.mark.parametrize("model_type", ["lfm2", "granitemoehybrid", "falcon_h1"])
def test_recurrent_states_without_compiling(model_type):
    """A padded batch, passes over one and several tokens, other numbers of rows, rows that change places, and a second text."""
    model, stream = build_recurrent_model(model_type, "5.15"), random_ids(70)
    cache = static_cache(model)
    rows = [stream, stream[:, 11:]]
    expected = [oracle_logits(model, row, WINDOW_LENGTH, NUM_SINK_TOKENS) for row in rows]
    ids, mask = left_padded([row[:, : row.shape[1] - 40] for row in rows])
    feed(model, cache, ids, [30], mask)
    rest = stream[:, 30:].expand(2, -1)
    logits = [feed(model, cache, rest[:, :12], [1] * 5 + [6, 1])]
    places = [state.data_ptr() for state in recurrent_states(cache)]
    cache.reorder_cache(torch.tensor([1, 0]))
    logits.append(feed(model, cache, rest[:, 12:20], [1] * 8).flip(0))
    assert [state.data_ptr() for state in recurrent_states(cache)] == places
    cache.batch_select_indices(torch.tensor([1]))  # the first
    last = feed(model, cache, rest[:1, 20:], [1] * 20)
    assert_same(torch.cat([*(each[:1] for each in logits), last], dim=1), expected[0][:, 30:])
    assert_same(torch.cat([each[1:] for each in logits], dim=1), expected[1][:, 19:39])
    cache.reset()
    assert_same(feed(model, cache, stream[:, :30], [1] * 10 + [19, 1]), expected[0][:, :30])


@pytest.mark.parametrize("static", [False, True])
def test_a_pass_with_recurrent_states_that_may_have_been_interrupted_is_not_repeated(static):
    """Nothing says how far it got, least of all what was compiled: as soon as a pass is prepared, it has to be run."""
    model, stream = build_recurrent_model("lfm2"), random_ids(40)
    cache = SinkCache.from_model(model, **WINDOW, static=static)
    feed(model, cache, stream[:, :30], [20] + [1] * 10)
    before = copy.deepcopy(cache)
    cache.prepare(stream[:, 30:31])
    with pytest.raises(ValueError, match="can.t be repeated"):
        cache.prepare(stream[:, 30:31])
    expected = oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS)
    assert_same(feed(model, before, stream[:, 30:], [1] * 10), expected[:, 30:])
    cache.reset()
    assert_same(feed(model, cache, stream, [20] + [1] * 20), expected)


def test_however_the_tokens_are_fed_without_compiling():
    """Passes over several tokens share the slots with those over one."""
    model = build_model("llama", "sdpa")
    stream = random_ids()
    expected = oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS)
    for sizes in ([1] * 80, [9, 1, 1, 30, 1, 20, 1, 1, 16], [2, 1, 40, 1, 36], [80]):
        assert_same(feed(model, SinkCache.from_model(model, **WINDOW, static=True), stream, sizes), expected)


def compiled_by_generate() -> dict:
    """The arguments with which `generate` captures the forward pass by itself, not on a GPU only; nothing is captured yet."""
    torch._dynamo.reset()
    counters.clear()
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config, "do_sample": False, **WINDOW}


@compiling
@pytest.mark.parametrize("num_rows", [1, 3])
def test_generate_compiles_once(num_rows):
    """As it does by itself on a GPU; for a second text and its new cache, too. Nothing stays on the model."""
    model = build_model("llama", "sdpa")
    before = dict(vars(model))
    rows = [random_ids(length, seed=length) for length in (20, 2, 16)[:num_rows]]
    ids, mask = left_padded(rows)
    outputs = generate(
        ids, attention_mask=mask, model=model, max_new_tokens=NUM_STEPS, return_dict_in_generate=True, output_logits=True,
        **compiled_by_generate(),
    )  # fmt: skip
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for row, prompt in enumerate(rows):
        text = torch.cat([prompt, outputs.sequences[row : row + 1, ids.shape[1] :]], dim=1)
        expected = oracle_logits(model, text[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -NUM_STEPS:]
        assert_same(torch.stack(outputs.logits, dim=1)[row : row + 1], expected)
    assert vars(model) == before
    cache = outputs.past_key_values
    assert cache.is_static and cache.is_compileable and cache.num_tokens_seen == 20 + NUM_STEPS - 1
    assert "static=True" in repr(cache)

    more = torch.cat([outputs.sequences, random_ids(7, num_rows=num_rows)], dim=1)
    compiled = counters["stats"]["unique_graphs"]
    again = generate(
        more, attention_mask=torch.cat([mask, torch.ones(num_rows, NUM_STEPS + 7, dtype=torch.long)], dim=1), model=model,
        past_key_values=cache, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    text = torch.cat([rows[0], again.sequences[:1, ids.shape[1] :]], dim=1)
    expected = oracle_logits(model, text[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, -5:]
    assert_same(torch.stack(again.logits, dim=1)[:1], expected)
    assert counters["stats"]["unique_graphs"] == compiled


@compiling
@pytest.mark.parametrize("static", [False, True])
def test_a_compiled_pass_in_parts(static):
    """One of `generate` is not compiled, but one of the user's own may be."""
    model, stream = build_model("llama", "sdpa"), random_ids(100)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = SinkCache.from_model(model, **WINDOW, static=static)
    feed(model, cache, stream[:, :20], [20])
    with torch.no_grad():
        logits = [
            compiled(**cache.prepare(stream[:, at : at + 16], num_parts=4)).logits.flatten(0, 1) for at in range(20, 100, 16)
        ]
    expected = oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS)[:, 20:]
    assert_same(torch.cat(logits)[None], expected)


@compiling
def test_a_second_text_needs_no_second_graph():
    model = build_model("llama", "sdpa")
    arguments = compiled_by_generate()
    for seed in (1, 2):
        generate(random_ids(5, seed), model=model, max_new_tokens=20, **arguments)
    assert counters["stats"]["unique_graphs"] == 1


@compiling
def test_generate_goes_on_from_a_loop_that_was_compiled():
    """The last token of the loop is not yet part of what was seen, and has to be found in the text."""
    model, text = build_model("llama", "sdpa"), random_ids(30)
    torch._dynamo.reset()
    compiled, cache = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False), static_cache(model)
    with torch.no_grad():
        for token in text[:, :-1].split(1, dim=1):
            compiled(**cache.prepare(token))
    expected = generate(text, model=model, max_new_tokens=10, **WINDOW)
    assert generate(text, model=model, past_key_values=cache, max_new_tokens=10).equal(expected)


@compiling
@pytest.mark.parametrize("how", ["forward", "module", "wrapper"])
def test_a_model_that_the_user_compiled(how):
    """One graph for the end of the prompt, and one for all tokens after it: looking at the model, and the chunks, make none."""
    model, compiled = build_model("llama", "sdpa"), build_model("llama", "sdpa")
    torch._dynamo.reset()
    counters.clear()
    options = {"backend": "eager", "fullgraph": True, "dynamic": False}
    if how == "forward":  # as in older documentation
        compiled.forward = torch.compile(compiled.forward, **options)
    elif how == "module":
        compiled.compile(**options)
    else:
        wrapper = torch.compile(compiled, **options)
    arguments = {"cache_implementation": "static", "max_new_tokens": NUM_STEPS, "prefill_chunk_size": 10, **WINDOW}
    outputs = generate(
        random_ids(58),  # whose last pass has two tokens
        model=wrapper if how == "wrapper" else compiled,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    expected = oracle_logits(model, outputs.sequences[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, 57:]
    assert_same(torch.stack(outputs.logits, dim=1), expected)
    # transformers' generate calls the model in the wrapper.
    assert counters["stats"]["unique_graphs"] == (0 if how == "wrapper" else 2)


def test_a_pass_does_not_hold_on_to_the_text_that_its_token_is_a_view_of():
    """Its ids are on record until the next pass begins: with a view of the text, a cache would grow with it."""
    model, text = build_model("llama", "sdpa"), random_ids(1000)
    cache = static_cache(model)
    feed(model, cache, text[:, :20], [20])
    inputs = cache.prepare(text[:, 20:21])
    held = [each for each in reachable(cache) if isinstance(each, torch.Tensor)]
    assert text.untyped_storage().data_ptr() not in [each.untyped_storage().data_ptr() for each in held]
    with torch.no_grad():
        model(**inputs)
    assert cache.known_token_ids(0)[1].tolist() == text[0, 9:21].tolist()


def test_nothing_moves():
    """Addresses are those of the first token after every kind of operation: CUDA graphs read and write them."""
    model = build_model("qwen2-half-sliding", "sdpa")
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    cache.prepare(random_ids(1, num_rows=2))
    addresses = [ring.slots.data_ptr() for ring in rings_of(cache)]
    assert all(ring.slots.shape[2] == ring.window.length for ring in rings_of(cache))
    feed(model, cache, random_ids(50, num_rows=2), [1] * 10 + [30] + [1] * 10)
    cache.reorder_cache(torch.tensor([1, 1]))
    feed(model, cache, random_ids(1, num_rows=2), [1])
    cache.reset()
    stream = random_ids(40, num_rows=2)
    logits = feed(model, cache, stream, [3] + [1] * 37)
    assert [ring.slots.data_ptr() for ring in rings_of(cache)] == addresses
    assert_same(logits[1:], oracle_logits(model, stream[1:], WINDOW_LENGTH, NUM_SINK_TOKENS))


def test_torch_is_told_what_stays_in_place():
    """Also when there are other rows: CUDA graphs copy what they are not told of, at each token."""
    model = build_model("qwen2-half-sliding", "sdpa")
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    for change in (lambda: None, lambda: cache.batch_repeat_interleave(2), cache.reset):
        change()
        feed(model, cache, random_ids(3, num_rows=max(cache.batch_size, 1)), [1] * 3)
        stream = cache.stream
        read = [*(ring.slots for ring in stream.rings), *(sinks.pristine for sinks in stream.groups)]
        read += [*(sinks.turn for sinks in stream.groups), *(each for cursor in stream.cursors.values() for each in cursor.tensors)]
        assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in read)


@pytest.mark.parametrize("options", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}])
def test_rows_come_and_go(options):
    """Beams change places at each step, in the same buffers; their number is that of the prompt's rows only at first."""
    model = build_model("llama", "sdpa")
    texts = []
    for static in ({}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        texts.append(generate(random_ids(9, num_rows=2), model=model, max_new_tokens=NUM_STEPS, **WINDOW, **options, **static))
    assert texts[0].equal(texts[1])
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    stream = random_ids(60)
    feed(model, cache, stream[:, :20], [20])
    cache.batch_repeat_interleave(3)
    feed(model, cache, stream[:, 20:40].repeat(3, 1), [1] * 20)
    cache.batch_select_indices(torch.tensor([2]))
    expected = oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS)
    assert_same(feed(model, cache, stream[:, 40:], [1] * 20), expected[:, 40:])


def test_an_interrupted_pass_can_be_repeated():
    model = build_model("llama", "sdpa")
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    stream = random_ids(40)
    feed(model, cache, stream[:, :30], [20] + [1] * 10)
    prepared = cache.prepare(stream[:, 30:31])
    with interrupted_at(model.model.layers[1]):
        model(**prepared)
    assert cache.num_tokens_seen == 30
    logits = feed(model, cache, stream[:, 30:], [1] * 10)
    assert_same(logits, oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS)[:, 30:])


def test_draft_tokens_are_rolled_back():
    model = build_model("llama", "sdpa")
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    stream = random_ids(60)
    feed(model, cache, stream[:, :30], [20] + [1] * 10)
    cache.activate_past_recording()
    feed(model, cache, random_ids(8, seed=5), [1, 1, 6])
    cache.crop(-8)
    logits = feed(model, cache, stream[:, 30:], [1] * 30)
    assert_same(logits, oracle_logits(model, stream, WINDOW_LENGTH, NUM_SINK_TOKENS)[:, 30:])


@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_an_interrupted_pass_after_a_roll_back_over_the_edge(layer):
    """Where sinks have not moved yet. The pass over several tokens that comes then takes them from the slots."""
    model, ids = build_model("llama", "sdpa"), random_ids(40)
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    feed(model, cache, ids[:, :14], [14])
    cache.activate_past_recording()
    feed(model, cache, random_ids(8, seed=5), [1] * 8)
    cache.crop(-8)
    inputs = cache.prepare(ids[:, 14:15])
    if layer is not None:
        with interrupted_at(model.model.layers[layer]):
            model(**inputs)
    assert_same(feed(model, cache, ids[:, 14:], [9, 1, 16]), oracle_logits(model, ids, **WINDOW)[:, 14:])


@pytest.mark.parametrize("name, reason", [("bloom", "depends on the order of the keys")])
def test_models_without_a_static_mode_are_refused(name, reason):
    model = build_model(name)
    with pytest.raises(ValueError, match=f"static mode can't serve .*{reason}"):
        generate(random_ids(3), model=model, cache_implementation="static", **WINDOW)


def test_a_cache_that_is_not_static_is_not_taken_for_one():
    model = build_model("llama")
    cache = SinkCache.from_model(model, **WINDOW)
    with pytest.raises(ValueError, match="is not static"):
        generate(random_ids(3), model=model, cache_implementation="static", past_key_values=cache)


def test_a_reset_forgets_what_was_recorded():
    """What was overwritten in rows that are gone would be rotated with the rows that came after them."""
    model = build_model("llama", "sdpa")
    cache, ids = SinkCache.from_model(model, static=True, **WINDOW), random_ids(60)
    cache.activate_past_recording()
    feed(model, cache, random_ids(20).expand(3, -1), [15] + [1] * 5)
    cache.reset()
    rows, mask = left_padded([ids[:, 5:], ids])
    logits = feed(model, cache, rows, [10] + [1] * 50, mask)
    assert_same(logits[:1, 5:], oracle_logits(model, ids[:, 5:], **WINDOW))
    assert_same(logits[1:], oracle_logits(model, ids, **WINDOW))


def test_a_reset_forgets_what_was_no_number():
    """Would catch memory that stays as it is: where a mask hides NaN, 0 * NaN is NaN."""
    model, ids = build_model("llama", "sdpa"), random_ids(30)
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    with torch.no_grad():
        model(**cache.prepare(inputs_embeds=torch.full((1, 20, model.config.hidden_size), float("nan"))))
    cache.reset()
    assert_same(feed(model, cache, ids, [1] * 30), oracle_logits(model, ids, WINDOW_LENGTH, NUM_SINK_TOKENS))
