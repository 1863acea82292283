"""Other ways to hold a window.

Offloaded: what is handed out is copied from where it is kept, and what is new is copied back. Nothing else differs. Here both are the
memory of the CPU. The copies are made all the same: what is handed out never shares memory with what is kept.

Quantized: each key and value is what its backend makes of it, once, and all else is as ever. The reference keeps everything in full
precision. For each query it puts in the place of older states what the backend's own functions make of them, quantized and back, block by
block; which those are, and where its keys stand then, is written down here from the rules.
"""

import copy
import functools

import pytest
import torch

from checks import (
    NUM_SINK_TOKENS,
    WINDOW,
    WINDOW_LENGTH,
    assert_same,
    feed,
    interrupted_at,
    is_installed,
    left_padded,
    needs,
    random_ids,
    rings_of,
)
from custom_generate.generate import SinkCache, generate
from custom_generate.offloaded import OffloadedRing
from custom_generate.options import OFFLOADED
from custom_generate.quantized import Quantization
from custom_generate.releases import CACHE_NAME
from families import EAGER_ONLY, ORDERED, build_model
from oracle import TOLERANCE, known_oracle_logits, oracle_logits
from test_assisted import assistant_like

MODEL = "qwen3"

# ---- offloaded

OFFLOADED_FEEDINGS = {
    "singly": [1] * 80,
    "chunks": [2, 1, 9, 1, 30, 1, 20, 1, 15],
    "one prompt": [70] + [1] * 10,
    "in parts": [17, (20, 4), 1, (36, 3), (6, 6)],
}


@functools.cache
def shared_model(name: str) -> torch.nn.Module:
    return build_model(name, "eager" if name in EAGER_ONLY else "sdpa")


@pytest.fixture(scope="module")
def gemma3():
    """Native windows in two of four layers."""
    return shared_model("gemma3")


def offloaded_cache(model, **numbers) -> SinkCache:
    return SinkCache.from_model(model, **WINDOW | numbers, offloaded=True)


@pytest.mark.parametrize("sizes", OFFLOADED_FEEDINGS.values(), ids=OFFLOADED_FEEDINGS)
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "deepseek-v3", "falcon-alibi", "bloom", "gpt-j", "llama-dynamic"])
def test_an_offloaded_window_is_exact(name, sizes):
    if name in ORDERED and sizes[0] != 1:
        sizes = [WINDOW_LENGTH] + [1] * 64
    model, ids = shared_model(name), random_ids()
    logits = feed(model, offloaded_cache(model), ids, sizes)
    assert_same(logits, known_oracle_logits(model, ids, WINDOW_LENGTH, NUM_SINK_TOKENS))


@pytest.mark.parametrize("num_sink_tokens", [0, 1])
def test_other_numbers_of_sinks_of_an_offloaded_window(gemma3, num_sink_tokens):
    ids = random_ids()
    logits = feed(gemma3, offloaded_cache(gemma3, num_sink_tokens=num_sink_tokens), ids, OFFLOADED_FEEDINGS["chunks"])
    assert_same(logits, known_oracle_logits(gemma3, ids, WINDOW_LENGTH, num_sink_tokens))


def test_what_is_handed_out_is_a_copy(gemma3, monkeypatch):
    """And only what is new is written back: the slots of one token for each row."""
    cache, written = offloaded_cache(gemma3), []
    feed(gemma3, cache, random_ids(40, num_rows=2), [40])
    update, store = SinkCache.update, OffloadedRing.store

    def checked_update(self, *args, **kwargs):
        handed_out = update(self, *args, **kwargs)
        kept = {ring.host.untyped_storage().data_ptr() for ring in rings_of(self)}
        assert kept.isdisjoint(states.untyped_storage().data_ptr() for states in handed_out)
        seen = [states.clone() for states in handed_out]
        for states in handed_out:
            states.fill_(float("nan"))  # nobody may see it but the layer it is for
        return seen

    def counting_store(self, *args):
        before = self.recent.clone()
        store(self, *args)
        written.append(int((self.recent != before).any(-1).any(1).sum()))

    monkeypatch.setattr(SinkCache, "update", checked_update)
    monkeypatch.setattr(OffloadedRing, "store", counting_store)
    streams = random_ids(60, num_rows=2)
    logits = feed(gemma3, cache, streams, [1] * 60)
    assert logits.isfinite().all() and set(written) == {2}


