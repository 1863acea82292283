"""Assisted decoding, in the loop of transformers: the model checks a few drafted tokens in one pass, and rejects some."""

import contextlib
import copy
import functools
from dataclasses import replace

import torch

from .feed import Feed
from .options import Call, without_our_options
from .prompt import Prompt
from .releases import CACHE_NAME, input_device, shallow_copy, unwrapped
from .views import copied, view_of, viewed

# With two tokenizers, the last tokens of a text may be cut anew when others follow. So many of them a drafter reads again.
NUM_TOKENS_CUT_ANEW = 10


class DraftFeed(Feed):
    """A feed for drafts: from the last `num_last` tokens of the prompt on, all can be taken back. The prompt has `num_columns`; a
    draft may stand behind it from the first pass on."""

    def __init__(self, *args, num_columns: int, num_last: int = 1):
        super().__init__(*args)
        self.num_columns, self.num_last, self.has_begun = num_columns, num_last, False
        self.was_recording = self.cache.stream.is_recording

    def view(self) -> torch.nn.Module:
        view = super().view()
        view._get_candidate_generator = functools.partial(short_drafts, self.model, self.cache)
        return view

    def first_pass(self, input_ids: torch.Tensor, others: dict) -> dict:
        self.has_begun = True
        self.cache.activate_past_recording(False)
        inputs = super().first_pass(input_ids, others)
        self.cache.num_padding_columns = self.num_padding_columns
        return inputs

    def last_chunk(self, chunk: Prompt, input_ids: torch.Tensor) -> Prompt:
        self.cache.activate_past_recording()
        draft = input_ids[:, self.num_columns :].to(chunk.tokens)
        return replace(chunk, tokens=torch.cat([chunk.tokens, draft], dim=1))

    def __exit__(self, *error) -> None:
        if self.has_begun:
            cache = self.cache
            num_loose = cache.stream.num_recorded  # of a draft that was not checked to the end, nothing stands
            if self.sequences is not None:  # but for its last token, all that is in the text does
                num_columns = cache.num_tokens_seen + cache.num_padding_columns
                num_loose = min(max(num_columns - (self.sequences.shape[1] - 1), 0), num_loose)
            with contextlib.suppress(ValueError):  # a pass that can't be repeated: who comes next is told
                cache.crop(-num_loose)
                cache.activate_past_recording(self.was_recording)
        else:  # refused by transformers, which has begun to record
            self.cache.stream.is_recording = self.was_recording
        super().__exit__(*error)


def check_drafting(call: Call, cache, prompt: Prompt) -> None:
    """Refuse, before anything is run, what would come to light only in the middle of the text."""
    if prompt.name != "input_ids":
        raise ValueError("Assisted decoding can't begin with inputs_embeds: drafts are made from ids. Pass input_ids.")
    if (num_rows := len(prompt.tokens) * call.num_copies) > 1:
        raise ValueError(
            f"Assisted decoding takes one text, and this would be {num_rows}, which go on by different numbers of tokens. "
            "Generate them one by one, without beams and copies, or leave the assistance out."
        )
    _check_roll_back(call.model, cache.traits)


def _check_roll_back(model: torch.nn.Module, traits) -> None:
    if not (traits.is_recurrent or traits.is_ordered):
        return
    reason = "depends on the order of the keys, so that past the window it can't check several tokens in one pass"
    if traits.is_recurrent:
        reason = "has recurrent states, from which no token can be taken back"
    raise ValueError(f"Assisted decoding can't be used with {type(model).__name__}, which {reason}. Leave the assistance out.")


def drafting_model(call: Call, cache) -> torch.nn.Module | None:
    """The model that drafts, as a shallow copy with a sink cache of its own; None where drafts are looked up in the text.

    Nothing is left on the assistant: what transformers writes to its generation config stays on the copy.
    """
    assistant, num_layers = call.arguments.get("assistant_model"), call.option("assistant_early_exit")
    if num_layers is not None:
        assistant = _first_layers(viewed(call.model), num_layers)
    if assistant is None:
        return None
    assistant = view_of(unwrapped(assistant))
    if assistant.device.type == "meta":
        raise ValueError(
            "The model that drafts is offloaded, and transformers would lose the text on its device, meta. Load it as a whole "
            "(assistant_early_exit: the model itself), or leave the assistance out."
        )
    own_cache = cache.empty_like()
    own_cache.bind(assistant)
    _check_roll_back(assistant, own_cache.traits)
    view = shallow_copy(assistant)
    view.generation_config = without_our_options(assistant.generation_config)
    num_cut_anew = 0 if call.arguments.get("assistant_tokenizer") is None else NUM_TOKENS_CUT_ANEW
    view.generate = Drafter(assistant, own_cache, call.chunk_size, num_cut_anew)
    return view


