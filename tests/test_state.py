"""A cache on disk, of every kind of window: what goes on from a file gets the same logits, to the last bit, as what was never stopped.

Files that hold something else are refused. (A checksum is not among what a file has: what a disk has changed in a key is not found.)
"""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checks import (
    NUM_SINK_TOKENS,
    WINDOW,
    WINDOW_LENGTH,
    assert_same,
    build_recurrent_model,
    feed,
    left_padded,
    move_ahead,
    needs,
    random_ids,
)
from custom_generate.generate import SinkCache, generate
from custom_generate.stream import Stream
from families import build_model

ROOT = Path(__file__).parents[1]
REST = 5 * WINDOW_LENGTH
# Beyond single tokens: passes over a full window, with copies of the sinks, and a re-base in the middle.
SIZES = [1] * 20 + [9] + [1] * 3 + [20] + [1] * (REST - 52)


def assert_goes_on_alike(model, cache: SinkCache, path: Path, sizes=SIZES) -> None:
    """The cache itself goes on after it was saved, and is the reference."""
    cache.save(path)
    loaded = SinkCache.load(path, model)
    assert loaded.num_tokens_seen_by_row == cache.num_tokens_seen_by_row
    assert loaded.positions == cache.positions and loaded.unseen_token_ids == cache.unseen_token_ids
    for row in range(cache.batch_size):
        known, expected = loaded.known_token_ids(row), cache.known_token_ids(row)
        assert [ids.tolist() for ids in known] == [ids.tolist() for ids in expected]
    rest = random_ids(sum(sizes), seed=9, num_rows=cache.batch_size)
    expected = feed(model, cache, rest, sizes)
    assert expected.std() > 0.05
    assert torch.equal(feed(model, loaded, rest, sizes), expected)
    assert repr(loaded) == repr(cache) or cache.stream.is_recording  # which a loaded one never is
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing is left beside it"


# Before the sinks are complete, filling, at the edge, past it, right before a re-base and right after (the tokens of 2 windows).
@pytest.mark.parametrize("num_seen", [2, 10, 15, 16, 17, 31, 32, 33, 50])
def test_it_goes_on_with_the_same_bits(tmp_path, num_seen):
    model = build_model("llama", "sdpa")
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, random_ids(num_seen), [1] * num_seen)
    assert cache.stream.base == [{33: 16, 50: 32}.get(num_seen, 0)]
    assert_goes_on_alike(model, cache, tmp_path / "cache")


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("qwen2-half-sliding", torch.float32),
        ("gemma3", torch.bfloat16),
        ("mistral-short-window", torch.float32),
        ("gpt-j", torch.float32),
        ("deepseek-v3", torch.float32),  # latent attention: what moves is in the values
        ("bloom", torch.float32),
        ("llama-dynamic", torch.float32),
    ],
)
def test_every_kind_of_model(tmp_path, name, dtype):
    if dtype == torch.float16 and Version(torch.__version__) < Version("2.2"):
        pytest.skip("this torch can't multiply float16 on a CPU")
    model = build_model(name, dtype=dtype)
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, random_ids(40), [16] + [1] * 24)
    if name != "llama-dynamic":
        move_ahead(cache, 10**6 // 192 * 192)
        assert cache.num_tokens_seen > 999_000
    assert_goes_on_alike(model, cache, tmp_path / "cache", [1] * REST if name == "bloom" else SIZES)


def test_after_a_roll_back_to_before_positions_were_lowered(tmp_path):
    """Positions are then counted from a token that is yet to come."""
    model = build_model("llama")
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, random_ids(45), [1] * 45)
    cache.activate_past_recording()
    feed(model, cache, random_ids(25, seed=8), [1] * 25)
    cache.crop(-25)
    assert cache.stream.base[0] > cache.num_tokens_seen == 45
    assert_goes_on_alike(model, cache, tmp_path / "cache")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "bamba", "falcon_h1"])
