"""What a call of `generate` asks for, and which options a `SinkCache` can't serve."""

import copy

import torch
from transformers import Cache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

from .doors import check_count, check_tensors
from .releases import CACHE_NAME, CACHE_NAMES, input_device, is_left_to_model

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
# Values of unsupported options that are served, or equal to the default behaviour.
SERVED_VALUES = {
    "cache_implementation": ("dynamic", "hybrid", "static", "quantized", *OFFLOADED),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
}
# Options by which several tokens are drafted, for the model to check them in one pass.
DRAFTING_OPTIONS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
# Options of a generation config that are carried out here: transformers gets None in their place.
CONFIG_OPTIONS = ("cache_implementation", "cache_config", "prefill_chunk_size", "guidance_scale", "assistant_early_exit")
CACHE_SIZES = ("window_length", "num_sink_tokens")
NEGATIVE_PROMPT = ("negative_prompt_ids", "negative_prompt_attention_mask")
# Tensors that `generate` takes, beside pictures. Any other tensor comes with each token of a prompt, and is refused.
PROMPTS = ("input_ids", "inputs_embeds", "attention_mask", *NEGATIVE_PROMPT)
# Arguments that begin so are pictures. They go through the model in one pass with the new tokens, and transformers does not get
# them: it would repeat them for beams, and hand them on in the first pass that it knows of.
PICTURES = ("pixel_", "image_", "batch_num_images", "mm_encoder_outputs")
# Say for each token what it is, 0 for text. Some models need it to let the tokens of a picture see each other.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


