"""Classifier-free guidance (https://arxiv.org/abs/2306.17806), with a `SinkCache` for its second text."""

import torch
from transformers import LogitsProcessor

from .doors import check_tensors
from .feed import Feed
from .options import NEGATIVE_PROMPT, Call
from .prompt import Prompt, unseen_part
from .releases import input_device


class Guidance(LogitsProcessor):
    """Guides away from a second text: a negative prompt, or the last token of the prompt, and then what is generated. (In
    transformers, the cache of the second text grows.)"""

    def __init__(self, scale: float, feed: Feed):
        self.scale, self.feed = scale, feed

    @classmethod
    def of(cls, call: Call, cache, prompt: Prompt) -> "Guidance | None":
        """What `guidance_scale` asks for.

        Raises:
            ValueError: the second text can't be processed exactly.
        """
        scale = call.option("guidance_scale")
        if scale is None or scale == 1:
            return None
        ids, mask = (call.arguments.get(name) for name in NEGATIVE_PROMPT)
        _check_guidance(call, scale, prompt, ids, mask)
        second, negative = cache.empty_like(), None
        if ids is not None:
            try:
                negative = unseen_part(Prompt(ids, mask), second)
            except ValueError as error:
                raise ValueError(f"negative_prompt_ids can't be used: {error}") from None
            if len(ids) != len(prompt.tokens):
                raise ValueError(f"negative_prompt_ids has {len(ids)} rows, and the prompt {len(prompt.tokens)}. Pass as many.")
        second.bind(call.model)
        return cls(scale, Feed(call.model, second, negative, call.chunk_size))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[rows, vocab]` in, log-probabilities out."""
        feed, model = self.feed, self.feed.model
        others = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        new = Prompt(input_ids[:, -1:].to(input_device(model)))
        if not feed.cache.is_initialized:
            first = feed.prompt or new
            feed.prompt = first.repeat(len(input_ids) // len(first.tokens))
            new = feed.all_but_last_chunk(others)
        logits = model(**others | feed.cache.prepare(**new.arguments)).logits[:, -1]
        negative = logits.to(scores).log_softmax(-1)
        return negative + self.scale * (scores.log_softmax(-1) - negative)


def _check_guidance(call: Call, scale: float, prompt: Prompt, ids, mask) -> None:
    if not isinstance(scale, int | float):
        raise ValueError(f"guidance_scale must be a number, got {scale!r} ({type(scale).__name__}).")
    for name in ["num_beams"] if call.has_beams else call.drafting_options:
        raise ValueError(
            f"guidance_scale={scale} can't be used with {name}: the second text would not follow where the first one goes on "
            "from another beam or takes tokens back. Leave one of them out."
        )
    check_tensors(negative_prompt_ids=ids, negative_prompt_attention_mask=mask)
    if ids is None and (prompt.name == "inputs_embeds" or mask is not None):
        what = "inputs_embeds have none" if mask is None else "negative_prompt_attention_mask belongs to another text"
        raise ValueError(f"guidance_scale={scale} begins a second text with the last token: {what}. Pass negative_prompt_ids.")


def with_processors(view: torch.nn.Module, prompt: Prompt, num_copies: int, guidance: Guidance | None) -> torch.nn.Module:
    """A view whose logits processors begin with the guidance, and know what is padding: `repetition_penalty` leaves it out."""
    get_processors = view._get_logits_processor

    def get_logits_processor(*args, **kwargs):
        if prompt.mask is not None and kwargs["input_ids_seq_length"] == prompt.num_columns:
            mask = prompt.mask[:, -prompt.num_columns :].repeat_interleave(num_copies, 0)
            kwargs["model_kwargs"] = (kwargs.get("model_kwargs") or {}) | {"attention_mask": mask}
        processors = get_processors(*args, **kwargs)
        if guidance is not None:
            processors.insert(0, guidance)
        return processors

    view._get_logits_processor = get_logits_processor
    return view
