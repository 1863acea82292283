"""Finding out how a model moves keys: along two paths, with right and with wrong rotations."""

import math

import pytest
import torch
import transformers
from packaging import version
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from checks import assert_same, feed, random_ids
from custom_generate import probe
from custom_generate.generate import SinkCache
from custom_generate.probe import ROTATION_TOLERANCE
from custom_generate.rotation import Rotation, candidate_rotations
from families import FAMILIES, ORDERED, TRANSFORMERS, build_model
from oracle import oracle_logits
from zoo import ZOO_RELEASE, build_zoo_model

HEAD_DIM = 8
INV_FREQ = torch.tensor([1.0, 0.3, 0.02, 0.001])
INDEX = torch.arange(4)


def halves() -> Rotation:
    return Rotation.of_pairs(HEAD_DIM, INV_FREQ, INDEX, INDEX + 4)


def test_a_quarter_turn_by_hand():
    """Dimension 0 turns towards dimension 2 by 90 degrees a position, 1 and 3 stand still."""
    rotation = Rotation.of_pairs(4, torch.tensor([math.pi / 2]), torch.tensor([0]), torch.tensor([2]))
    keys = torch.tensor([1.0, 5.0, 0.0, 7.0])
    for position, expected in enumerate([[1, 5, 0, 7], [0, 5, 1, 7], [-1, 5, 0, 7], [0, 5, -1, 7]]):
        angles = rotation.angles(torch.tensor(0), torch.tensor(position))
        torch.testing.assert_close(rotation.turn(keys, angles), torch.tensor(expected, dtype=torch.float), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["halves", "interleaved", "backwards"])
