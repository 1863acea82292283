"""The text that a call passes, and its pictures."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers.utils import logging

from .options import TOKEN_TYPES, Call, refusal
from .releases import input_device

SEE_EACH_OTHER = (
    "in this model the tokens of a picture see each other. The model makes the mask for that, which is right only in the first "
    "pass of a text, for rows without padding, if all of it fits into the window of each layer. Text alone works in any call"
)


@dataclass(frozen=True)
class Prompt:
    """Tokens `[batch, num_columns]` or embeddings `[batch, num_columns, hidden]`, with the mask of their left padding.

    Attributes:
        padding_id: the id that was taken for padding, where it begins a row, because no mask is passed.
        pictures: arguments of the model that go in one pass with all tokens but the last.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None = None
    name: str = "input_ids"
    padding_id: int | None = None
    pictures: dict = field(default_factory=dict)

    @property
    def num_columns(self) -> int:
        return self.tokens.shape[1]

    @property
    def arguments(self) -> dict:
        return {self.name: self.tokens, "attention_mask": self.mask}

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor], **others) -> "Prompt":
        """The same with its tokens and its mask changed alike."""
        return replace(self, tokens=change(self.tokens), mask=None if self.mask is None else change(self.mask), **others)

    def split(self, num_columns: int) -> tuple["Prompt", "Prompt"]:
        first = self.changed(lambda each: each[:, :num_columns])
        return first, self.changed(lambda each: each[:, num_columns:], pictures={})

    def repeat(self, num_copies: int) -> "Prompt":
        return self.changed(lambda each: each.repeat_interleave(num_copies, 0))

    def last(self, num_tokens: list[int]) -> "Prompt":
        """The last tokens of each row."""
        num_columns = max(num_tokens)
        column = torch.arange(num_columns, device=self.tokens.device)
        mask = column >= num_columns - torch.tensor(num_tokens, device=self.tokens.device)[:, None]
        return Prompt(self.tokens[:, -num_columns:], None if bool(mask.all()) else mask.long(), self.name)


def whole_prompt(call: Call, cache) -> Prompt:
    """The text that the call passes. If it passes none, `input_ids` becomes the last token returned for each row, which the cache
    has not seen, or, for a new cache, the token that begins texts."""
    arguments, device = call.arguments, input_device(call.model)
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    check_tensors(input_ids=ids, attention_mask=mask)
    if arguments.get("inputs_embeds") is not None:
        return Prompt(arguments["inputs_embeds"], mask, "inputs_embeds")
    if ids is None and cache.get_seq_length() > 0:
        if cache.unseen_token_ids is None:
            raise ValueError(
                "No prompt is passed, and the cache does not know which token comes next: generate has not returned any since "
                "its last pass. Pass the tokens that it has not seen as input_ids."
            )
        ids = arguments["input_ids"] = torch.tensor(cache.unseen_token_ids, device=device)[:, None]
        if mask is None:  # for all tokens of the text
            mask = ids.new_ones(len(ids), cache.get_seq_length() + 1)
    elif ids is None and call.option("bos_token_id") is not None:
        ids = arguments["input_ids"] = torch.full((1, 1), call.option("bos_token_id"), dtype=torch.long, device=device)
    return Prompt(ids, mask) if mask is not None else _with_inferred_mask(ids, call)


def check_tensors(**values) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a Tensor, got {value!r:.50} ({type(value).__name__}).")


def _with_inferred_mask(ids: torch.Tensor | None, call: Call) -> Prompt:
    """Padding is the padding token where it begins a row, unless it also ends texts. (transformers takes it anywhere.)"""
    pad, eos = call.option("pad_token_id"), call.option("eos_token_id")
    if ids is None or ids.ndim != 2 or not isinstance(pad, int):
        return Prompt(ids)
    is_padding = ids == pad
    if bool(is_padding.any()) and pad not in (eos if isinstance(eos, list | tuple) else [eos]):
        return Prompt(ids, (~is_padding).long().cummax(dim=1).values, padding_id=pad)
    if bool(is_padding[:, :1].any()) and not bool(is_padding[:, :1].all()):
        logging.get_logger(__name__).warning(
            "Some rows of the batch begin with the padding token, but it also ends texts and no attention_mask is passed: they "
            "are taken for tokens, and become the sinks. Pass the attention_mask that the tokenizer returns."
        )
    return Prompt(ids)


def with_pictures(unseen: Prompt, prompt: Prompt, call: Call, cache) -> Prompt:
    """What a cache has not seen of a prompt, with the pictures that the call passes for it. All but the last token goes through
    the model in one pass, for which the model itself puts the pictures where the text has tokens for them.

    Raises:
        ValueError: that pass can't be exact. The message says why.
    """
    if not call.pictures:
        return unseen
    for name in sorted(call.pictures.keys() - inspect.signature(call.model.forward).parameters.keys()):
        raise refusal(name, f"{type(call.model).__name__} does not take it. Leave it out")
    reason = _reason_against_pictures(unseen, prompt, call, cache)
    if reason is not None:
        raise refusal(max(call.pictures), reason)  # pixel_values, where there are some
    types = {name: call.pictures[name][:, -unseen.num_columns : -1] for name in TOKEN_TYPES if name in call.pictures}
    return replace(unseen, pictures=call.pictures | types)


def _reason_against_pictures(unseen: Prompt, prompt: Prompt, call: Call, cache) -> str | None:
    num_rows, num_columns, num_new = len(prompt.tokens), prompt.num_columns, unseen.num_columns
    if any(hasattr(module, "get_rope_index") for module in call.model.modules()):
        return (
            f"{type(call.model).__name__} gives the tokens of a picture positions in three dimensions, and the cache numbers "
            "tokens one after the other. Text alone works"
        )
    if len(unseen.tokens) > num_rows:
        return f"the cache holds {len(unseen.tokens)} rows, and {num_rows} are passed. Pass each row with its pictures"
    if num_new < num_columns and cache.get_seq_length() > 0:
        return (
            f"pictures go with new tokens, and only {num_new} of the {num_columns} that are passed are new. Pass only these, "
            "sequences[:, cache.get_seq_length():] and then your new tokens, with an attention_mask for the whole text"
        )
    if num_new > cache.window_length:
        return (
            f"the new tokens of a prompt with pictures go through the model in one pass, and {num_new} of them do not fit into "
            f"window_length={cache.window_length}. Take a longer window, or pass fewer pictures"
        )
    if num_new == 1:
        return "a single new token is passed, and the last one never stands for a picture. Pass the tokens of the picture too"
    if cache.get_seq_length() > 0 and not call.pictures.keys().isdisjoint(TOKEN_TYPES):
        return SEE_EACH_OTHER
    return None