def test_recurrent_states(tmp_path, model_type, static):
    model = build_recurrent_model(model_type, "5.14")  # before, some fail on padded batches
    cache = SinkCache.from_model(model, **WINDOW, static=static)
    ids, mask = left_padded([random_ids(length, seed=length) for length in (40, 13)])
    feed(model, cache, ids, [40], mask)
    assert_goes_on_alike(model, cache, tmp_path / "cache")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_of_different_lengths(tmp_path, name, static):
    model = build_model(name, "sdpa")
    cache = SinkCache.from_model(model, **WINDOW, static=static)
    ids, mask = left_padded([random_ids(length, seed=length) for length in (60, 3, 19)])
    feed(model, cache, ids, [60], mask)
    feed(model, cache, random_ids(5, num_rows=3), [1] * 5)
    assert_goes_on_alike(model, cache, tmp_path / "cache")


@pytest.mark.parametrize("num_seen", [3, 40])
def test_the_static_mode(tmp_path, num_seen):
    model = build_model("llama", "sdpa")
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    feed(model, cache, random_ids(num_seen), [1] * num_seen)
    assert_goes_on_alike(model, cache, tmp_path / "cache")


def test_after_every_operation(tmp_path):
    """Rows that came and went, drafts that were rolled back, and text of before a reset that is still in the slots."""
    model = build_model("qwen3", "sdpa")
    cache = SinkCache.from_model(model, **WINDOW, static=True)
    feed(model, cache, random_ids(50), [50])
    cache.reset()
    feed(model, cache, random_ids(20, num_rows=2), [20])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.activate_past_recording()
    feed(model, cache, random_ids(4, num_rows=4), [4])
    cache.crop(-3)
    for layer in cache.layers:
        layer.record_past = False
    assert_goes_on_alike(model, cache, tmp_path / "cache")


def test_a_path_in_bytes(tmp_path, model):
    cache = SinkCache.from_model(model, 16, 4)
    feed(model, cache, random_ids(20), [20])
    cache.save(os.fsencode(tmp_path / "cache"))
    assert os.listdir(tmp_path) == ["cache"]
    assert SinkCache.load(os.fsencode(tmp_path / "cache"), model).num_tokens_seen == 20


def test_a_cache_that_has_seen_nothing(tmp_path):
    model = build_model("llama")
    SinkCache.from_model(model, **WINDOW).save(tmp_path / "cache")
    loaded = SinkCache.load(tmp_path / "cache", model)
    ids = random_ids(40)
    assert torch.equal(feed(model, loaded, ids, [40]), feed(model, SinkCache.from_model(model, **WINDOW), ids, [40]))


