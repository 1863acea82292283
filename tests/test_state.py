"""A cache on disk: what goes on from a file gets the same logits, to the last bit, as what was never stopped; other files are refused."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import WINDOW, WINDOW_LENGTH, build_recurrent_model, feed, left_padded, random_ids
from families import build_model
from packaging.version import Version
from safetensors.torch import load_file, save_file
from test_invariants import move_counters

import custom_generate.generate as generate_module
from custom_generate.generate import SinkCache, generate

ROOT = Path(__file__).parents[1]
REST = 5 * WINDOW_LENGTH
# Beyond single tokens: passes over a full window, with copies of the sinks, and a re-base in the middle.
SIZES = [1] * 20 + [9] + [1] * 3 + [20] + [1] * (REST - 52)


def assert_goes_on_alike(model, cache: SinkCache, path: Path, sizes=SIZES) -> None:
    """The cache itself goes on after it was saved, and is the reference."""
    cache.save(path)
    loaded = SinkCache.load(path, model)
    assert repr(loaded) == repr(cache) and loaded.num_tokens_seen_by_row == cache.num_tokens_seen_by_row
    assert [states.state()[1] for states in loaded._states] == [states.state()[1] for states in cache._states]
    rest = random_ids(sum(sizes), seed=9, num_rows=cache.batch_size)
    expected = feed(model, cache, rest, sizes)
    assert expected.std() > 0.05
    assert torch.equal(feed(model, loaded, rest, sizes), expected)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing is left beside it"


# Before the sinks are complete, filling, at the edge, past it, right before a re-base and right after (the tokens of 2 windows).
@pytest.mark.parametrize("num_seen", [2, 10, 15, 16, 17, 31, 32, 33, 50])
def test_it_goes_on_with_the_same_bits(tmp_path, num_seen):
    model = build_model("llama", "sdpa")
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, random_ids(num_seen), [1] * num_seen)
    assert cache._base == [{33: 16, 50: 32}.get(num_seen, 0)]
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
        move_counters(cache, 10**6 // 192 * 192)
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
    assert cache._base[0] > cache.num_tokens_seen == 45
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
from families import TRANSFORMERS, build_model
from custom_generate.generate import SinkCache
model = build_model("llama", "sdpa", dtype=torch.bfloat16)
torch.save(feed(model, SinkCache.load({path!r}, model), random_ids(80, seed=9), {sizes!r}), {result!r})
"""