def test_it_says_where_its_bytes_are(gemma3):
    cache, plain = offloaded_cache(gemma3), SinkCache.from_model(gemma3, **WINDOW)
    for each in (cache, plain):
        feed(gemma3, each, random_ids(40), [39, 1])
    assert plain.num_bytes_on_host == 0 and "host" not in repr(plain)
    slots = sum(ring.window.num_recent for ring in rings_of(cache))
    assert cache.num_bytes_on_host == slots * 2 * 8 * 4  # heads, dimensions, bytes of a float32
    assert cache.num_bytes_held == plain.num_bytes_held
    assert f"offloaded=True, tokens_seen=40, tokens_held=16, bytes_held={cache.num_bytes_held}" in repr(cache)
    assert f"bytes_on_host={cache.num_bytes_on_host})" in repr(cache)


@pytest.mark.parametrize("num_seen", [2, 10, 16, 50])
def test_offloaded_rows_come_and_go(gemma3, num_seen):
    streams = random_ids(num_seen + 40, num_rows=3)
    cache = offloaded_cache(gemma3)
    feed(gemma3, cache, streams[:, :num_seen], [num_seen])
    branch = copy.deepcopy(cache)
    feed(gemma3, branch, random_ids(30, num_rows=3), [30])
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    logits = feed(gemma3, cache, streams[[2, 0], num_seen:], [1] * 28 + [12])
    for row, before in enumerate([2, 0]):
        expected = known_oracle_logits(gemma3, streams[before][None], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, num_seen:]
        assert_same(logits[row : row + 1], expected)


@pytest.mark.parametrize("sizes", [[5], [1] * 5])
def test_roll_back_of_offloaded_rows_of_different_lengths(gemma3, sizes):
    """Past the position at which keys are turned back, too: row 1 gets there with the drafts."""
    prompts = [random_ids(length, seed=length) for length in (3, 30, 60)]
    ids, mask = left_padded(prompts)
    cache = offloaded_cache(gemma3)
    feed(gemma3, cache, ids, [50, 10], mask)
    cache.activate_past_recording()
    feed(gemma3, cache, random_ids(5, seed=77).expand(3, -1), sizes)
    cache.crop(-5)
    rest = random_ids(20, seed=3)
    logits = feed(gemma3, cache, rest.expand(3, -1), [1] * 15 + [5])
    for row, prompt in enumerate(prompts):
        expected = known_oracle_logits(gemma3, torch.cat([prompt, rest], 1), WINDOW_LENGTH, NUM_SINK_TOKENS)[:, prompt.shape[1] :]
        assert_same(logits[row : row + 1], expected)


def test_an_interrupted_pass_of_an_offloaded_window_can_be_repeated(gemma3):
    cache, ids = offloaded_cache(gemma3), random_ids(60)
    feed(gemma3, cache, ids[:, :40], [40])
    with interrupted_at(gemma3.model.layers[2]):
        feed(gemma3, cache, ids[:, 40:41], [1])
    expected = known_oracle_logits(gemma3, ids, WINDOW_LENGTH, NUM_SINK_TOKENS)[:, 40:]
    assert_same(feed(gemma3, cache, ids[:, 40:], [1] * 20), expected)