GO_ON = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from checks import feed, random_ids
from families import build_model
from custom_generate.generate import SinkCache
model = build_model("llama", "sdpa", dtype=torch.bfloat16)
torch.save(feed(model, SinkCache.load({path!r}, model), random_ids(80, seed=9), {sizes!r}), {result!r})
"""


def test_another_process(tmp_path):
    model = build_model("llama", "sdpa", dtype=torch.bfloat16)
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, random_ids(40), [40])
    move_ahead(cache, 10**6 // 192 * 192)
    path, result = str(tmp_path / "cache"), str(tmp_path / "logits")
    cache.save(path)
    paths = [str(ROOT), str(ROOT / "tests")]
    code = GO_ON.format(paths=paths, path=path, sizes=SIZES, result=result)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert torch.equal(torch.load(result), feed(model, cache, random_ids(80, seed=9), SIZES))


def test_generate_goes_on_with_a_conversation(tmp_path):
    """By only what is new, by the last window, or by all: what was seen and what was returned last is still known."""
    model = build_model("llama", "sdpa")
    first = generate(random_ids(30), model=model, max_new_tokens=50, return_dict_in_generate=True, **WINDOW)
    cache, text = first.past_key_values, torch.cat([first.sequences, random_ids(7)], 1)
    cache.save(tmp_path / "cache")
    expected = generate(text, model=model, past_key_values=cache, max_new_tokens=20)[:, -20:]
    for shown in (text, text[:, -WINDOW_LENGTH:], text[:, 79:]):
        loaded = SinkCache.load(tmp_path / "cache", model)
        assert loaded.unseen_token_ids == text[:, 79].tolist()
        mask = torch.ones(1, 87, dtype=torch.long) if shown.shape[1] == 8 else None
        options = {"attention_mask": mask, "past_key_values": loaded, "max_new_tokens": 20}
        assert generate(shown, model=model, **options)[:, -20:].equal(expected)
    wrong = text.clone()
    wrong[0, 75] += 1
    with pytest.raises(ValueError, match="first difference is at token 75"):
        generate(wrong, model=model, past_key_values=SinkCache.load(tmp_path / "cache", model))


# What is refused


@pytest.fixture(scope="module")
def content(model, tmp_path_factory) -> bytes:
    cache = SinkCache.from_model(model, window_length=8, num_sink_tokens=2)
    feed(model, cache, random_ids(20), [20])
    path = tmp_path_factory.mktemp("saved") / "cache"
    cache.save(path)
    return path.read_bytes()


def test_a_file_that_was_cut_off_is_refused(model, content, tmp_path):
    """By a disk that was full, at any place; and a file to which something was added."""
    path = tmp_path / "cache"
    path.write_bytes(content)
    SinkCache.load(path, model)
    for length in (0, 5, 8, 20, 500, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"Can't load '.*cache' as a SinkCache: it was cut off"):
            SinkCache.load(path, model)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="Can't load"):
        SinkCache.load(path, model)


def test_a_header_that_was_changed_says_something_else_or_is_refused(model, content, tmp_path):
    """With the bits that json forgives most easily: either it is refused as what it is, or it is as good a file as any."""
    path, refused = tmp_path / "cache", 0
    header = 8 + int.from_bytes(content[:8], "little")
    for place in range(0, header, 7):
        for flip in (1, 32):
            path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            try:
                SinkCache.load(path, model)
            except ValueError:
                refused += 1
    assert refused > 100


def forged(content: bytes, path: Path, change) -> Path:
    """A file in which somebody has changed some tensors and numbers."""
    path.write_bytes(content)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        numbers = json.loads(file.metadata()["sink_cache"])
    change(numbers, tensors)
    save_file(tensors, path, metadata={"sink_cache": json.dumps(numbers)})
    return path


def set_to(*names_and_value):
    *names, last, value = names_and_value

    def change(numbers, tensors):
        for name in names:
            numbers = numbers[name]
        numbers[last] = value

    return change


def hold_a_million(numbers, tensors):
    numbers["arguments"]["window_length"], numbers["num_seen"] = 10**6, [10**6]


def widen(numbers, tensors):
    tensors["layers.1.keys.slots"] = torch.zeros(2, 2, 8, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (set_to("format", 3), "it has format 3, and this code reads format 2. Update sink_cache"),
        (set_to("batch_size", 10**12), r"\[1, 2, 8, 8\] in the file, and torch.float32 \[1000000000000, 2, 8, 8\] here"),
        (set_to("batch_size", "1"), "can't be"),
        (
            set_to("arguments", "window_length", 10**12),
            "can't keep its rules for LlamaForCausalLM with window_length=1000000000000",
        ),
        (set_to("arguments", "window_length", 1000), r"\[1, 2, 8, 8\] in the file, and torch.float32 \[1, 2, 20, 8\] here"),
        (set_to("arguments", "window_length", 4), r"\[1, 2, 8, 8\] in the file, and torch.float32 \[1, 2, 4, 8\] here"),
        (set_to("arguments", "window_length", "8"), "window_length must be an int"),
        (set_to("arguments", "num_sink_tokens", 8), "num_sink_tokens must be less than window_length=8, got 8"),
        (hold_a_million, r"\[1, 2, 8, 8\] in the file, and torch.float32 \[1, 2, 1000000, 8\] here"),
        (set_to("num_seen", [5, 6]), "can't be"),
        (set_to("num_seen", [-5]), "can't be"),
        (set_to("num_seen", [0]), "can't be"),
        (set_to("batch_size", -1), "can't be"),
        (set_to("num_seen", 5), "can't be"),
        (set_to("base", [-1]), "can't be"),
        (set_to("unseen_token_ids", [1, 2]), "can't be"),
        (set_to("unseen_token_ids", []), "can't be"),
        (set_to("model", None), "model can't be None"),
        (set_to("arguments", []), r"arguments can't be \[\]"),
        (lambda numbers, tensors: numbers.pop("model"), "does not say model"),
        (lambda numbers, tensors: numbers.pop("num_seen"), "does not say num_seen"),
        (lambda numbers, tensors: tensors.pop("layers.1.values.slots"), "it has no layers.1.values.slots"),
        (lambda numbers, tensors: tensors.pop("ids.slots"), "it has no ids.slots"),
        (lambda numbers, tensors: tensors.update(more=torch.zeros(1)), "it has more, and this model has nothing of that kind"),
        (widen, r"layers.1.keys.slots is torch.float32 \[2, 2, 8, 8\] in the file, and torch.float32 \[1, 2, 8, 8\] here"),
    ],
)
def test_a_forged_file_asks_for_nothing(model, content, tmp_path, change, message):
    """Only what is checked stands between the file and our memory."""
    with pytest.raises(ValueError, match=message):
        SinkCache.load(forged(content, tmp_path / "cache", change), model)
    assert SinkCache.load(forged(content, tmp_path / "cache", lambda numbers, tensors: None), model).num_tokens_seen == 20


def claim_a_million_and_bring_as_many_bytes(numbers, tensors):
    hold_a_million(numbers, tensors)
    tensors["more"] = torch.zeros(1, 10**6, dtype=torch.uint8)


def claim_rows_that_take_no_bytes(numbers, tensors):
    """A shape with a 0 in it costs nothing in a file, however many rows it says."""
    numbers["batch_size"], numbers["num_seen"], numbers["base"] = 10**12, [0], [0]
    for name in [name for name in tensors if not name.endswith("rotation")]:
        tensors[name] = torch.zeros(10**12, 2, 0, 8)


def claim_a_static_window(numbers, tensors):
    """All its slots are allocated at once."""
    numbers["arguments"] |= {"static": True, "window_length": 10**6}
    for name in [name for name in tensors if name.endswith("slots")]:
        tensors[name] = torch.zeros(1, *tensors[name].shape[1:2], 20, tensors[name].shape[3], dtype=tensors[name].dtype)


def claim_many_sinks(numbers, tensors):
    claim_a_static_window(numbers, tensors)
    numbers["arguments"] |= {"static": False, "num_sink_tokens": 10**6 - 1}


@pytest.mark.parametrize(
    "change",
    [
        set_to("batch_size", 10**12),
        hold_a_million,
        claim_a_million_and_bring_as_many_bytes,
        claim_rows_that_take_no_bytes,
        claim_a_static_window,
        claim_many_sinks,
    ],
)
def test_numbers_that_a_file_only_claims_cost_no_memory(model, content, tmp_path, monkeypatch, change):
    """The file is refused before there is room for a single row: a cache is made with none."""
    path = forged(content, tmp_path / "cache", change)
    SinkCache.from_model(model, 8, 2)  # looked at before
    allocate, num_rows = Stream.allocate, []
    monkeypatch.setattr(Stream, "allocate", lambda self, num: num_rows.append(num) or allocate(self, num))
    with pytest.raises(ValueError, match="Can't load"):
        SinkCache.load(path, model)
    assert set(num_rows) == {0}


def test_a_file_of_another_kind_is_refused(model, tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "weights")
    (tmp_path / "pickled").write_bytes(pickle.dumps({"a": 1}))
    for name, message in (
        ("weights", "a safetensors file that SinkCache.save has not written"),
        ("pickled", "no safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            SinkCache.load(tmp_path / name, model)
    with pytest.raises(FileNotFoundError):
        SinkCache.load(tmp_path / "nothing", model)


def test_a_file_of_the_first_version_says_what_to_do(model, tmp_path):
    """Its metadata begin with a checksum of 64 digits."""
    numbers = {"format": 1, "window_length": 8, "num_sink_tokens": 2}
    save_file({"layers.0.keys.slots": torch.zeros(1, 2, 8, 8)}, tmp_path / "old", {"sink_cache": "0a" * 32 + json.dumps(numbers)})
    with pytest.raises(ValueError, match='it has format 1. Load it with the version .* that wrote it, revision="v1"'):
        SinkCache.load(tmp_path / "old", model)


def other_rotation():
    other = build_model("llama", "sdpa")
    other.model.rotary_emb.inv_freq *= 0.5
    return other


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: build_model("llama", "sdpa", dtype=torch.bfloat16),
            "dtype is 'torch.float32' in the file, and 'torch.bfloat16' here",
        ),
        (lambda: build_model("qwen2", "sdpa"), "model_type is 'llama' in the file, and 'qwen2' here"),
        (lambda: build_model("llama", "sdpa", num_key_value_heads=4), "num_key_value_heads is 2 in the file, and 4 here"),
        (lambda: build_model("llama", "sdpa", num_hidden_layers=2), "num_hidden_layers is 3 in the file, and 2 here"),
        (lambda: build_model("llama", "sdpa", rms_norm_eps=0.1), "rms_norm_eps is 1e-06 in the file, and 0.1 here"),
        (other_rotation, "by .* a position in the file, and with .* by .* in this model"),
    ],
)
def test_a_cache_of_another_model_is_refused(content, tmp_path, make, message):
    (tmp_path / "cache").write_bytes(content)
    with pytest.raises(ValueError, match=f"Can't load .* as a SinkCache: it was .*made for another model: .*{message}"):
        SinkCache.load(tmp_path / "cache", make())


def test_another_window_than_expected_is_refused(model, content, tmp_path):
    (tmp_path / "cache").write_bytes(content)
    assert SinkCache.load(tmp_path / "cache", model, window_length=8, num_sink_tokens=2).num_tokens_seen == 20
    with pytest.raises(ValueError, match="window_length is 8 in the file, and 16 was asked for"):
        SinkCache.load(tmp_path / "cache", model, window_length=16)
    with pytest.raises(ValueError, match="num_sink_tokens is 2 in the file, and 0 was asked for"):
        SinkCache.load(tmp_path / "cache", model, num_sink_tokens=0)


def test_saving_in_the_middle_of_a_pass_is_refused(model, tmp_path):
    cache = SinkCache.from_model(model, **WINDOW)
    with pytest.raises(ValueError, match="does not know how the model moves keys"):
        SinkCache().save(tmp_path / "cache")
    for static in (False, True):
        cache = SinkCache.from_model(model, **WINDOW, static=static)
        feed(model, cache, random_ids(40), [40])
        inputs = cache.prepare(random_ids(1))
        with pytest.raises(ValueError, match="middle of a pass"):
            cache.save(tmp_path / "cache")
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: cache.save(tmp_path / "cache"))
        with pytest.raises(ValueError, match="middle of a pass"), torch.no_grad():
            model(**inputs)
        hook.remove()
        feed(model, cache, random_ids(1), [1])
        assert not any(tmp_path.iterdir())
        assert_goes_on_alike(model, cache, tmp_path / "cache")
        (tmp_path / "cache").unlink()


def test_a_stream_that_was_interrupted_can_be_saved(model, tmp_path):
    """Ctrl-C in the middle of a token: `generate` ends, and the token counts as not seen."""
    for options in ({}, {"cache_implementation": "static"}):
        cache, calls = SinkCache(**WINDOW, static=bool(options)), []

        def interrupt(*_):
            calls.append(1)
            if len(calls) == 45:
                raise KeyboardInterrupt

        SinkCache.from_model(model, **WINDOW)  # looked at before: those passes do not count
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(random_ids(10), model=model, past_key_values=cache, max_new_tokens=100, **options)
        hook.remove()
        assert cache.num_tokens_seen == 10 + 43
        assert_goes_on_alike(model, cache, tmp_path / "cache")


def test_writing_is_all_or_nothing(model, content, tmp_path, monkeypatch):
    path = tmp_path / "cache"
    path.write_bytes(content)
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, random_ids(20), [20])
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            cache.save(path)
        assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]
    cache.save(path)
    with pytest.raises(IsADirectoryError, match="it is a folder. Name a file in it"):
        cache.save(tmp_path)
    assert SinkCache.load(path, model).window_length == WINDOW_LENGTH and [*tmp_path.iterdir()] == [path]


def test_what_is_flushed_was_opened_for_writing(model, tmp_path, monkeypatch):
    """On Windows, only such a file can be flushed to the disk."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.write(getattr(file, "fileno", lambda: file)(), b"")))
    SinkCache.from_model(model, **WINDOW).save(tmp_path / "cache")
    assert flushed == [0] and SinkCache.load(tmp_path / "cache", model).num_tokens_seen == 0


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy])
def test_pickling_points_to_save(model, how):
    with pytest.raises(TypeError, match=r"can't be pickled.*cache.save\(path\) and SinkCache.load\(path, model\).*copy.deepcopy"):
        how(SinkCache.from_model(model, **WINDOW))


