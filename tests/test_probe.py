"""What the cache finds out about a model: that it may serve it, in every dtype, or why not.

Real checkpoints are in tests/test_real_models.py; here are models made so that they depend on positions, or only seem to.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
import transformers
import transformers.models.llama.modeling_llama as modeling_llama
from packaging.version import Version
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import zoo
from custom_generate import models, probe
from custom_generate.generate import SinkCache
from custom_generate.models import check_mode
from custom_generate.probe import model_traits
from custom_generate.releases import NotesRecurrentLayers, NotingCache
from families import TRANSFORMERS
from oracle import oracle_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WINDOWS = [256, 4096, 16384]
ROPE = "rope_parameters" if TRANSFORMERS >= Version("5.0") else "rope_scaling"
DEPENDS = "logits depend on where a text stands"
MODELS = Path(os.environ.get("SINK_CACHE_MODELS", Path(__file__).parents[1] / "models"))


def llama(
    num_layers: int = 2, hidden_size: int = 32, std: float = 0.25, implementation: str = "sdpa", seed: int = 0, **overrides
):
    torch.manual_seed(seed)
    arguments = {"vocab_size": 199, "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": num_layers,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": std, "max_position_embeddings": 65536}  # fmt: skip
    config = LlamaConfig(**arguments | overrides, attn_implementation=implementation)
    return LlamaForCausalLM(config).eval()


def in_dtype(model, dtype: torch.dtype):
    """Not by model.to(dtype), which rounds the tables of frequencies, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture
def temperature(monkeypatch):
    """Queries of Llama scaled by 1 + 0.1 log(1 + position / 8192): nothing that shows in the keys, and smooth."""
    forward = modeling_llama.LlamaAttention.forward

    def scaled(self, *args, **kwargs):
        scale = 1 + 0.1 * torch.log1p(kwargs["position_ids"].float() / 8192)[:, :, None]
        project = self.q_proj
        self._modules["q_proj"] = lambda states: (project(states).float() * scale).to(states.dtype)
        try:
            return forward(self, *args, **kwargs)
        finally:
            self._modules["q_proj"] = project

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", scaled)


def needs_zoo_release():
    if TRANSFORMERS < Version(zoo.ZOO_RELEASE):
        pytest.skip(f"the models are those of transformers {zoo.ZOO_RELEASE}")


def refusal(model, window_length: int) -> str | None:
    try:
        model_traits(model, window_length)
    except ValueError as error:
        return str(error)
    return None


# Positions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window_length", [16, *WINDOWS])
def test_a_deep_model_that_amplifies_rounding_is_accepted(window_length, dtype):
    """Its logits differ from place to place by a hundred times what a fixed tolerance allows, and depend on distances only."""
    model = llama(8, 512, 0.3, vocab_size=1000, num_attention_heads=8, num_key_value_heads=4)
    assert refusal(in_dtype(model, dtype), window_length) is None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_seed_it_has_makes_no_difference(dtype, seed):
    """The verdict is a statistic: it must be far from chance."""
    for window_length in (64, 8192):
        assert refusal(in_dtype(llama(4, 64, 0.3, seed=seed), dtype), window_length) is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window_length", WINDOWS)
def test_a_smooth_temperature_is_refused(temperature, window_length, dtype, implementation):
    for seed in range(4):
        assert DEPENDS in (refusal(in_dtype(llama(implementation=implementation, seed=seed), dtype), window_length) or "accepted")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window_length", WINDOWS)
def test_beam_is_refused(window_length, dtype, implementation):
    needs_zoo_release()
    for seed in range(3):
        model = in_dtype(zoo.build_zoo_model("beam", implementation, seed=seed), dtype)
        assert DEPENDS in (refusal(model, window_length) or "accepted")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["ministral3", "llama4_text"])
def test_a_limit_beyond_which_queries_are_scaled(model_type, dtype):
    needs_zoo_release()
    model = in_dtype(zoo.build_zoo_model(model_type), dtype)
    for window_length in WINDOWS[1:]:
        assert "changes or ends at position" in refusal(model, window_length)
    assert refusal(model, 16) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window_length", WINDOWS)