@pytest.mark.parametrize("name", OFFLOADED)
def test_generate_offloaded(gemma3, name):
    arguments = {**WINDOW, "max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    expected = generate(random_ids(30), model=gemma3, **arguments)
    outputs = generate(random_ids(30), model=gemma3, cache_implementation=name, **arguments)
    assert outputs.sequences.equal(expected.sequences)
    assert outputs.past_key_values.is_offloaded and outputs.past_key_values.num_bytes_on_host > 0


# ---- quantized

LENGTH = 32  # of a quantized window
BLOCK, RESIDUAL = 8, 6
NUM_TOKENS = 150  # four windows and more, so that positions are lowered three times
QUANTIZED_WINDOW = {"window_length": LENGTH, "num_sink_tokens": NUM_SINK_TOKENS}
OPTIONS = {"q_group_size": BLOCK, "residual_length": RESIDUAL}


def quantized_cache(model, **options) -> SinkCache:
    """Of the given backend; else of quanto, or of torch alone."""
    if "backend" in options:
        needs(options["backend"])
    elif not is_installed("quanto"):
        options = {"backend": "fp8"}
    return SinkCache.from_model(model, LENGTH, NUM_SINK_TOKENS, quantized=OPTIONS | options)


def quantized_and_back(states: torch.Tensor, by_channel: bool, backend: str, nbits: int) -> torch.Tensor:
    """One block `[1, heads, tokens, head_dim]`, by the functions of the backend alone, on the axis that has these groups."""
    block = states[0].contiguous()
    if backend == "fp8":
        groups = block.reshape(-1, BLOCK)
        scale = groups.abs().amax(1, keepdim=True) / 448
        return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).reshape(states.shape)
    if backend == "quanto":
        from optimum.quanto import MaxOptimizer, qint2, qint4
        from optimum.quanto.tensor.grouped import ungroup

        qtype, axis = qint4 if nbits == 4 else qint2, -1 if by_channel else 0
        block = block.transpose(0, 1).reshape(BLOCK, -1) if by_channel else block.reshape(-1, BLOCK)
        scale, shift = MaxOptimizer()(block, qtype, axis, BLOCK)
        codes = torch.ops.quanto.quantize_affine(block, nbits, axis, BLOCK, scale, shift)
        back = ungroup(codes * scale - shift, axis, block.shape)
    else:
        from hqq.core.quantize import Quantizer

        block = block.transpose(0, 1).reshape(BLOCK, -1) if by_channel else block.flatten(0, 1)
        codes, meta = Quantizer.quantize(
            block, axis=0 if by_channel else 1, device="cpu", compute_dtype=block.dtype, nbits=nbits, group_size=BLOCK
        )
        back = Quantizer.dequantize(codes, meta | {"compute_dtype": block.dtype})
    heads, head_dim = states.shape[1], states.shape[3]
    return back.reshape(BLOCK, heads, head_dim).transpose(0, 1)[None] if by_channel else back.reshape(states.shape)


def new_empty(cache: SinkCache, model) -> SinkCache:
    empty = cache.empty_like()
    empty.bind(model)
    assert empty.quantization == cache.quantization is not None and empty.num_tokens_seen == 0
    return empty