# Quantized and offloaded windows


BLOCK, RESIDUAL = 8, 2
FP8 = {"backend": "fp8", "q_group_size": BLOCK, "residual_length": RESIDUAL}
BACKENDS = {
    "fp8": FP8,
    "quanto": FP8 | {"backend": "quanto", "nbits": 2, "axis_key": -1},
    "hqq": FP8 | {"backend": "hqq", "nbits": 3, "axis_value": 1},
}
MODES = [*BACKENDS, "offloaded"]
SHORTER_SIZES = (
    [1] * 20 + [9] + [1] * 3 + [20] + [1] * 28
)  # five windows: past single tokens, passes over a full one, re-bases in the middle


@pytest.fixture(scope="module")
def gemma3():
    """Two of four layers have native windows, which are too short to be quantized."""
    return build_model("gemma3", "sdpa")


@pytest.fixture(scope="module")
def qwen3():
    return build_model("qwen3", "sdpa")


def kept_cache(model, mode: str, **numbers) -> SinkCache:
    if mode in BACKENDS:
        needs(mode)
    return SinkCache.from_model(model, **WINDOW | numbers, quantized=BACKENDS.get(mode), offloaded=mode == "offloaded")


# Before the sinks are complete; right before a block is quantized and after; before positions are lowered and after.
@pytest.mark.parametrize("num_seen", [2, 13, 14, 32, 33, 38, 50])
@pytest.mark.parametrize("mode", ["fp8", "quanto", "offloaded"])
def test_every_kind_of_window_goes_on_with_the_same_bits(qwen3, tmp_path, mode, num_seen):
    cache = kept_cache(qwen3, mode)
    feed(qwen3, cache, random_ids(num_seen), [1] * num_seen)
    if mode != "offloaded":
        keys = cache.layers[0].rings[0]
        num_blocks = keys.quantization.num_blocks(num_seen - NUM_SINK_TOKENS)
        assert num_blocks == {2: 0, 13: 0, 14: 1, 32: 3, 33: 3, 38: 4, 50: 5}[num_seen]
        assert bool(keys.blocks[3].any()) == (num_seen in (33, 38, 50))  # blocks that are rotated when they are read
    assert_goes_on_alike(qwen3, cache, tmp_path / "cache", SHORTER_SIZES)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_different_lengths_in_every_kind_of_window(gemma3, tmp_path, mode):
    """Some layers have native windows, too short to be quantized; each row was lowered by other amounts."""
    cache = kept_cache(gemma3, mode)
    ids, mask = left_padded([random_ids(length, seed=length) for length in (60, 3, 29)])
    feed(gemma3, cache, ids, [60], mask)
    feed(gemma3, cache, random_ids(5, num_rows=3), [1] * 5)
    assert len(cache.stream.base) == 3
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    sizes = [1] * 4 + [9] + [1] * 3 + [20] + [1] * 4 if mode == "hqq" else SHORTER_SIZES  # slow
    assert_goes_on_alike(gemma3, cache, tmp_path / "cache", sizes)


