"""What a call of `generate` asks for: its options, each looked up once, and which of them a `SinkCache` can't serve."""

import copy

import torch
from transformers import Cache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

from .releases import CACHE_NAME, CACHE_NAMES, input_device

# Arguments of transformers' loader of custom code, which it hands on.
LOADER_ARGUMENTS = frozenset(
    "custom_generate trust_remote_code global_keys_to_exclude revision code_revision token use_auth_token cache_dir "
    "force_download resume_download local_files_only proxies subfolder repo_type".split()
)

# Options of `generate` that can't be used with this cache: name -> reason.
UNSUPPORTED_OPTIONS = {
    "use_mtp": "the layers that draft have a cache of their own, which grows with the text",
    "speculation_type": "the model that drafts has a cache of its own, which grows with the text",
    "cache_implementation": 'it would put another cache in the place of SinkCache, but for "static", "quantized" and "offloaded"',
    "max_cache_len": "a SinkCache holds window_length tokens, however long the text gets",
    "continuous_batching_config": "continuous batching has a paged cache of its own",
    "return_legacy_cache": "tuples of keys and values can't say which of them are sinks",
    "penalty_alpha": "contrastive search feeds candidate tokens that it takes back",
    "token_healing": "it changes the last token of the prompt",
    "position_ids": "tokens are numbered by the cache",
}
UNSUPPORTED_OPTIONS |= dict.fromkeys(
    ("dola_layers", "num_beam_groups", "constraints", "force_words_ids"), "it lives in a custom_generate repository of its own"
)
# Options that choose a cache. Published generation configs set them, and a SinkCache takes the place of that cache: only the call
# itself may not ask for one.
CACHE_OPTIONS = ("cache_implementation", "cache_config", "max_cache_len", "continuous_batching_config", "return_legacy_cache")
# Names under which transformers offloads caches. With a window it makes no difference whether they would grow.
OFFLOADED = ("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked")
# Options by which several tokens are drafted, for the model to check them in one pass.
DRAFTING_OPTIONS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
# Options under which the text is not just continued, token by token, as the second text of guidance would have to follow.
NOT_WITH_GUIDANCE = ("num_beams", *DRAFTING_OPTIONS)
# Options of a generation config that are carried out here: transformers gets None in their place.
CONFIG_OPTIONS = ("cache_implementation", "cache_config", "prefill_chunk_size", "guidance_scale", "assistant_early_exit")
CACHE_SIZES = ("window_length", "num_sink_tokens")
# Arguments that are carried out here, and that transformers does not get.
OUR_OPTIONS = (
    *(*CONFIG_OPTIONS, *CACHE_SIZES),
    *("inputs", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask"),
)
# Arguments that begin so are pictures. They go through the model in one pass with the new tokens, and transformers does not get
# them: it would repeat them for beams, and hand them on in the first pass that it knows of.
PICTURES = ("pixel_", "image_", "batch_num_images", "mm_encoder_outputs")
# Say for each token what it is, 0 for text. Some models need it to let the tokens of a picture see each other.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# Tensors that `generate` takes beside these. Any other tensor comes with each token of a prompt, and is refused.
PROMPTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask")
# Options that are looked up in the call, then in its generation config, then in that of the model.
OPTIONS = (
    *UNSUPPORTED_OPTIONS,
    *NOT_WITH_GUIDANCE,
    *OUR_OPTIONS,
    *"use_cache num_return_sequences bos_token_id pad_token_id eos_token_id".split(),
)
# Values equal to the default behaviour; not refused.
NEUTRAL_VALUES = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "cache_implementation": ("dynamic", "static", "quantized", *OFFLOADED),
}