class Reference:
    """What a query sees of a row whose tokens came in passes: (tokens seen before, positions lowered by) of each, in order."""

    def __init__(self, cache: SinkCache, passes: list[tuple[int, int]], num_tokens: int):
        self.quantization, self.traits = cache.quantization, cache.traits
        self.known = {}
        starts = [start for start, _ in passes]
        # By pass in which a token comes: how many tokens there were before, and for each block, in which base it was quantized.
        self.start_of = [max(start for start in starts if start <= token) for token in range(num_tokens)]
        self.base_of = {}
        for (start, base), end in zip(passes, [*starts[1:], num_tokens]):
            for block in range(self.num_blocks(start), self.num_blocks(end)):
                self.base_of[block] = base

    def num_blocks(self, num_seen: int) -> int:
        return max(0, num_seen - NUM_SINK_TOKENS - RESIDUAL) // BLOCK

    def __call__(self, layer: int, token: int, stored: list) -> list:
        traits = self.traits.layers[layer]
        if traits.native_window is not None and traits.native_window <= LENGTH:
            return stored  # too short to be quantized
        seen = list(stored)
        for block in range(self.num_blocks(self.start_of[token])):
            tokens = slice(NUM_SINK_TOKENS + block * BLOCK, NUM_SINK_TOKENS + (block + 1) * BLOCK)
            if (layer, block) not in self.known:
                pairs = zip(*stored[tokens])
                axes = self.quantization.axis_key, self.quantization.axis_value
                self.known[layer, block] = [
                    self.states(torch.cat(states, 2), rotation, axis, self.base_of[block])
                    for states, rotation, axis in zip(pairs, traits.rotations, axes)
                ]
            keys, values = self.known[layer, block]
            seen[tokens] = zip(keys.split(1, dim=2), values.split(1, dim=2))
        return seen

    def states(self, states: torch.Tensor, rotation, axis: int, base: int) -> torch.Tensor:
        backend, nbits = self.quantization.backend, self.quantization.nbits
        by_channel = axis == {"quanto": -1, "hqq": 0}.get(backend, "never")
        there, here = torch.tensor([base]), torch.tensor([0])
        lowered = rotation.turn(states, rotation.angles(there, here))
        return rotation.turn(quantized_and_back(lowered, by_channel, backend, nbits), rotation.angles(here, there))


def feed_on(model, cache: SinkCache, ids, sizes, passes: list, mask=None) -> torch.Tensor:
    """Logits of the next columns of `ids`. The passes are added to those of each row, as `Reference` wants them."""
    logits, start = [], max(cache.num_tokens_seen, 0) if mask is None else 0
    for each_size in sizes:
        size = each_size[0] if isinstance(each_size, tuple) else each_size
        before = cache.num_tokens_seen_by_row if cache.is_initialized else [0] * len(ids)
        columns = slice(start, start + size)
        logits.append(feed(model, cache, ids[:, columns], [each_size], None if mask is None else mask[:, columns]))
        for row, each in enumerate(passes):
            each.append((before[row], cache.stream.base[row % len(cache.stream.base)]))
        start += size
    return torch.cat(logits, dim=1)


def assert_as_reference(model, cache: SinkCache, logits: torch.Tensor, ids: torch.Tensor, passes: list) -> None:
    """For one row, the last tokens of a stream.

    A number half-way between two codes is rounded one way or the other. That changes one code of thousands: a few tokens, by little.
    """
    seen_as = Reference(cache, passes, ids.shape[1])
    expected = oracle_logits(model, ids, LENGTH, NUM_SINK_TOKENS, seen_as=seen_as)[:, -logits.shape[1] :]
    unquantized = known_oracle_logits(model, ids, LENGTH, NUM_SINK_TOKENS)[:, -logits.shape[1] :]
    errors = (logits - expected).abs().amax(-1).flatten() / expected.std()
    effects = (unquantized - expected).abs().amax(-1).flatten() / expected.std()
    assert effects.max() > 20 * TOLERANCE, "nothing was quantized: the comparison would mean nothing"
    assert errors.quantile(0.8) <= TOLERANCE and errors.max() <= 0.3 * effects.max()