def test_another_process(tmp_path):
    model = build_model("llama", "sdpa", dtype=torch.bfloat16)
    cache = SinkCache.from_model(model, **WINDOW)
    feed(model, cache, random_ids(40), [40])
    move_counters(cache, 10**6 // 192 * 192)
    path, result = str(tmp_path / "cache"), str(tmp_path / "logits")
    cache.save(path)
    paths = [str(ROOT / "custom_generate"), str(ROOT / "tests")]
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


def test_a_file_that_was_changed_or_cut_off_is_refused(model, content, tmp_path):
    """Every byte of the header and many of the data, with the bits that json and floats forgive most easily."""
    path = tmp_path / "cache"
    path.write_bytes(content)
    SinkCache.load(path, model)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = [*range(0, header, 11), header - 1, *range(header, len(content), 499), len(content) - 1]
    assert len(places) > 100
    for place in places:
        for flip in (1, 32) if place < header else (1,):
            path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            with pytest.raises(
                ValueError, match=r"Can't load '.*cache' as a SinkCache: (it was cut off or changed|it has no checksum)"
            ):
                SinkCache.load(path, model)
    for length in (0, 5, 8, 20, header // 2, header, header + 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut off"):
            SinkCache.load(path, model)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="its checksum is .* and that of its content"):
        SinkCache.load(path, model)


def forged(content: bytes, path: Path, change) -> Path:
    """The file of a forger, who also mends the checksum."""
    path.write_bytes(content)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        numbers = json.loads(file.metadata()["sink_cache"][64:])
    change(numbers, tensors)
    save_file(tensors, path, metadata={"sink_cache": "0" * 64 + json.dumps(numbers)})
    with open(path, "r+b") as file:
        _, checksum, place = generate_module._checksums(file)
        file.seek(place)
        file.write(checksum)
    return path


def set_to(*names_and_value):
    *names, last, value = names_and_value

    def change(numbers, tensors):
        for name in names:
            numbers = numbers[name]
        numbers[last] = value

    return change


def widen(numbers, tensors):
    tensors["layers.1.keys.slots"] = torch.zeros(2, 2, 8, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (set_to("format", 2), "format 2, and this code reads format 1"),
        (set_to("batch_size", 10**12), r"\[1, 2, 8, 8\] in the file, and torch.float32 \[1000000000000, 2, 8, 8\] here"),
        (set_to("batch_size", "1"), "can't be"),
        (set_to("window_length", 10**12), "can't keep its rules for LlamaForCausalLM with window_length=1000000000000"),
        (set_to("window_length", 1000), r"token_ids is torch.int64 \[1, 8\] in the file, and of whole numbers \[1, 1000\] here"),
        (set_to("window_length", 4), "room for 8 tokens, and 4 of a window of 4"),
        (set_to("num_sink_tokens", 3), r"\[1, 2, 2, 8\] in the file, and torch.float32 \[1, 2, 3, 8\] here"),
        (set_to("num_seen", [5, 6]), "can't be"),
        (set_to("num_seen", [-5]), "can't be"),
        (set_to("base", [-1]), "can't be"),
        (set_to("states", "layers.0.keys", "sinks_are_at", [-1]), "is like layers.0.keys here"),
        (set_to("states", "layers.0.keys", {}), "is like layers.0.keys here"),
        (set_to("states", []), "does not say states"),
        (set_to("unseen_token_ids", [1, 2]), "can't be the last tokens of 1 rows"),
        (lambda numbers, tensors: numbers.pop("model"), "does not say model"),
        (lambda numbers, tensors: tensors.pop("layers.0.values.slots"), "layers.0.values.slots has room for 0 tokens"),
        (lambda numbers, tensors: tensors.pop("layers.1.values.slots"), "it has no layers.1.values.slots"),
        (lambda numbers, tensors: tensors.update(more=torch.zeros(1)), "it has more, and this model has nothing of that kind"),
        (widen, r"float32 \[2, 2, 8, 8\] in the file, and torch.float32 \[1, 2, 8, 8\] here"),
    ],
)
def test_a_forged_file_asks_for_nothing(model, content, tmp_path, change, message):
    """The checksum is right, so only what is checked beside it stands between the file and our memory."""
    with pytest.raises(ValueError, match=message):
        SinkCache.load(forged(content, tmp_path / "cache", change), model)
    assert SinkCache.load(forged(content, tmp_path / "cache", lambda numbers, tensors: None), model).num_tokens_seen == 20


def test_a_file_of_another_kind_is_refused(model, tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "other")
    (tmp_path / "pickled").write_bytes(pickle.dumps({"a": 1}))
    for name in ("other", "pickled"):
        with pytest.raises(ValueError, match="has no checksum, so SinkCache.save has not written it"):
            SinkCache.load(tmp_path / name, model)
    with pytest.raises(FileNotFoundError):
        SinkCache.load(tmp_path / "nothing", model)


def other_rotation():
    other = build_model("llama", "sdpa")
    other.model.rotary_emb.inv_freq *= 0.5
    return other


def one_weight_changed():
    other = build_model("llama", "sdpa")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight *= 1.01
    return other


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: build_model("llama", "sdpa", seed=1), "other weights: their checksum is .* in the file, and .* here"),
        (one_weight_changed, "other weights"),
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
    with pytest.raises(ValueError, match=message):
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
            patch.setattr(generate_module.os, name, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            cache.save(path)
        assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]
    cache.save(path)
    assert SinkCache.load(path, model).window_length == WINDOW_LENGTH and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy])
def test_pickling_points_to_save(model, how):
    with pytest.raises(TypeError, match=r"can't be pickled.*cache.save\(path\) and SinkCache.load\(path, model\).*copy.deepcopy"):
        how(SinkCache.from_model(model, **WINDOW))