@pytest.mark.parametrize("mode", ["fp8", "offloaded"])
@pytest.mark.parametrize(
    "name, dtype, numbers",
    [
        ("llama", torch.bfloat16, {}),
        ("deepseek-v3", torch.float32, {}),
        ("bloom", torch.float32, {}),
        ("gpt-j", torch.float32, {"num_sink_tokens": 0}),
    ],
)
def test_every_kind_of_model_in_every_kind_of_window(tmp_path, name, dtype, numbers, mode):
    model = build_model(name, dtype=dtype)
    cache = kept_cache(model, mode, **numbers)
    feed(model, cache, random_ids(40), [16] + [1] * 24)
    assert_goes_on_alike(model, cache, tmp_path / "cache", [1] * 60 if name == "bloom" else SHORTER_SIZES)


@pytest.mark.parametrize("mode", ["fp8", "offloaded"])
def test_after_a_roll_back_and_from_a_file_of_a_file(qwen3, tmp_path, mode):
    """Drafts past the edge at which positions are lowered, and at which a block is quantized, are taken back; what is loaded is saved."""
    cache = kept_cache(qwen3, mode)
    feed(qwen3, cache, random_ids(29), [29])
    cache.activate_past_recording()
    feed(qwen3, cache, random_ids(6, seed=4), [1] * 6)
    cache.crop(-5)
    cache.activate_past_recording(False)
    cache.save(tmp_path / "first")
    with torch.inference_mode():
        loaded = SinkCache.load(tmp_path / "first", qwen3)
    (tmp_path / "first").unlink()
    ids = random_ids(5, seed=5)
    assert feed(qwen3, loaded, ids, [1] * 5).equal(feed(qwen3, cache, ids, [1] * 5))
    assert_goes_on_alike(qwen3, loaded, tmp_path / "cache", SHORTER_SIZES)


