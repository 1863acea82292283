"""A quantized or offloaded window on disk: it goes on with the same bits as one that was never stopped, and forged files are refused."""

import pytest
import torch
from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, feed, left_padded, random_ids
from families import build_model, first_served
from test_quantized import needs
from test_state import WINDOW, assert_goes_on_alike, forged, set_to

from custom_generate.generate import SinkCache

BLOCK, RESIDUAL = 8, 2
FP8 = {"backend": "fp8", "q_group_size": BLOCK, "residual_length": RESIDUAL}
BACKENDS = {
    "fp8": FP8,
    "quanto": FP8 | {"backend": "quanto", "nbits": 2, "axis_key": -1},
    "hqq": FP8 | {"backend": "hqq", "nbits": 3, "axis_value": 1},
}
MODES = [*BACKENDS, "offloaded"]
SIZES = (
    [1] * 20 + [9] + [1] * 3 + [20] + [1] * 28
)  # five windows: past single tokens, passes over a full one, re-bases in the middle


@pytest.fixture(scope="module")
def model():
    return build_model(first_served("gemma3", "qwen3"), "sdpa", num_hidden_layers=4)


@pytest.fixture(scope="module")
def plain_model():
    return build_model("qwen3", "sdpa")


def new_cache(model, mode: str, **numbers) -> SinkCache:
    if mode in BACKENDS:
        needs(mode)
    return SinkCache.from_model(model, **WINDOW | numbers, quantized=BACKENDS.get(mode), offloaded=mode == "offloaded")


# Before the sinks are complete; right before a block is quantized and after; before positions are lowered and after.
@pytest.mark.parametrize("num_seen", [2, 13, 14, 32, 33, 38, 50])
@pytest.mark.parametrize("mode", ["fp8", "quanto", "offloaded"])
def test_it_goes_on_with_the_same_bits(plain_model, tmp_path, mode, num_seen):
    cache = new_cache(plain_model, mode)
    feed(plain_model, cache, random_ids(num_seen), [1] * num_seen)
    keys = cache._states[0]
    if mode != "offloaded":
        assert keys._num_quantized(num_seen) == {2: 0, 13: 0, 14: 1, 32: 3, 33: 3, 38: 4, 50: 5}[num_seen]
        assert bool((keys.moved_at != keys.moved).any()) == (
            num_seen in (33, 38, 50)
        )  # blocks that are turned when they are read
    assert_goes_on_alike(plain_model, cache, tmp_path / "cache", SIZES)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_different_lengths(model, tmp_path, mode):
    """Some layers have native windows, too short to be quantized; each row was lowered by other amounts."""
    cache = new_cache(model, mode)
    ids, mask = left_padded([random_ids(length, seed=length) for length in (60, 3, 29)])
    feed(model, cache, ids, [60], mask)
    feed(model, cache, random_ids(5, num_rows=3), [1] * 5)
    assert len(cache._base) == 3
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    sizes = [1] * 4 + [9] + [1] * 3 + [20] + [1] * 4 if mode == "hqq" else SIZES  # slow
    assert_goes_on_alike(model, cache, tmp_path / "cache", sizes)


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
def test_every_kind_of_model(tmp_path, name, dtype, numbers, mode):
    model = build_model(name, dtype=dtype)
    cache = new_cache(model, mode, **numbers)
    feed(model, cache, random_ids(40), [16] + [1] * 24)
    assert_goes_on_alike(model, cache, tmp_path / "cache", [1] * 60 if name == "bloom" else SIZES)


@pytest.mark.parametrize("mode", ["fp8", "offloaded"])
def test_after_a_roll_back_and_from_a_file_of_a_file(plain_model, tmp_path, mode):
    """Drafts past the edge at which positions are lowered, and at which a block is quantized, are taken back; what is loaded is saved."""
    cache = new_cache(plain_model, mode)
    feed(plain_model, cache, random_ids(29), [29])
    cache.activate_past_recording()
    feed(plain_model, cache, random_ids(6, seed=4), [1] * 6)
    cache.crop(-5)
    cache._set_recording(False)
    cache.save(tmp_path / "first")
    with torch.inference_mode():
        loaded = SinkCache.load(tmp_path / "first", plain_model)
    (tmp_path / "first").unlink()
    ids = random_ids(5, seed=5)
    assert feed(plain_model, loaded, ids, [1] * 5).equal(feed(plain_model, cache, ids, [1] * 5))
    assert_goes_on_alike(plain_model, loaded, tmp_path / "cache", SIZES)


def test_another_kind_than_expected_is_refused(plain_model, tmp_path):
    for mode in ("fp8", "offloaded"):
        cache = new_cache(plain_model, mode)
        feed(plain_model, cache, random_ids(40), [40])
        cache.save(tmp_path / mode)
        options = {"quantized": FP8, "offloaded": False} if mode == "fp8" else {"offloaded": True}
        loaded = SinkCache.load(tmp_path / mode, plain_model, static=False, **options)
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
            SinkCache.load(tmp_path / mode, plain_model, **options)