def test_absolute_position_embeddings_are_refused(window_length, dtype):
    """Of the first as of any other place: neighbouring ones differ as much as those far away, so this is no matter of noise."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=2**15 + 8)
    model = in_dtype(AutoModelForCausalLM.from_config(config).eval(), dtype)
    assert "absolute or learned position embeddings" in refusal(model, window_length)


def test_logits_with_nothing_in_common_from_one_position_to_the_next_are_refused(monkeypatch):
    """Queries scaled at random by position: all differences are alike, and none of them is rounding."""
    forward = modeling_llama.apply_rotary_pos_emb

    def scaled(q, k, cos, sin, *args, **kwargs):
        rotated_q, rotated_k = forward(q, k, cos, sin, *args, **kwargs)
        noise = torch.frac(43758.5453 * cos[..., :1].double().abs() + 12.9898 * sin[..., :1].double()).float().abs()
        return rotated_q * (1 + 4 * noise[:, None]), rotated_k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
    assert DEPENDS + ", if only by rounding" in refusal(llama(), 256)


def test_positions_that_float32_can_not_hold_are_refused_before_the_model_is_run():
    model = llama()
    model.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    assert "can't tell positions up to 2000000000 apart" in refusal(model, 10**9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_are_accepted_with_eager_attention(name, dtype):
    """With sdpa: tests/test_real_models.py."""
    if not (MODELS / name).is_dir():
        pytest.skip(f"no {MODELS / name}: python scripts/get_model.py {name} {MODELS / name}")
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, attn_implementation="eager", dtype=dtype).eval()
    for window_length in (256, 1024, 4096, 16384):
        assert refusal(model, window_length) is None


def test_a_model_is_asked_once():
    """Forward passes over 390 tokens at the first call with a window, none after that."""
    model, calls = llama(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True)
    for _ in range(3):
        model_traits(model, 16)
    assert calls == [234, 78, 78]


@pytest.mark.parametrize("window_length", [1, 2, 3, 5, 8])
def test_tiny_windows(window_length):
    """Fewer positions than the probe compares, also where the model's end there."""
    assert model_traits(llama(), window_length).rebase_at == 2 * window_length
    if window_length == 1:
        return  # the probe itself needs more positions than two
    dynamic = llama(
        max_position_embeddings=2 * window_length, **{ROPE: {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    )
    assert model_traits(dynamic, window_length).max_positions == 2 * window_length


def test_a_window_as_long_as_float32_allows():
    """Each angle of a position of half a million is off by a hundredth of a radian, which is no rotation of the model's own."""
    assert refusal(llama(), 2**18) is None


# Texts in passes

RECURRENT = ["bamba", "falcon_h1", "granitemoehybrid", "lfm2", "qwen3_next", "zamba2", "nemotron_h", "jamba", "zamba"]


def zoo_model(model_type: str, dtype: torch.dtype = torch.float32):
    needs_zoo_release()
    return in_dtype(zoo.build_zoo_model(model_type), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_deep_hybrid_whose_rounding_chooses_experts_is_accepted(dtype):
    """Nothing in it depends on positions, so no noise can be measured: in bfloat16, half of the texts differ by 0.06 and more."""
    needs_zoo_release()
    kinds, model_class = ["linear_attention", "full_attention"] * 8, transformers.GraniteMoeHybridForCausalLM
    torch.manual_seed(1)
    config = zoo.tiny_config(model_class.config_class, num_hidden_layers=len(kinds), layer_types=kinds)
    assert refusal(in_dtype(model_class._from_config(config).float().eval(), dtype), 16) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", RECURRENT)
def test_how_recurrent_models_take_passes(model_type, dtype):
    """The same verdict in all dtypes: rounding must not hide that a state is forgotten, nor that steps are limited."""
    model = zoo_model(model_type, dtype)
    if model_type in ("jamba", "zamba"):
        assert "forget their state in a pass of several tokens" in refusal(model, 16)
    else:
        traits = model_traits(model, 16)
        assert traits.splits_exactly == (model_type not in ("zamba2", "nemotron_h"))
        assert traits.noted_layers == frozenset(traits.recurrent_states)


@torch.no_grad()
def logits_of_passes(model, input_ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache, logits = DynamicCache(config=model.config), []
    for part in input_ids.split(sizes, dim=1):
        logits.append(model(part, past_key_values=cache).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("model_type", ["zamba2", "nemotron_h"])
def test_passes_of_several_tokens_agree_among_each_other(model_type):
    """What `splits_exactly` says of a model for which it is not true, on transformers' own cache."""
    model = zoo_model(model_type)
    input_ids = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    whole = logits_of_passes(model, input_ids, [24])
    torch.testing.assert_close(logits_of_passes(model, input_ids, [5, 2, 10, 7]), whole, rtol=0, atol=1e-3 * whole.std().item())
    singles = logits_of_passes(model, input_ids, [2] + [1] * 22)
    assert (singles - whole).abs().max() > 1e-3 * whole.std()


def test_a_difference_between_single_tokens_and_several_that_nobody_announces():
    """Found by running the model: a layer gives half as much for single tokens."""
    model = zoo_model("bamba")
    mixer = next(module for module in model.modules() if hasattr(module, "time_step_limit"))
    mixer.register_forward_hook(lambda module, args, output: output * (0.5 if output.shape[1] == 1 else 1.0))
    assert not model_traits(model, 16).splits_exactly


def test_only_the_named_methods_are_noted():
    """A future method of `Cache` whose name ends in `_state` must not break the import."""
    noted = {name for name in vars(NotesRecurrentLayers) if not name.startswith("__")}
    assert noted == {"get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state", "has_previous_state"}
    assert NotingCache().layers_reached == set()


# What is said


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(models.logger, "warning", said.append)
    return said


def test_a_window_longer_than_the_trained_length_is_warned_of_once_for_each_model(warnings):
    model = llama(max_position_embeddings=100)
    model_traits(model, 100)
    assert not warnings
    model_traits(model, 101)
    model_traits(model, 120)
    (warning,) = warnings
    assert "window_length=101 is longer than the 100 positions" in warning and "LlamaForCausalLM" in warning
    model_traits(copy.deepcopy(model), 120)
    assert len(warnings) == 2


def test_a_model_whose_logits_depend_on_the_feeding_is_warned_of_once(warnings):
    model = zoo_model("nemotron_h")
    for window_length in (16, 32):
        model_traits(model, window_length)
    (warning,) = warnings
    assert "NemotronHForCausalLM" in warning and "how a text is fed" in warning
    model_traits(zoo_model("bamba"), 16)
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda: llama(attention_dropout=0.1),
        lambda: AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(vocab_size=97, hidden_size=32, intermediate_size=48,
                        num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.1)),
    ],
    ids=["a number", "a module"],
)  # fmt: skip
def test_dropout_in_training_mode_is_the_reason(build):
    """And it is the first thing that is said: the model has neither learned positions nor a rotation of its own."""
    model = build().train()
    with pytest.raises(ValueError, match=r"^The model is in training mode with dropout \(.*=0\.1\).*Call model\.eval\(\) first"):
        model_traits(model, 16)
    with pytest.raises(ValueError, match="dropout"):
        check_mode(model)
    model_traits(model.eval(), 16)
    with pytest.raises(ValueError, match="dropout"):
        model_traits(model.train(), 16)


def test_training_mode_without_dropout_is_no_reason():
    model_traits(llama().train(), 16)


def test_a_refusal_names_the_rule():
    assert refusal(llama(), 10**9).endswith(f"The rule that this would break: {probe.SHIFT}.")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_lack_of_memory_is_not_a_refusal(error, monkeypatch):
    model = llama()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(type(error), match=str(error)) as caught:
        model_traits(model, 16)
    assert caught.value is error


def test_what_is_read_off_a_model():
    assert models.limits_time_steps(zoo_model("nemotron_h")) and not models.limits_time_steps(zoo_model("bamba"))


@pytest.mark.parametrize("num_tokens", [5, 12])
@pytest.mark.parametrize("model_type", ["zamba2", "nemotron_h"])
def test_models_that_limit_time_steps_are_served_as_transformers_serves_them(model_type, num_tokens):
    """The prompt in one pass, then single tokens: below the window the logits of `DynamicCache`. Past it, where all is fed singly, the
    oracle's, but for what the model makes of a pass of several tokens: the oracle runs the sinks in one, so its tolerance is wider."""
    model = zoo_model(model_type)
    input_ids = torch.randint(2, 97, (1, 60), generator=torch.Generator().manual_seed(1))

    def fed(sizes):
        cache = SinkCache.from_model(model, 16, 4)
        with torch.no_grad():
            return torch.cat([model(**cache.prepare(part)).logits for part in input_ids[:, : sum(sizes)].split(sizes, 1)], 1)

    sizes = [num_tokens] + [1] * (16 - num_tokens)
    expected = logits_of_passes(model, input_ids[:, :16], sizes)
    assert (fed(sizes) - expected).abs().max() <= 1e-4 * expected.std()
    expected = oracle_logits(model, input_ids, 16, 4)
    assert (fed([1] * 60) - expected).abs().max() <= 3e-3 * expected.std()
    others = oracle_logits(model, input_ids, 16, 4, sinks=input_ids[:, 4:8])
    assert (others - expected).abs().max() > 3e-2 * expected.std(), "the comparison means nothing"