FEEDINGS = {
    "singly": [1] * NUM_TOKENS,
    "chunks": [20, 1, 1, 30, 1, 9, 40, 1, 17, 30],
    "one prompt": [110] + [1] * 40,
    "in parts": [32, (20, 4), 1, (60, 5), (16, 2), 1, (20, 10)],
}
BACKENDS = [
    {"backend": "quanto", "nbits": 4},
    {"backend": "quanto", "nbits": 2, "axis_key": -1},
    {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
    {"backend": "hqq", "nbits": 3, "axis_value": 1},
    {"backend": "fp8"},
]
IDS = ["-".join(map(str, options.values())) for options in BACKENDS]


@pytest.mark.parametrize("sizes", FEEDINGS.values(), ids=FEEDINGS)
@pytest.mark.parametrize("options", BACKENDS, ids=IDS)
def test_it_equals_the_reference(model, options, sizes):
    if sizes[0] == 1 and options["backend"] == "hqq":
        pytest.skip("slow, and no other blocks than in chunks")
    ids, cache, passes = random_ids(NUM_TOKENS), quantized_cache(model, **options), [[]]
    logits = feed_on(model, cache, ids, sizes, passes)
    assert cache.stream.base[0] > 2 * LENGTH  # positions were lowered several times
    assert_as_reference(model, cache, logits, ids, passes[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek-v3", "falcon-alibi", "bloom", "gpt-j", "mistral-long-window"])
def test_quantized_families(name):
    """Native windows, which are too short to be quantized, and longer ones; latent keys; scores by the order of keys; other rotations."""
    model, ids, passes = build_model(name), random_ids(NUM_TOKENS), [[]]
    cache = quantized_cache(model, axis_key=-1)
    sizes = [1] * NUM_TOKENS if cache.traits.is_ordered else [20, 13] + [1] * 40 + [37, 40]
    assert_as_reference(model, cache, feed_on(model, cache, ids, sizes, passes), ids, passes[0])


def test_quantized_rows_of_different_lengths(model):
    """Each row has blocks of its own, quantized when it is their turn, with positions of its own; and they travel with it."""
    lengths = (3, 30, 100)
    rows = [random_ids(length + 50, seed=length) for length in lengths]
    ids, mask = left_padded(rows)
    cache, passes = quantized_cache(model), [[], [], []]
    feed_on(model, cache, ids[:, :110], [100] + [1] * 10, passes, mask[:, :110])
    order = torch.tensor([2, 0, 1, 0])
    cache.reorder_cache(order[:3])
    cache.batch_select_indices(torch.tensor([0, 1, 2, 1]))
    passes = [list(passes[row]) for row in order]
    logits = feed_on(model, cache, ids[order][:, 110:], [1] * 30 + [10], passes, mask[order][:, 110:])
    for row, before in enumerate(order):
        assert_as_reference(model, cache, logits[row : row + 1], rows[before], passes[row])


@pytest.mark.parametrize("num_seen", [40, 62, 90])
@pytest.mark.parametrize("sizes, num_rejected", [([5], 5), ([14], 3), ([1] * 7, 6), ([3, 4], 5), ([1] * 14, 14)])
def test_roll_back_of_quantized_tokens(model, num_seen, sizes, num_rejected):
    """What was quantized for tokens that are taken back is whole again; also where positions were lowered in between (at 64)."""
    cache, passes = quantized_cache(model), [[]]
    ids, other = random_ids(num_seen + 60), random_ids(sum(sizes), seed=9)
    feed_on(model, cache, ids, [num_seen], passes)
    cache.activate_past_recording()
    num_kept = sum(sizes) - num_rejected
    drafts = torch.cat([ids[:, : num_seen + num_kept], other], dim=1)
    feed_on(model, cache, drafts, sizes, passes)
    cache.crop(-num_rejected)
    passes = [[each for each in passes[0] if each[0] < num_seen + max(num_kept, 1) and each[0] != num_seen + num_kept]]
    sizes = [1] * 40 + [20 - num_kept]
    assert_as_reference(model, cache, feed_on(model, cache, ids, sizes, passes), ids, passes[0])


def test_roll_back_without_a_record(model):
    """While all tokens are still whole none is needed; after that it is refused, also of passes too long to be recorded."""
    ids = random_ids(100)
    cache, passes = quantized_cache(model), [[]]
    feed_on(model, cache, ids, [NUM_SINK_TOKENS + RESIDUAL + BLOCK], passes)
    cache.crop(-9)
    assert_as_reference(model, cache, feed_on(model, cache, ids, [1] * 91, passes), ids, passes[0])
    cache = quantized_cache(model)
    feed_on(model, cache, ids, [20], [[]])
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    feed_on(model, cache, ids, [RESIDUAL + BLOCK + 1], [[]])
    with pytest.raises(ValueError, match=r"but for that of the last 0\."):
        cache.crop(-1)


GENERATED = {**QUANTIZED_WINDOW, "do_sample": False, "max_new_tokens": 60}
GENERATED |= {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "eos_token_id": 96}


@pytest.mark.parametrize("num_drafted", [3, 25])
def test_assisted_decoding(model, num_drafted):
    """Drafts that are right in part: what stands of each pass is as if no more had been in it. None is longer than can be taken back."""
    assistant = assistant_like(model, 0.01, num_assistant_tokens=num_drafted)
    cache, passes = quantized_cache(model), []
    note = lambda *_: passes.append((cache.num_tokens_seen, cache.stream.base[0]))  # noqa: E731
    handle = model.register_forward_pre_hook(note)
    try:
        outputs = generate(random_ids(40), model=model, past_key_values=cache, assistant_model=assistant, **GENERATED)
    finally:
        handle.remove()
    logits, text = torch.stack(outputs.logits, dim=1), outputs.sequences
    assert logits.argmax(-1).equal(text[:, 40:]) and cache.num_tokens_seen == text.shape[1] - 1
    lengths = {after - before for (before, _), (after, _) in zip(passes[2:], passes[3:])}
    assert len(lengths) > 1, "drafts were all right, or all wrong"
    assert_as_reference(model, cache, logits, text[:, :-1], passes)
    rest = random_ids(40, seed=3)
    more = feed_on(model, cache, torch.cat([text[:, :-1], rest], dim=1), [1] * 40, [passes])
    assert_as_reference(model, cache, more, torch.cat([text[:, :-1], rest], dim=1), passes)


def test_beams(model):
    """The score of each text that is returned is what it has in a cache of its own, fed alike."""
    cache, prompt = quantized_cache(model), random_ids(40)
    outputs = generate(prompt, model=model, past_key_values=cache, num_beams=4, num_return_sequences=3, **GENERATED)
    assert outputs.sequences.shape == (3, 100) and cache.num_tokens_seen == 39
    for text, score in zip(outputs.sequences, outputs.sequences_scores):
        logits = feed(model, new_empty(cache, model), text[None, :-1], [32, 7] + [1] * 60)
        scores = logits[0, 39:].log_softmax(-1).gather(1, text[40:, None])
        torch.testing.assert_close(score, scores.mean(), rtol=1e-4, atol=1e-4)


def test_guidance(model):
    """The second text has a window that is quantized in the same way."""
    cache, prompt, negative = quantized_cache(model), random_ids(40), random_ids(50, seed=2)
    passes = {}  # of each cache

    def note(_, args, kwargs):
        passes.setdefault(id(kwargs[CACHE_NAME]), []).append((kwargs["input_ids"].numel(), len(kwargs["input_ids"])))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        outputs = generate(
            prompt, model=model, past_key_values=cache, guidance_scale=1.5, negative_prompt_ids=negative, **GENERATED
        )
    finally:
        handle.remove()
    new = outputs.sequences[:, 40:-1]
    first, second = (
        feed(model, new_empty(cache, model), torch.cat([text, new], 1), passes.pop(key))[:, -60:].log_softmax(-1)
        for text, key in ((prompt, id(cache)), (negative, next(key for key in passes if key != id(cache))))
    )
    assert_same(torch.stack(outputs.scores, dim=1), second + 1.5 * (first - second))


def test_each_block_is_quantized_once(model, monkeypatch):
    """Whatever happens to positions: what is held of it stays as it is, to the bit."""
    cache, blocks, quantize = quantized_cache(model), [], Quantization.quantize
    monkeypatch.setattr(
        Quantization, "quantize", lambda self, states, *args: blocks.append(len(states)) or quantize(self, states, *args)
    )
    snapshots = []
    for token in range(NUM_TOKENS):
        feed(model, cache, random_ids(1, seed=token), [1])
        ring = cache.layers[0].rings[0]
        snapshots.append((ring.quantization.num_blocks(token + 1 - NUM_SINK_TOKENS), ring.blocks[0].clone()))
    num_blocks, max_blocks = snapshots[-1][0], ring.blocks[0].shape[2]
    assert sum(blocks) == num_blocks * 2 * len(cache.layers) and cache.stream.base[0] > 2 * LENGTH
    for (before, old), (after, new) in zip(snapshots, snapshots[1:]):
        for block in range(max(0, after - max_blocks), before):
            slot = block % max_blocks
            assert new[:, :, slot].equal(old[:, :, slot])


def test_a_deep_copy_goes_on_by_itself(model):
    ids, cache, passes = random_ids(NUM_TOKENS), quantized_cache(model), [[]]
    feed_on(model, cache, ids, [70], passes)
    feed(model, copy.deepcopy(cache), random_ids(60, seed=8), [30] * 2)
    assert_as_reference(model, cache, feed_on(model, cache, ids, [1] * 60 + [20], passes), ids, passes[0])


def test_an_interrupted_pass_of_a_quantized_window(model):
    """Over one token, at which a block is quantized, it can be repeated; over several it can't: they took the room of others, also
    while the window is filling."""
    ids, cache, passes = random_ids(100), quantized_cache(model), [[]]
    feed_on(model, cache, ids, [18], passes)
    branch = copy.deepcopy(cache)
    with interrupted_at(model.model.layers[2]):
        feed(model, branch, ids[:, 18:30], [12])
    with pytest.raises(ValueError, match="can.t be repeated"):
        branch.prepare(ids[:, 18:19])
    num_seen = NUM_SINK_TOKENS + RESIDUAL + 7 * BLOCK - 1
    feed_on(model, cache, ids, [num_seen - 18], passes)
    with interrupted_at(model.model.layers[2]):
        feed(model, cache, ids[:, num_seen : num_seen + 1], [1])
    assert_as_reference(model, cache, feed_on(model, cache, ids, [1] * 35, passes), ids, passes[0])


def test_what_it_holds_is_bounded_and_counted(model):
    """Of the four windows' tokens, no more than two blocks beyond one; and each byte of codes, scales and offsets."""
    cache, sizes = quantized_cache(model), set()
    for token in range(NUM_TOKENS):
        feed(model, cache, random_ids(1, seed=token), [1])
        if token > 2 * LENGTH:
            sizes.add(cache.num_bytes_held)
    keys = [layer.rings[0] for layer in cache.layers]
    num_whole, num_blocks = keys[0].recent.shape[2], keys[0].blocks[0].shape[2]
    assert num_whole + num_blocks * BLOCK < LENGTH - NUM_SINK_TOKENS + 2 * BLOCK
    assert len(sizes) == 1, "what a pass had to know is let go"
    layers, heads, head_dim = len(cache.layers), 2, 8
    group = BLOCK + 4 if cache.quantization.backend == "fp8" else BLOCK // 2 + 4 + 4
    blocks = layers * heads * num_blocks * head_dim * group
    whole = layers * heads * num_whole * head_dim * 4
    assert sum(part.nbytes for ring in keys for part in ring.blocks[:3]) == blocks
    assert 2 * (blocks + whole) < min(sizes)
    window, held = 1024, []
    for quantized in (None, {"q_group_size": 32, "residual_length": 32, "backend": "fp8"}):
        cache = SinkCache.from_model(model, window, 4, quantized=quantized)
        feed(model, cache, random_ids(1100), [1000, 100])
        held.append(cache.num_bytes_held)
    # Of float32, a quarter for codes and a little for scales; but for 64 tokens, which are as they came.
    assert held[1] < 0.45 * held[0]


def test_generate_quantized(model):
    """By the names of transformers, and the same text as from a loop of one's own."""
    needs("quanto")
    options = {"backend": "quanto", "nbits": 2, **OPTIONS}
    arguments = {**QUANTIZED_WINDOW, "do_sample": False, "max_new_tokens": 60}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    prompt, passes = random_ids(40), [[]]
    outputs = generate(prompt, model=model, cache_implementation="quantized", cache_config=options, **arguments)
    config = copy.deepcopy(model.generation_config)
    config.cache_implementation, config.cache_config = "quantized", options
    again = generate(prompt, config, model=model, **arguments)
    assert outputs.sequences.equal(again.sequences)
    cache = quantized_cache(model, nbits=2)
    assert cache.quantization == outputs.past_key_values.quantization
    text = outputs.sequences[:, :-1]
    logits = feed_on(model, cache, text, [32, 8] + [1] * 59, passes)
    assert_same(torch.stack(outputs.logits, dim=1), logits[:, 39:])
    assert "quantized='quanto', nbits=2, tokens_seen" in repr(outputs.past_key_values)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backend": "awq"}, "backend='awq' does not quantize caches. Use one of quanto, hqq, fp8"),
        ({"backend": None, "nbits": 8}, "nbits=8 can't be used with backend='quanto'. Use one of 2, 4"),
        ({"backend": "fp8", "nbits": 8}, "nbits=8 can't be used with backend='fp8'. Leave it out"),
        ({"axis_key": 1}, "axis_key=1 can't be used with backend='quanto'. Use one of 0, -1"),
        ({"backend": "hqq", "axis_value": -1}, "axis_value=-1 can't be used with backend='hqq'. Use one of 0, 1"),
        ({"q_group_size": 12}, "q_group_size must be a positive multiple of 8, got 12"),
        ({"q_group_size": 0}, "q_group_size must be a positive multiple of 8, got 0"),
        ({"residual_length": -1}, "residual_length must be an int of at least 0, got -1"),
        ({"bits": 4}, "cache_config has no option bits. It takes backend, nbits, axis_key,"),
        ({"backend": "fp8"}, "window_length=32 with num_sink_tokens=4 leaves nothing to quantize: residual_length=128"),
        (4, r"cache_config \(quantized= of a SinkCache\) must be a dict, got 4 \(int\)"),
    ],
)
def test_options_that_are_refused(model, options, message):
    numbers = QUANTIZED_WINDOW
    for call in (
        lambda: SinkCache.from_model(model, quantized=options, **numbers),
        lambda: generate(random_ids(5), model=model, cache_implementation="quantized", cache_config=options, **numbers),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    for backend, package in (("quanto", "optimum-quanto"), ("hqq", "hqq")):
        with pytest.raises(ImportError, match=f"pip install {package}"):
            SinkCache(quantized={"backend": backend})
    SinkCache(quantized={"backend": "fp8"})


def test_what_does_not_go_together(model):
    numbers = QUANTIZED_WINDOW
    options = OPTIONS | {"backend": "fp8"}
    for modes in (
        {"static": True, "offloaded": True},
        {"static": True, "quantized": options},
        {"offloaded": True, "quantized": options},
    ):
        with pytest.raises(ValueError, match="can't be .* at once"):
            SinkCache(**numbers, **modes)
    with pytest.raises(ValueError, match='Add cache_implementation="quantized", or leave it out'):
        generate(random_ids(5), model=model, cache_config=options, **numbers)
    plain, quantized = SinkCache.from_model(model, **numbers), SinkCache.from_model(model, quantized=options, **numbers)
    for cache, asked, message in (
        (plain, {"cache_implementation": "quantized"}, "is not quantized.*made with quantized="),
        (quantized, {"cache_implementation": "offloaded"}, "is not offloaded.*made with offloaded=True"),
        (
            quantized,
            {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
            "cache_config=.*was made with Quant",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            generate(random_ids(5), model=model, past_key_values=cache, **asked)
    generate(random_ids(5), model=model, past_key_values=quantized, cache_implementation="quantized", max_new_tokens=2)
    assert quantized.num_tokens_seen == 6
