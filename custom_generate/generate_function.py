"""The function `generate`, which `model.generate(custom_generate=...)` calls."""

import torch

from .drafting import DraftFeed, check_drafting, drafting_model
from .feed import BeamFeed, Feed
from .guidance import Guidance, with_processors
from .history import unseen_part
from .old_core import SinkCache
from .options import Call
from .probe import check_is_decoder
from .prompt import whole_prompt
from .releases import CACHE_NAME, unwrapped


@torch.no_grad()
def generate(
    inputs: torch.Tensor | None = None,
    generation_config=None,
    logits_processor=None,
    stopping_criteria=None,
    prefix_allowed_tokens_fn=None,
    synced_gpus=None,
    assistant_model=None,
    streamer=None,
    *,
    model: torch.nn.Module,
    window_length: int | None = None,
    num_sink_tokens: int | None = None,
    prefill_chunk_size: int | None = None,
    **kwargs,
):
    """The model's own `generate`, with a `SinkCache`. All other arguments and what it returns are as there.

    Args:
        model: given by transformers.
        window_length: tokens the cache holds, the sinks and the newest token included (default 256).
        num_sink_tokens: how many of the first tokens are never evicted (default 4). Both numbers may also stand in a generation
            config, or come with the cache.
        prefill_chunk_size: tokens of a prompt that go through the model in one pass.
        cache_implementation: "static" for a cache that never moves. On a GPU transformers then compiles the forward pass, as
            `compile_config` says; elsewhere, compile the model. "quantized" as `cache_config` says, a dict of options of
            `Quantization`; or "offloaded" to the memory of the host.
        past_key_values, or cache (as transformers says since 5.24): a `SinkCache` to continue, with either the whole history in
            `input_ids`, or its last `window_length` tokens, or only what the cache has not seen: that is
            `sequences[:, cache.get_seq_length():]` and what comes after it. Without any prompt, the text goes on from the last token
            that was returned.
        guidance_scale: as in transformers, with a second cache of the same window for the second text. That one begins anew with each
            call, with `negative_prompt_ids`; to go on with it, pass the whole of it there.

    Raises:
        ValueError: something passed can't be processed exactly. The message names it; the model has not been run, and the cache
            is as before.
    """
    model = unwrapped(model)
    kwargs |= {"inputs": inputs, "generation_config": generation_config, "assistant_model": assistant_model, "streamer": streamer}
    kwargs |= {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria, "synced_gpus": synced_gpus}
    kwargs |= {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn, "prefill_chunk_size": prefill_chunk_size}
    kwargs |= {"window_length": window_length, "num_sink_tokens": num_sink_tokens}
    check_is_decoder(model)
    call = Call(model, kwargs)
    call.refuse_unsupported()
    cache = call.cache_to_continue()
    if cache is None:
        cache = SinkCache(**call.cache_arguments)
    with cache.in_one_call():
        prompt = whole_prompt(call, cache)
        unseen = unseen_part(prompt, cache, call.num_copies)
        guidance = Guidance.of(call, cache, prompt)
        cache.bind(model)
        feed_arguments, others = (model, cache, unseen, call.chunk_size, call.is_synced), {}
        if call.is_assisted:
            check_drafting(call, cache, prompt)
            others["assistant_model"] = drafting_model(call, cache)
            feed = DraftFeed(*feed_arguments, num_columns=prompt.num_columns)
        else:
            feed = BeamFeed(*feed_arguments) if call.has_beams else Feed(*feed_arguments)
        with feed:
            view = with_processors(feed.view(), prompt, call.num_copies, guidance)
            outputs = type(model).generate(view, **call.arguments_with(cache, prompt.tokens.shape[:2], **others))
            feed.sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
    if not isinstance(outputs, torch.Tensor):
        setattr(outputs, CACHE_NAME, cache)
    return outputs