def test_turns_are_those_of_the_models_own_code(kind):
    """Two paths: keys rotated to position 9 by transformers, and keys rotated to 3 by transformers and from there by us."""
    keys = torch.randn(2, 3, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    rotation = {
        "halves": halves(),
        "interleaved": Rotation.of_pairs(HEAD_DIM, INV_FREQ, 2 * INDEX, 2 * INDEX + 1),
        "backwards": Rotation.of_pairs(HEAD_DIM, INV_FREQ, INDEX + 4, INDEX),
    }[kind]

    def by_transformers(position: int) -> torch.Tensor:
        angle = (position * INV_FREQ)[None, None]
        if kind == "interleaved":
            return rotate_interleaved(keys.transpose(1, 2), angle.sin(), angle.cos()).transpose(1, 2)
        angle = torch.cat([angle, angle], -1)
        rotate = rotate_halves
        if kind == "backwards":
            rotate = pytest.importorskip("transformers.models.nanochat.modeling_nanochat").apply_rotary_pos_emb
        return rotate(keys, keys, angle.cos(), angle.sin())[1]

    ours = rotation.turn(by_transformers(3), rotation.angles(torch.tensor(3), torch.tensor(9)))
    torch.testing.assert_close(ours, by_transformers(9), rtol=0, atol=1e-5)


def test_a_turn_there_and_back_is_nothing():
    keys = torch.randn(5, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    rotation = halves()
    there = rotation.turn(keys, rotation.angles(torch.tensor(2), torch.tensor(77)))
    back = rotation.turn(there, rotation.angles(torch.tensor(77), torch.tensor(2)))
    torch.testing.assert_close(back, keys, rtol=0, atol=1e-5)
    torch.testing.assert_close(there.norm(dim=-1), keys.norm(dim=-1))


WRONG = {
    "other pairs": lambda r: Rotation.of_pairs(HEAD_DIM, INV_FREQ, 2 * INDEX, 2 * INDEX + 1),
    "other sign": lambda r: Rotation(-r.frequency, r.partner),
    "one slow pair wrong": lambda r: Rotation(r.frequency * torch.tensor([1, 1, 1, 1.1] * 2), r.partner),
    "one fast pair wrong": lambda r: Rotation(r.frequency * torch.tensor([1.001, 1, 1, 1] * 2), r.partner),
    "pairs exchanged": lambda r: Rotation(r.frequency[[1, 0, 2, 3, 5, 4, 6, 7]], r.partner),
    "none": lambda r: Rotation.identity(HEAD_DIM),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_rotation_explains_nothing(wrong, dtype):
    """Whatever is off by more than rounding, in a single pair too, is not accepted."""
    positions = torch.tensor([0, 1, 256, 511])
    first = torch.randn(4, 1, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotation = halves()
    keys = rotation.turn(first, rotation.angles(torch.zeros(4), positions)[None, :, None])
    tolerance, _ = ROTATION_TOLERANCE[dtype]
    assert rotation.misfit(keys, positions) <= tolerance
    assert WRONG[wrong](rotation).misfit(keys, positions) > tolerance


def test_keys_off_by_one_position_are_not_explained():
    positions = torch.tensor([0, 1, 256, 511])
    first = torch.randn(4, 1, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    shifted = halves().turn(first, halves().angles(torch.zeros(4), positions + (positions > 0))[None, :, None])
    assert halves().misfit(shifted, positions) > 0.15


@pytest.mark.parametrize("name", FAMILIES)
def test_no_two_candidates_explain_one_model(name, monkeypatch):
    """The first that fits is taken, so there must be no second one that fits and moves keys otherwise."""
    model, tables = build_model(name), []

    def candidates(head_dim, found):
        tables[:] = found  # the frequencies that the model has
        return candidate_rotations(head_dim, found)

    monkeypatch.setattr(probe, "candidate_rotations", candidates)
    traits = SinkCache.from_model(model, 16, 4).traits
    assert traits.is_ordered == (name in ORDERED)
    positions = torch.tensor([0, 1, 16, 31])
    for layer in traits.layers:
        for rotation, (_, head_dim) in zip(layer.rotations, layer.shapes):
            keys = torch.randn(4, 1, 2, head_dim, generator=torch.Generator().manual_seed(0))
            keys = rotation.turn(keys, rotation.angles(torch.zeros(4), positions)[None, :, None])
            fitting = [r for r in candidate_rotations(head_dim, tables) if r.misfit(keys, positions) <= 2e-3]
            assert {r.fingerprint for r in fitting} == {rotation.fingerprint}


def patched_rotation(monkeypatch, rotate):
    """A model whose attention turns keys and queries by `rotate` (as remote code might)."""
    import transformers.models.llama.modeling_llama as llama

    monkeypatch.setattr(llama, "apply_rotary_pos_emb", rotate)
    return build_model("llama")


def test_an_unknown_rotation_is_refused(monkeypatch):
    """Pairs that nobody uses: dimension i with its mirror image. A relative encoding, but not one that can be moved blindly."""

    def mirrored(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos[:, None], sin[:, None]
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:].flip(-1)], -1)
        cos = torch.cat([cos[..., :half], cos[..., half:].flip(-1)], -1)
        return q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin

    model = patched_rotation(monkeypatch, mirrored)
    with pytest.raises(ValueError, match="no known rotation explains how the keys of layer 0"):
        SinkCache.from_model(model, 16, 4)


def test_a_known_rotation_is_found_without_any_entry_for_the_model(monkeypatch):
    def interleaved(q, k, cos, sin, unsqueeze_dim=1):
        half = cos.shape[-1] // 2
        angles = {"cos": cos[..., :half], "sin": sin[..., :half]}
        return tuple(rotate_interleaved(x.transpose(1, 2), **angles).transpose(1, 2) for x in (q, k))

    model = patched_rotation(monkeypatch, interleaved)
    input_ids = random_ids()
    cache = SinkCache.from_model(model, 16, 4)
    assert cache.traits.layers[0].rotations[0].partner.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert_same(feed(model, cache, input_ids, [16] + [1] * 64), oracle_logits(model, input_ids, 16, 4))


def test_a_model_that_counts_positions_by_itself_is_refused(monkeypatch):
    """It takes position_ids and ignores them: its keys would not be where the cache believes them."""
    import transformers.models.llama.modeling_llama as llama

    forward = llama.LlamaRotaryEmbedding.forward
    monkeypatch.setattr(
        llama.LlamaRotaryEmbedding,
        "forward",
        lambda self, x, position_ids: forward(self, x, torch.arange(position_ids.shape[1])[None].expand_as(position_ids)),
    )
    with pytest.raises(ValueError, match="layer 0"):
        SinkCache.from_model(build_model("llama"), 16, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-j", "deepseek-v3", "cohere", "llama-yarn", "phi"])
def test_the_rotation_is_found_in_half_precision(name, dtype):
    exact = SinkCache.from_model(build_model(name), 16, 4).traits
    found = SinkCache.from_model(build_model(name, dtype=dtype), 16, 4).traits
    for ours, theirs in zip(found.layers, exact.layers):
        for a, b in zip(ours.rotations, theirs.rotations):
            assert a.partner.equal(b.partner)
            torch.testing.assert_close(a.frequency, b.frequency, rtol=1e-2, atol=0)


def test_scores_that_depend_on_the_position_itself_are_refused():
    """Some models scale queries by their absolute position, Ministral 3 from some length on: nothing that shows in the keys."""
    arguments = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.25, "sliding_window": None}  # fmt: skip
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "llama_4_scaling_beta": 0.5}

    def model(original_length: int):
        torch.manual_seed(0)
        parameters = rope | {"original_max_position_embeddings": original_length}
        config = transformers.Ministral3Config(
            **arguments, max_position_embeddings=16 * original_length, rope_parameters=parameters
        )
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    if TRANSFORMERS < version.parse(ZOO_RELEASE):
        pytest.skip("no such models")
    with pytest.raises(ValueError, match="logits depend on where a text stands"):
        SinkCache.from_model(build_zoo_model("beam"), 16, 4)  # scaled at every position
    with pytest.raises(ValueError, match="changes or ends at position 20"):
        SinkCache.from_model(model(original_length=20), 16, 4)
    input_ids = random_ids()
    far_enough = model(original_length=128)  # further than positions get
    cache = SinkCache.from_model(far_enough, 16, 4)
    assert_same(feed(far_enough, cache, input_ids, [16] + [1] * 64), oracle_logits(far_enough, input_ids, 16, 4))
