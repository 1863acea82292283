"""A tiny model with random weights for every entry of transformers' causal-LM mapping: nothing downloaded, no list of families.

A config is made from its class: it gets the sizes in `SIZES` under whatever names it has, and few layers of each kind that it has
by default. What that does not get right stands in `SPECIAL`.
"""

import copy
import dataclasses
import inspect
import itertools

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# The release for which this was made: some models can't be built with others.
ZOO_RELEASE = "5.24"
ZOO_TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VOCAB_SIZE = 97
NUM_LAYERS = 4
NATIVE_WINDOW = 6  # shorter than a window of the tests, which is 16
NUM_CHOSEN = 16  # keys that a query may choose: with fewer than that window holds, ties between them would decide


def _names(value, names: str) -> dict:
    return dict.fromkeys(names.split(), value)


# What config fields are called, and what they are here. A config is given those that it has.
SIZES = {
    **_names(VOCAB_SIZE, "vocab_size vocab_size_per_layer_input unpadded_vocab_size encoder_hash_byte_group_vocab"),
    **_names(VOCAB_SIZE, "shape_vocab_size pronunciation_vocab_size"),
    **_names(32, "hidden_size n_embd d_model emb_dim embedding_size input_embedding_size output_embedding_size lru_width"),
    **_names(32, "hidden_size_global backbone_hidden_size"),
    **_names(NUM_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    **_names(NUM_LAYERS, "encoder_layers num_encoder_layers"),  # some decoders get a cache with as many layers as the encoder
    **_names(4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads"),
    **_names(4, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"),
    **_names(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    **_names(8, "head_dim d_head dim_head kv_channels attention_head_size swa_head_dim"),
    **_names(48, "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dff dim_ff d_inner n_inner"),
    **_names(48, "feed_forward_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size"),
    **_names(512, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"),
    **_names(4, "rotary_dim d_rel"),
    # Flat attention hides a wrong position: weights must be large.
    **_names(0.25, "initializer_range init_std"),
    # Latent attention
    **_names(16, "q_lora_rank kv_lora_rank"),
    **_names(8, "qk_nope_head_dim qk_rope_head_dim"),
    **_names(6, "v_head_dim"),
    # Experts
    **_names(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_names(2, "num_experts_per_tok moe_topk moe_k n_group zero_expert_num"),
    **_names(1, "topk_group first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_names(16, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size"),
    **_names(16, "shared_intermediate_size moe_shared_expert_intermediate_size"),
    # Recurrent layers
    **_names(8, "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads"),
    **_names(1, "mamba_n_groups mamba_ngroups n_groups"),
    **_names(16, "mamba_chunk_size chunk_size"),
    **_names(2, "linear_num_key_heads"),
    **_names(4, "linear_num_value_heads linear_num_heads"),
    **_names(8, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    # Indexers, which choose the keys that a query sees
    **_names(8, "index_head_dim indexer_head_dim"),
    **_names(2, "index_n_heads indexer_n_heads"),
    **_names(1, "indexer_kv_heads"),
    **_names(NUM_CHOSEN, "index_topk indexer_budget"),
    **_names(4, "index_block_size indexer_compress_ratio"),
    **_names(NUM_CHOSEN // 4, "index_topk_blocks"),
    # Other ranks and streams
    **_names(8, "hidden_size_per_layer_input laurel_rank o_lora_rank router_hidden_size hc_lowrank"),
    **_names(8, "shape_embed_dim pronunciation_embed_dim"),
    **_names(2, "hc_mult hc_count o_groups altup_num_inputs"),
    # Token ids: no text ends by itself
    **_names(0, "pad_token_id"),
    **_names(1, "bos_token_id"),
    **_names(None, "eos_token_id"),
    # One half of an encoder-decoder model, or an encoder made to decode
    **_names(True, "is_decoder"),
    **_names(False, "is_encoder_decoder add_cross_attention"),
}

# Fields with one entry a layer.
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")

# What the rules above do not get right: by the model type of the config, and parts of composite models by theirs.
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": NATIVE_WINDOW}
# Without kernels, time and memory of this attention go with the square of its chunks, which are of 64 tokens, for each dimension.
SMALL_STATES = {"linear_num_heads": 2, "linear_head_dim": 4}
SPECIAL: dict[str, dict] = {
    "bailing_hybrid": SMALL_STATES,
    "kimi_linear": SMALL_STATES,
    # Kinds of layers that are not there by default, or only one kind
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},  # block-sparse attention is for encoders
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {
        **HALF_SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": HALF_SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mellum": HALF_SLIDING,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "ministral": HALF_SLIDING,
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window": NATIVE_WINDOW, "num_experts_per_tok": 1},
    # Windows under other names
    "doge": {"keep_window_size": NUM_CHOSEN},
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]], "window_size": NATIVE_WINDOW},
    "modernbert-decoder": {"local_attention": 2 * NATIVE_WINDOW},  # counts both sides
    "recurrent_gemma": {"attention_window_size": NATIVE_WINDOW, "block_types": ["recurrent", "attention"]},
    # Queries that are scaled by their position: from the 33rd or 65th on, or beyond the stream of the tests
    "inkling2_text": {"sliding_window_size": NATIVE_WINDOW, "log_scaling_n_floor": 32},
    "inkling_text": {"sliding_window_size": NATIVE_WINDOW, "log_scaling_n_floor": 32},
    "llama4_text": {"attention_chunk_size": 20, "floor_scale": 65, "no_rope_layer_interval": 2},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 512,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    # Layers that share keys and values
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    # Sizes that depend on each other
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},  # the defaults do not run
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "sliding_window": NATIVE_WINDOW,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 6,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "hrm_text": {"num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 1},  # each cycle counts as a layer
    "longcat_flash": {"num_layers": NUM_LAYERS // 2},  # two attentions each
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "reformer": {"attn_layers": ["local", "lsh"] * 2, "axial_pos_embds": False, "num_buckets": 2},
    "xlstm": {"hidden_size": 128},  # widths of keys and values are multiples of 64
    # Names
    "xmod": {"default_language": "en_XX"},
}

# Types of which no small model can be built, and why.
LEFT_OUT: dict[str, str] = {
    "gemma3n": "its vision tower comes from the package timm; the decoder is that of gemma3n_text",
    "gemma4_assistant": "transformers refuses the only config it allows, in which all layers share another model's cache",
}

# Types whose code is, but for names, that of another type, with the same config here: the other one is in the tests without `slow`.
SAME_AS: dict[str, str] = {
    "dots3_note_text": "dots3_note",
    "exaone": "llama",
    "gpt-sw3": "gpt2",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "llama4_text": "llama4",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_5_text": "qwen3_5",
    "qwen4_exp_text": "qwen4_exp",
    "sarvam_mla": "deepseek_v3",
    "xlm-roberta": "camembert",
}


def zoo_config(model_type: str) -> PretrainedConfig:
    """The config of a tiny model of this type; of its decoder alone, where the model class takes that."""
    config_class, needed = CONFIG_MAPPING[model_type], _model_class(model_type).config_class
    return tiny_config(needed if needed in _parts(config_class).values() else config_class)


def build_zoo_model(model_type: str, attn_implementation: str | None = None, seed: int = 0) -> torch.nn.Module:
    """A tiny model of this type with random weights, float32, in eval mode."""
    torch.manual_seed(seed)
    # Not by AutoModelForCausalLM, which does not take the config of a decoder alone.
    model = _model_class(model_type)._from_config(zoo_config(model_type), attn_implementation=attn_implementation).float()
    for parameter in model.parameters():
        if not parameter.any():  # biases, attention sinks, gates: a mistake with them must show
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = None
    return model.eval()


def _model_class(model_type: str) -> type[torch.nn.Module]:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def tiny_config(config_class: type[PretrainedConfig], **overrides) -> PretrainedConfig:
    overrides = copy.deepcopy(SPECIAL.get(config_class.model_type, {})) | overrides
    fields = _fields(config_class)
    arguments = {name: value for name, value in SIZES.items() if name in fields}
    parts = _parts(config_class)
    arguments |= {name: tiny_config(part, **overrides.pop(name, {})) for name, part in parts.items()}
    if not parts:
        default = config_class()
        arguments |= {name: _some_of_each(kinds) for name in LAYER_LISTS if name in fields and (kinds := getattr(default, name))}
    if "kv_lora_rank" in fields:  # every head has keys of its own, made from the latent
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    if "sliding_attention" in arguments.get("layer_types", ()):
        arguments["sliding_window"] = NATIVE_WINDOW
    elif "None" in fields.get("sliding_window", ""):
        arguments["sliding_window"] = None  # else all layers would have it, and none would have sinks
    return config_class(**arguments | overrides)


def _fields(config_class: type[PretrainedConfig]) -> dict[str, str]:
    """What a config takes, and of which type, where that is said."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: str(field.type) for field in dataclasses.fields(config_class)}
    return {name: str(each.annotation) for name, each in inspect.signature(config_class.__init__).parameters.items()}


def _parts(config_class: type[PretrainedConfig]) -> dict[str, type[PretrainedConfig]]:
    """The config classes of those parts of a composite model that it can't do without; before 5.20, of all parts."""
    if not hasattr(config_class, "sub_configs_defaults"):
        return {name: part for name, part in config_class.sub_configs.items() if hasattr(part, "model_type")}
    specs = {name: spec for name, spec in config_class.sub_configs_defaults.items() if not spec.optional}
    return {name: CONFIG_MAPPING[spec.model_type] if spec.model_type else spec.config_class for name, spec in specs.items()}


def _some_of_each(kinds: list[str]) -> list[str]:
    """The kinds of layers that come up in a list, in turn, for as many layers as there are here."""
    return list(itertools.islice(itertools.cycle(dict.fromkeys(kinds)), NUM_LAYERS))