@pytest.fixture(scope="module")
def contents(plain_model, tmp_path_factory) -> dict[str, bytes]:
    contents, path = {}, tmp_path_factory.mktemp("saved") / "cache"
    for mode in ("fp8", "offloaded"):
        cache = new_cache(plain_model, mode)
        feed(plain_model, cache, random_ids(40), [40])
        cache.save(path)
        contents[mode] = path.read_bytes()
    return contents


def replace(name: str, *shape: int, dtype: torch.dtype):
    return lambda numbers, tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    "mode, change, message",
    [
        ("fp8", set_to("batch_size", 10**12), r"\[1, 2, 14, 8\] in the file, and torch.float32 \[1000000000000, 2, 14, 8\] here"),
        ("fp8", set_to("quantized", None), "it has layers.0.keys.codes, and this model has nothing of that kind"),
        ("fp8", set_to("quantized", 3), "must be a dict"),
        ("fp8", set_to("quantized", "backend", ["fp8"]), "does not quantize caches"),
        ("fp8", set_to("quantized", "nbits", 4.0), "nbits=4.0 can't be used"),
        ("fp8", set_to("quantized", "q_group_size", 10**9), "leaves nothing to quantize"),
        ("fp8", set_to("quantized", "residual_length", 1), "keys.slots has room for 14 tokens, and 13 of a window of 16 stay"),
        ("fp8", set_to("offloaded", True), "can't be quantized and offloaded at once"),
        ("fp8", lambda numbers, tensors: numbers.pop("quantized"), "does not say quantized"),
        ("fp8", replace("layers.0.keys.codes", 1, 2, 9, 8, 8, dtype=torch.uint8), "room for 9 blocks, and the window has 2"),
        ("fp8", replace("layers.0.keys.codes", 1, 2, 2, 8, 4, dtype=torch.uint8), r"\[1, 2, 2, 8, 4\] in the file, and .*\[1, 2, 2, 8, 8\]"),
        ("fp8", replace("layers.0.keys.codes", 1, dtype=torch.uint8), r"keys.codes is torch.uint8 \[1\] in the file"),
        ("fp8", replace("layers.2.values.scales", 1, 2, 1, 8, 1, dtype=torch.float32), r"values.scales is torch.float32 \[1, 2, 1, 8, 1\]"),
        ("fp8", replace("layers.1.keys.offsets", 1, 2, 2, 8, 1, dtype=torch.float32), r"and torch.float32 \[1, 2, 2, 8, 0\] here"),
        ("fp8", replace("layers.0.keys.moved_at", 1, 3, dtype=torch.long), r"moved_at is torch.int64 \[1, 3\]"),
        ("fp8", replace("layers.1.keys.moved_at", 1, 2, dtype=torch.float32), "moved_at is torch.float32"),
        ("offloaded", set_to("offloaded", False), None),
        ("offloaded", replace("layers.0.keys.slots", 1, 2, 17, 8, dtype=torch.float32), "room for 17 tokens, and 16 of a window of 16"),
        ("offloaded", replace("layers.0.keys.slots", 1, 2, 3, 8, dtype=torch.float32), "room for 3 tokens"),
        ("offloaded", replace("layers.1.keys.slots", 1, 2, 9, 8, dtype=torch.float32), r"\[1, 2, 9, 8\] in the file"),
    ],
)  # fmt: skip
def test_a_forged_file_asks_for_nothing(plain_model, contents, tmp_path, mode, change, message):
    """(An offloaded window that says it is none is no lie: on disk, all have the same form.)"""
    path = forged(contents[mode], tmp_path / "cache", change)
    if message is None:
        assert SinkCache.load(path, plain_model).num_tokens_seen == 40
        return
    with pytest.raises(ValueError, match=message):
        SinkCache.load(path, plain_model)


def forget_blocks(numbers, tensors):
    """None quantized, and a text of 2**60 tokens."""
    numbers["num_seen"], numbers["base"] = [2**60], [2**60 - 20]
    for name in tensors:
        if name.endswith(("codes", "scales", "offsets")):
            tensors[name] = tensors[name][:, :, :0].clone()
        elif name.endswith("moved_at"):
            tensors[name] = tensors[name][:, :0].clone()


def move_far(numbers, tensors):
    for name in tensors:
        if name.endswith("moved_at"):
            tensors[name][:] = torch.tensor([2**62, -(2**62)])


@pytest.mark.parametrize("change", [forget_blocks, move_far])
def test_wrong_numbers_stay_within_what_is_there(plain_model, contents, tmp_path, change):
    cache = SinkCache.load(forged(contents["fp8"], tmp_path / "cache", change), plain_model)
    sizes = [1] * 20 + [9] + [20] + [1] * 31
    assert feed(plain_model, cache, random_ids(sum(sizes)), sizes).isfinite().all()
    assert cache._states[0].codes.shape[3] == 2 and cache.num_tokens_held == WINDOW_LENGTH > NUM_SINK_TOKENS