class Call:
    """A call of `generate`.

    Attributes:
        arguments: what the call itself passes, but for arguments of the loader and the cache.
        cache: the cache that the call passes, under either name.
        pictures: arguments of the model that go with the new tokens.
        asked: the value of each of `OPTIONS` in the call or in its generation config; None where both leave it out.
        options: the same, completed by the generation config of the model.
    """

    def __init__(self, model: torch.nn.Module, arguments: dict):
        self.model = model
        self.arguments = {name: value for name, value in arguments.items() if name not in LOADER_ARGUMENTS}
        caches = [cache for cache in [self.arguments.pop(name, None) for name in CACHE_NAMES] if cache is not None]
        if len(caches) > 1:
            raise ValueError("A cache is passed twice, as cache and as past_key_values. Leave one of them out.")
        self.cache = caches[0] if caches else None
        if self.arguments.get("inputs") is not None:
            if self.arguments.get("input_ids") is not None:
                raise ValueError("The prompt is passed twice, as inputs and as input_ids. Leave one of them out.")
            self.arguments["input_ids"] = self.arguments["inputs"]
        named = {name: self.arguments.pop(name) for name in [*self.arguments] if name.startswith((*PICTURES, *TOKEN_TYPES))}
        self.pictures = {name: value for name, value in named.items() if value is not None and not _is_text(name, value)}
        config = self.arguments.get("generation_config")
        self.asked, self.options = {}, {}
        for name in OPTIONS:
            asked = self.arguments.get(name)
            self.asked[name] = asked = getattr(config, name, None) if asked is None else asked
            self.options[name] = getattr(model.generation_config, name, None) if asked is None else asked
        self.has_beams = (self.options["num_beams"] or 1) > 1
        self.is_assisted = any(self.options[name] is not None for name in DRAFTING_OPTIONS)
        self.num_copies = max(self.options["num_beams"] or 1, self.options["num_return_sequences"] or 1)  # rows for each text
        self.chunk_size = self.options["prefill_chunk_size"]

    def refuse_unsupported(self) -> None:
        """Refuse, before anything is run, what can't be exact."""
        for name, reason in UNSUPPORTED_OPTIONS.items():
            value = (self.asked if name in CACHE_OPTIONS else self.options)[name]
            if value is not None and value is not False and value not in NEUTRAL_VALUES.get(name, ()):
                shown = type(value).__name__ if hasattr(value, "__dict__") or isinstance(value, torch.Tensor) else repr(value)
                is_brought = self.asked[name] is None
                remedy = "It stands in model.generation_config: set it to None there" if is_brought else "Leave it out"
                raise ValueError(f"{name}={shown} can't be used with SinkCache: {reason}. {remedy}.")
        refused = {} if self.asked["use_cache"] is not False else {"use_cache=False": "without a cache there is nothing to bound"}
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor) and name not in PROMPTS:
                refused[name] = "it can't be split over the passes in which a prompt is fed"
        for name, reason in refused.items():
            raise ValueError(f"{name} can't be used with SinkCache: {reason}. Leave it out.")
        size = self.chunk_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"prefill_chunk_size must be an int of at least 1, got {size!r}.")

    @property
    def cache_mode(self) -> dict:
        """How a window is to be kept, as arguments of `SinkCache`."""
        implementation, cache_config = self.asked["cache_implementation"], self.asked["cache_config"]
        if implementation == "quantized":
            return {"quantized": {} if cache_config is None else cache_config}
        if cache_config is not None:
            raise ValueError('cache_config configures cache_implementation="quantized", which was not asked for. Leave it out.')
        return {"static": True} if implementation == "static" else {"offloaded": True} if implementation in OFFLOADED else {}

    @property
    def cache_arguments(self) -> dict:
        """The arguments of `SinkCache` for a new cache."""
        return {name: self.options[name] for name in CACHE_SIZES if self.options[name] is not None} | self.cache_mode

    def cache_to_continue(self):
        """The cache that is passed, None for a new one.

        Raises:
            ValueError: it is not the cache that the call asks for.
        """
        cache, mode = self.cache, self.cache_mode
        if cache is None:
            return None
        if not isinstance(cache, Cache):
            raise ValueError(f"The cache that is passed must be a Cache, got {cache!r:.50} ({type(cache).__name__}).")
        # By its name: each load of custom code makes a class of its own.
        if type(cache).__name__ == "SinkCache" and hasattr(cache, "prepare"):
            self._check_cache(cache, mode)
            return cache
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"The cache that is passed is a {type(cache).__name__} that already holds tokens, and nobody knows their "
                "positions. Pass a SinkCache, or none."
            )
        message = "The cache that is passed is an empty %s. It stays so: a SinkCache takes its place."
        logging.get_logger(__name__).warning(message, type(cache).__name__)
        return None

    def _check_cache(self, cache, mode: dict) -> None:
        quantization = cache.quantization
        is_kept = {"static": cache.is_static, "offloaded": cache.is_offloaded, "quantized": quantization is not None}
        for name, value in mode.items():
            if not is_kept[name]:
                argument = "quantized={...}" if name == "quantized" else f"{name}={value}"
                raise ValueError(
                    f'cache_implementation="{name}" was asked for, and the cache that is passed is not {name}. Leave the '
                    f"argument out, or pass a new cache, made with {argument}."
                )
        differences = [(name, self.arguments.get(name), getattr(cache, name)) for name in CACHE_SIZES]
        if options := mode.get("quantized"):
            is_same = vars(type(quantization).of(options)) == vars(quantization)
            differences.append(("cache_config", None if is_same else options, quantization))
        for name, asked, value in differences:
            if asked is not None and asked != value:
                raise ValueError(
                    f"{name}={asked} was asked for, and the cache that is passed was made with {value}. Leave the argument "
                    "out, or pass a new cache."
                )

    @property
    def is_synced(self) -> bool:
        """Whether all processes have their passes together (`synced_gpus`), as transformers decides it."""
        if self.arguments.get("synced_gpus") is not None:
            return self.arguments["synced_gpus"]
        is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.model)
        return is_sharded and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1

    def arguments_with(self, cache, shape: torch.Size, **others) -> dict:
        """The arguments of the model's own `generate`, for a prompt of this shape."""
        arguments = {name: value for name, value in self.arguments.items() if name not in OUR_OPTIONS}
        if arguments.get("generation_config") is not None:
            arguments["generation_config"] = without_our_options(arguments["generation_config"])
        # Padding is the business of the cache, and a mask of ones need not be extended at each step.
        mask = torch.ones(shape, dtype=torch.long, device=input_device(self.model))
        return arguments | {CACHE_NAME: cache, "attention_mask": mask, "synced_gpus": self.is_synced} | others


def _is_text(name: str, value) -> bool:
    """Whether token types say that there is no picture."""
    return name in TOKEN_TYPES and isinstance(value, torch.Tensor) and not bool(value.any())


def without_our_options(generation_config):
    """A copy of a generation config in which transformers finds nothing that is carried out here."""
    generation_config = copy.deepcopy(generation_config)
    for name in CONFIG_OPTIONS:
        setattr(generation_config, name, None)
    return generation_config
