"""Small models, one for each family and kind of position embedding: config, seed, nothing downloaded."""

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM

TRANSFORMERS = version.parse(transformers.__version__)

VOCAB_SIZE = 97
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # not the number of heads: mixing the two up must show
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT_ATTENTION = {  # and a mixture of experts, as in all models that have it
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
HALF_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def rope(rope_type: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": rope_type, **parameters}}


# name: (config class, arguments)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-linear": ("LlamaConfig", rope("linear", factor=4.0)),
    "llama-dynamic": ("LlamaConfig", rope("dynamic", factor=4.0)),
    "llama-yarn": (
        "LlamaConfig",
        rope("yarn", factor=4.0, original_max_position_embeddings=128),
    ),
    "llama-llama3": (
        "LlamaConfig",
        rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-short-window": ("MistralConfig", {"sliding_window": 6}),
    "mistral-long-window": ("MistralConfig", {"sliding_window": 40}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-half-sliding": (
        "Qwen2Config",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 6, "layer_types": HALF_SLIDING},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma2-long-window": (
        "Gemma2Config",
        {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 40, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "layer_types": HALF_SLIDING,
            "rope_parameters": {
                "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
                "full_attention": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0},
            },
        },
    ),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "phi3-longrope": (
        "Phi3Config",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
                "original_max_position_embeddings": 256,
                "attention_factor": 1.2,
            },
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "gpt-j": ("GPTJConfig", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, "rotary_dim": 4}),
    "cohere": ("CohereConfig", {"logit_scale": 1.0}),
    "glm4": ("Glm4Config", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLmConfig", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1], "layer_types": None}),
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "sliding_window": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": HALF_SLIDING,
        },
    ),
    "falcon": ("FalconConfig", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "falcon-alibi": ("FalconConfig", {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {**LATENT_ATTENTION, "first_k_dense_replace": 1, "n_group": 2},
    ),
    "glm-moe-dsa": (
        "GlmMoeDsaConfig",
        {
            **LATENT_ATTENTION,
            "num_hidden_layers": 4,
            "n_group": 1,
            "indexer_types": ["full", "shared", "shared", "full"],  # a full one chooses after its keys are stored: the last layer too
            "index_topk": 16,  # just as many as the window of most tests holds
            "index_head_dim": 16,
            "index_n_heads": 2,
        },
    ),
    "bloom": ("BloomConfig", {"n_layer": 3, "n_head": 4}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2}),
    "nanochat": ("NanoChatConfig", {"head_dim": 8}),
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 16,  # just as long as the window of most tests
            "floor_scale": 82,  # queries are scaled from the 82nd token on
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
        },
    ),
}
EAGER_ONLY = {"gemma2", "gemma2-long-window", "gpt-j", "gpt-oss", "bloom", "mpt"}
# They differ from others by how they rotate keys, and by nothing about windows, masks or the order of keys. Rotations have nothing to do
# with the attention implementation or with a compiled graph: these combinations are `slow`.
ROTATIONS_ONLY = {"llama-linear", "llama-yarn", "llama-llama3", "mistral", "qwen2", "phi3", "gpt-neox", "cohere", "glm4", "stablelm"}
ROTATIONS_ONLY |= {"olmo2", "smollm3", "nanochat"}
# Refused before that release of transformers: (release, reason).
REFUSED_BEFORE = {"glm-moe-dsa": ("5.11", "keys outside of the cache")}
# Scores depend on the order of keys: a pass of several tokens can't go past the window.
ORDERED = {"falcon-alibi", "bloom", "mpt"}


def build_config(name: str, **overrides):
    class_name, arguments = FAMILIES[name]
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {TRANSFORMERS} has no {class_name}")
    if name == "olmo2" and (TRANSFORMERS.major, TRANSFORMERS.minor) == (5, 4):
        pytest.skip("transformers 5.4 rejects the default of its own Olmo2Config")
    common = {key: value for key, value in COMMON.items() if not ({"n_embd", "d_model"} & arguments.keys()) or "num_" not in key}
    arguments = {**common, **arguments, **overrides}
    if not hasattr(transformers.LlamaConfig(), "rope_parameters"):  # before 5.0
        arguments |= old_rope_arguments(arguments.pop("rope_parameters", {}))
    return getattr(transformers, class_name)(**arguments)


def old_rope_arguments(parameters: dict) -> dict:
    """`rope_parameters` as transformers 4 wants them."""
    arguments = {}
    if "sliding_attention" in parameters:
        arguments["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    if "rope_theta" in parameters:
        arguments["rope_theta"] = parameters["rope_theta"]
    if parameters.get("rope_type", "default") != "default":
        arguments["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if parameters.get("rope_type") == "longrope":  # Phi-3 takes three entries, the rest stands in the config itself
        scaling = arguments["rope_scaling"]
        arguments["rope_scaling"] = {"type": "longrope"} | {key: scaling[key] for key in ("short_factor", "long_factor")}
    return arguments


def is_refused(name: str) -> bool:
    return name in REFUSED_BEFORE and TRANSFORMERS < version.parse(REFUSED_BEFORE[name][0])


def build_model(
    name: str, attn_implementation: str = "eager", dtype=torch.float32, seed: int = 0, even_if_refused=False, **overrides
):
    """A model with random weights, in eval mode. Where the installed release can't serve it, the test is skipped."""
    if is_refused(name) and not even_if_refused:
        pytest.skip(f"refused with transformers {TRANSFORMERS}: see test_families.py")
    torch.manual_seed(seed)
    config = build_config(name, **overrides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # flat attention hides a wrong position: weights must be large
            torch.nn.init.normal_(parameter, std=0.25)
        elif not any(part in parameter_name for part in ("norm", "ln")):  # biases, attention sinks: zero at the start
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()