class Call:
    """A call of `generate`.

    Attributes:
        arguments: what the call itself passes, but for arguments of the loader, cache and pictures. `inputs` is `input_ids`.
        cache: the cache that the call passes, under either name.
        pictures: arguments of the model that go with the new tokens.
        num_copies: rows for each text.
    """

    def __init__(self, model: torch.nn.Module, arguments: dict):
        self.model = model
        self.arguments = {name: value for name, value in arguments.items() if name not in LOADER_ARGUMENTS or callable(value)}
        self.arguments = {name: value for name, value in self.arguments.items() if name not in CACHE_SIZES or value is not None}
        self.cache = self._take("cache", *sorted(CACHE_NAMES))
        if (ids := self._take("prompt", "inputs", "input_ids")) is not None:
            self.arguments["input_ids"] = ids
        names = [name for name in self.arguments if name.startswith((*PICTURES, *TOKEN_TYPES))]
        given = {name: value for name in names if (value := self.arguments.pop(name)) is not None}
        check_tensors(**{name: value for name, value in given.items() if name in TOKEN_TYPES})
        self.pictures = {name: value for name, value in given.items() if name not in TOKEN_TYPES or bool(value.any())}
        num_beams = self.option("num_beams") or 1
        self.has_beams = num_beams > 1
        self.drafting_options = [name for name in DRAFTING_OPTIONS if self.option(name) is not None]
        self.num_copies = max(num_beams, self.option("num_return_sequences") or 1)
        self.chunk_size = self.option("prefill_chunk_size")

    def _take(self, what: str, *names: str):
        """The value of an argument that has two names."""
        values = [value for value in [self.arguments.pop(name, None) for name in names] if value is not None]
        if len(values) > 1:
            raise ValueError(f"A {what} is passed twice, as {' and as '.join(names)}. Leave one of them out.")
        return values[0] if values else None

    def asked(self, name: str):
        """The value of an option in the call, which may be None, or else in its generation config."""
        return self.arguments[name] if name in self.arguments else getattr(self.arguments.get("generation_config"), name, None)

    def option(self, name: str):
        """The same, completed by the generation config of the model where the call leaves it out."""
        value, own, given = self.asked(name), self.model.generation_config, self.arguments.get("generation_config")
        takes_defaults = self.arguments.get("use_model_defaults")
        is_said = name in self.arguments or given is not None and not is_left_to_model(name, value, own, takes_defaults)
        return value if is_said else getattr(own, name, None)

    def refuse_unsupported(self) -> None:
        for name, reason in UNSUPPORTED_OPTIONS.items():
            value = self.asked(name) if name in CACHE_OPTIONS else self.option(name)
            if value is not None and value is not False and value not in SERVED_VALUES.get(name, ()):
                is_brought = self.asked(name) is None
                remedy = "It stands in model.generation_config: set it to None there" if is_brought else "Leave it out"
                raise refusal(f"{name}={value!r:.50}", f"{reason}. {remedy}")
        if self.asked("use_cache") is False:
            raise refusal("use_cache=False", "without a cache there is nothing to bound. Leave it out")
        for name in sorted(self.arguments.keys() - {*PROMPTS, *CACHE_SIZES, *vars(self.model.generation_config)}):
            if isinstance(self.arguments[name], torch.Tensor):
                raise refusal(name, "it can't be split over the passes in which a prompt is fed. Leave it out")
        if self.chunk_size is not None:
            check_count("prefill_chunk_size", self.chunk_size)

    @property
    def cache_mode(self) -> dict:
        """How a window is to be kept, as an argument of `SinkCache`."""
        implementation, cache_config = self.asked("cache_implementation"), self.asked("cache_config")
        if implementation == "quantized":
            return {"quantized": {} if cache_config is None else cache_config}
        if cache_config is not None:
            raise ValueError('cache_config goes with "quantized". Add cache_implementation="quantized", or leave it out.')
        return {"static": True} if implementation == "static" else {"offloaded": True} if implementation in OFFLOADED else {}

    @property
    def cache_arguments(self) -> dict:
        return {name: size for name in CACHE_SIZES if (size := self.option(name)) is not None} | self.cache_mode

    def cache_to_continue(self):
        """The cache that is passed, None for a new one.

        Raises:
            ValueError: it is not the cache that the call asks for.
        """
        cache = self.cache
        if cache is None:
            return None
        if not isinstance(cache, Cache):
            shown = f"the class {cache.__name__}" if isinstance(cache, type) else f"{cache!r:.50} ({type(cache).__name__})"
            raise ValueError(f"The cache that is passed must be a Cache, got {shown}. Pass an object, SinkCache(...), or none.")
        # By its name: each load of custom code makes a class of its own.
        if type(cache).__name__ == "SinkCache" and hasattr(cache, "prepare"):
            self._check_cache(cache)
            return cache
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"The cache that is passed is a {type(cache).__name__} that already holds tokens, and nobody knows their "
                "positions. Pass a SinkCache, or none."
            )
        message = "The cache that is passed is an empty %s. It stays so: a SinkCache takes its place."
        logging.get_logger(__name__).warning(message, type(cache).__name__)
        return None

    def _check_cache(self, cache) -> None:
        wrong, mode, quantization = {}, self.cache_mode, cache.quantization
        for name, value in mode.items():
            if not cache.arguments[name]:
                wrong[f'cache_implementation="{name}"'] = f"is not {name}: it was not made with {name}={value}"
        for name in CACHE_SIZES:
            if self.asked(name) not in (None, cache.arguments[name]):
                wrong[f"{name}={self.asked(name)}"] = f"was made with {cache.arguments[name]}"
        options = mode.get("quantized")
        if options and quantization is not None and type(quantization).of(options) != quantization:
            wrong[f"cache_config={options}"] = f"was made with {quantization}"
        for asked, reason in wrong.items():
            raise ValueError(f"{asked} was asked for, and the cache that is passed {reason}. Leave it out, or pass a new cache.")

    @property
    def is_synced(self) -> bool:
        """Whether all processes have their passes together (`synced_gpus`), as transformers decides it."""
        if self.arguments.get("synced_gpus") is not None:
            return self.arguments["synced_gpus"]
        is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.model)
        return is_sharded and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1

    def arguments_with(self, cache, shape: torch.Size, **others) -> dict:
        """The arguments of the model's own `generate`, for a prompt of this shape."""
        ours = (*CONFIG_OPTIONS, *CACHE_SIZES, *NEGATIVE_PROMPT)
        arguments = {name: value for name, value in self.arguments.items() if name not in ours}
        if arguments.get("generation_config") is not None:
            arguments["generation_config"] = without_our_options(arguments["generation_config"])
        # Padding is the business of the cache, and a mask of ones need not be extended at each step.
        mask = torch.ones(shape, dtype=torch.long, device=input_device(self.model))
        return arguments | {CACHE_NAME: cache, "attention_mask": mask, "synced_gpus": self.is_synced} | others


def refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"{name} can't be used with SinkCache: {reason}.")


def without_our_options(generation_config):
    """A copy of a generation config in which transformers finds nothing that is carried out here."""
    generation_config = copy.deepcopy(generation_config)
    for name in CONFIG_OPTIONS:
        setattr(generation_config, name, None)
    return generation_config