def test_another_kind_than_expected_is_refused(qwen3, tmp_path):
    for mode in ("fp8", "offloaded"):
        cache = kept_cache(qwen3, mode)
        feed(qwen3, cache, random_ids(40), [40])
        cache.save(tmp_path / mode)
        options = {"quantized": FP8, "offloaded": False} if mode == "fp8" else {"offloaded": True}
        loaded = SinkCache.load(tmp_path / mode, qwen3, static=False, **options)
        assert loaded.quantization == cache.quantization and loaded.is_offloaded == cache.is_offloaded
    for mode, options, message in (
        (
            "fp8",
            {"quantized": FP8 | {"residual_length": 1}},
            "quantized is .*'residual_length': 2.* in the file, and .*'residual_length': 1",
        ),
        ("fp8", {"offloaded": True}, "offloaded is False in the file, and True was asked for"),
        ("fp8", {"static": True}, "static is False in the file, and True was asked for"),
        ("offloaded", {"quantized": FP8}, "quantized is None in the file, and .*'fp8'.* was asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            SinkCache.load(tmp_path / mode, qwen3, **options)


@pytest.fixture(scope="module")
def contents(qwen3, tmp_path_factory) -> dict[str, bytes]:
    contents, path = {}, tmp_path_factory.mktemp("saved") / "cache"
    for mode in ("fp8", "offloaded"):
        cache = kept_cache(qwen3, mode)
        feed(qwen3, cache, random_ids(40), [40])
        cache.save(path)
        contents[mode] = path.read_bytes()
    return contents


def replace(name: str, *shape: int, dtype: torch.dtype):
    return lambda numbers, tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    "mode, change, message",
    [
        ("fp8", set_to("batch_size", 10**12), r"\[1, 2, 4, 8\] in the file, and torch.float32 \[1000000000000, 2, 4, 8\] here"),
        ("fp8", set_to("arguments", "quantized", None), r"\[1, 2, 4, 8\] in the file, and torch.float32 \[1, 2, 16, 8\] here"),
        ("fp8", set_to("arguments", "quantized", 3), "must be a dict"),
        ("fp8", set_to("arguments", "quantized", "backend", ["fp8"]), "does not quantize caches"),
        ("fp8", set_to("arguments", "quantized", "nbits", 4.0), "nbits=4.0 can't be used"),
        ("fp8", set_to("arguments", "quantized", "q_group_size", 10**9), "must be|leaves nothing to quantize"),
        ("fp8", set_to("arguments", "quantized", "residual_length", 1), r"\[1, 2, 10, 8\] in the file, and torch.float32 \[1, 2, 9, 8\] here"),
        ("fp8", set_to("arguments", "offloaded", True), "can't be quantized and offloaded at once"),
        ("fp8", replace("layers.0.keys.codes", 1, 2, 9, 8, 8, dtype=torch.uint8), r"\[1, 2, 9, 8, 8\] in the file, and .*\[1, 2, 2, 8, 8\]"),
        ("fp8", replace("layers.0.keys.codes", 1, 2, 2, 8, 4, dtype=torch.uint8), r"\[1, 2, 2, 8, 4\] in the file, and .*\[1, 2, 2, 8, 8\]"),
        ("fp8", replace("layers.0.keys.codes", 1, dtype=torch.uint8), r"keys.codes is torch.uint8 \[1\] in the file"),
        ("fp8", replace("layers.2.values.scales", 1, 2, 1, 8, 1, dtype=torch.float32), r"values.scales is torch.float32 \[1, 2, 1, 8, 1\]"),
        ("fp8", replace("layers.1.keys.offsets", 1, 2, 2, 8, 1, dtype=torch.float32), r"and torch.float32 \[1, 2, 2, 8, 0\] here"),
        ("fp8", replace("layers.0.keys.lowered", 1, 1, 3, 1, dtype=torch.long), r"lowered is torch.int64 \[1, 1, 3, 1\]"),
        ("fp8", replace("layers.1.keys.lowered", 1, 1, 2, 1, dtype=torch.float32), "lowered is torch.float32"),
        ("offloaded", set_to("arguments", "offloaded", False), r"\[1, 2, 4, 8\] in the file, and torch.float32 \[1, 2, 16, 8\] here"),
        ("offloaded", replace("layers.0.keys.recent", 1, 2, 13, 8, dtype=torch.float32), r"\[1, 2, 13, 8\] in the file"),
        ("offloaded", replace("layers.0.keys.slots", 1, 2, 3, 8, dtype=torch.float32), r"\[1, 2, 3, 8\] in the file"),
    ],
)  # fmt: skip
def test_a_forged_file_of_every_kind_asks_for_nothing(qwen3, contents, tmp_path, mode, change, message):
    with pytest.raises(ValueError, match=message):
        SinkCache.load(forged(contents[mode], tmp_path / "cache", change), qwen3)


def move_far(numbers, tensors):
    for name in tensors:
        if name.endswith("lowered"):
            tensors[name][0, 0, :, 0] = torch.tensor([2**62, -(2**62)])


def test_wrong_numbers_stay_within_what_is_there(qwen3, contents, tmp_path):
    cache = SinkCache.load(forged(contents["fp8"], tmp_path / "cache", move_far), qwen3)
    sizes = [1] * 20 + [9] + [20] + [1] * 31
    assert feed(qwen3, cache, random_ids(sum(sizes)), sizes).isfinite().all()
    assert cache.layers[0].rings[0].blocks[0].shape[2] == 2 and cache.num_tokens_held == WINDOW_LENGTH > NUM_SINK_TOKENS


@pytest.mark.parametrize("mode", ["static", "fp8", "offloaded", "plain"])
def test_saving_while_the_sinks_of_a_row_come_changes_nothing(qwen3, tmp_path, mode):
    """The sinks of another row have moved, and are put back for the file: those that came with the last pass stand where they are."""
    texts = [random_ids(60, seed=60), random_ids(32, seed=32)]
    ids, mask = left_padded([texts[0][:, :30], texts[1][:, :2]])
    rest = torch.cat([text[:, num_seen:] for text, num_seen in zip(texts, (30, 2))])
    cache = SinkCache.from_model(qwen3, **WINDOW, static=True) if mode == "static" else kept_cache(qwen3, mode)
    feed(qwen3, cache, ids, [30], mask)
    feed(qwen3, cache, rest[:, :1], [1])
    untouched = copy.deepcopy(cache)
    cache.save(tmp_path / "cache")
    expected = feed(qwen3, untouched, rest[:, 1:], [1] * 29)
    for each in (cache, SinkCache.load(tmp_path / "cache", qwen3)):
        assert_same(feed(qwen3, each, rest[:, 1:], [1] * 29), expected)