def _first_layers(model: torch.nn.Module, num_layers: int) -> torch.nn.Module:
    """A copy of the model without its last layers, of the same weights. (transformers changes the config of the model itself.)"""
    shortened = copied(model)
    config = shortened.config.get_text_config(decoder=True)
    num_all = config.num_hidden_layers
    if not isinstance(num_layers, int) or isinstance(num_layers, bool) or not 1 <= num_layers < num_all:
        raise ValueError(f"assistant_early_exit must be one of the first {num_all - 1} of {num_all} layers, got {num_layers!r}.")
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    parts = [(body, name, part) for body in shortened.children() for name, part in body.named_children()]
    lists = [each for each in parts if isinstance(each[2], torch.nn.ModuleList) and len(each[2]) == num_all]
    for body, name, layers in lists:
        body._modules[name] = layers[:num_layers]
    if not lists:
        raise ValueError(f"assistant_early_exit can't be used with {type(model).__name__}: no layers were found. Leave it out.")
    return shortened


class Drafter:
    """The `generate` of a model that drafts: it goes on from what of its last draft stands, in a cache of its own. The last
    `num_cut_anew` of the tokens that stand may still change."""

    def __init__(self, model: torch.nn.Module, cache, chunk_size: int | None, num_cut_anew: int):
        self.model, self.cache, self.chunk_size, self.num_cut_anew = model, cache, chunk_size, num_cut_anew
        self.text = torch.zeros(1, 0, dtype=torch.long, device=input_device(model))  # with the last draft

    def __call__(self, input_ids, generation_config, logits_processor, min_new_tokens: int, max_new_tokens: int, **_):
        """What a candidate generator calls, which also passes inputs of the model that checks."""
        self._roll_back(input_ids)
        unseen = Prompt(input_ids[:, self.cache.num_tokens_seen :])
        num_last = 2 + self.num_cut_anew  # the last token of a draft, which was not fed, and the one that follows it
        feed = DraftFeed(self.model, self.cache, unseen, self.chunk_size, num_columns=input_ids.shape[1], num_last=num_last)
        config = without_our_options(generation_config)
        lengths = {"min_new_tokens": min_new_tokens, "max_new_tokens": max_new_tokens}
        others = {"attention_mask": torch.ones_like(input_ids), CACHE_NAME: self.cache}
        outputs = type(self.model).generate(feed.view(), input_ids, config, logits_processor, **lengths, **others)
        self.text = outputs.sequences
        setattr(outputs, CACHE_NAME, None)  # else transformers takes tokens back, by a count of its own
        return outputs

    def _roll_back(self, input_ids: torch.Tensor) -> None:
        """Take back all of the last draft that is not in the text."""
        length = min(self.text.shape[1], input_ids.shape[1] - 1)
        num_same = int((self.text[0, :length] == input_ids[0, :length]).long().cumprod(0).sum())
        try:
            self.cache.crop(min(num_same - self.num_cut_anew - self.cache.num_tokens_seen, 0))
        except ValueError:  # more than was recorded
            self.cache.reset()


def short_drafts(model: torch.nn.Module, cache, generation_config, **kwargs):
    """The candidate generator that a model has, with its drafts cut so that a pass over one can be taken back."""
    if kwargs.get("assistant_tokenizer") is not None:
        # Else, for sampling, it cuts down the assistant itself, for good. Greedy drafts lead to the same distribution.
        generation_config = copy.deepcopy(generation_config)
        generation_config.do_sample = False
    generator = model._get_candidate_generator(generation_config=generation_config, **kwargs)
    get_long_candidates = generator.get_candidates
    num_kept = [window.num_recent for window, _ in cache.stream.places]
    if cache.quantization is not None:
        num_kept.append(cache.quantization.min_recent)  # tokens that are not quantized

    def get_candidates(input_ids: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text `[1, length]` with a draft behind it, and the logits of the draft if there are any."""
        cache.crop(0)  # all that is in the text stands: 5.14 only says so where it takes something back
        ids, logits = get_long_candidates(input_ids, *args, **kwargs)
        length = min(ids.shape[1] - input_ids.shape[1], min(num_kept) - 1)
        if length == 0:
            return input_ids, None
        return ids[:, : input_ids.shape[1] + length], None if logits is None else logits[:, :length]

    generator.get_candidates = get_candidates
    return generator
