"""The text that a call passes, and its pictures."""

import inspect
from dataclasses import dataclass, field, replace

import torch
from transformers.utils import logging

from .options import TOKEN_TYPES, Call
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
        pictures: arguments of the model that go with the tokens, in one pass.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    name: str = "input_ids"
    padding_id: int | None = None
    pictures: dict = field(default_factory=dict)

    @property
    def num_columns(self) -> int:
        return self.tokens.shape[1]

    @property
    def begins_without_padding(self) -> bool:
        """And so, as padding is on the left, has none."""
        return self.mask is None or bool(self.mask[:, 0].all())

    @property
    def arguments(self) -> dict:
        return {self.name: self.tokens, "attention_mask": self.mask}

    def split(self, num_columns: int) -> tuple["Prompt", "Prompt"]:
        masks = (None, None) if self.mask is None else (self.mask[:, :num_columns], self.mask[:, num_columns:])
        parts = self.tokens[:, :num_columns], self.tokens[:, num_columns:]
        types = {name: self.pictures[name][:, -self.num_columns :] for name in TOKEN_TYPES if name in self.pictures}
        types = {name: value[:, :num_columns] for name, value in types.items()}
        pictures = self.pictures | types, {}
        return tuple(replace(self, tokens=each[0], mask=each[1], pictures=each[2]) for each in zip(parts, masks, pictures))

    def followed_by(self, ids: torch.Tensor) -> "Prompt":
        """For one text."""
        return Prompt(torch.cat([self.tokens, ids.to(self.tokens)], dim=1), None) if ids.shape[1] else self

    def to(self, device: torch.device) -> "Prompt":
        return replace(self, tokens=self.tokens.to(device), mask=None if self.mask is None else self.mask.to(device))

    def repeat(self, num_copies: int) -> "Prompt":
        mask = self.mask if self.mask is None else self.mask.repeat_interleave(num_copies, 0)
        return replace(self, tokens=self.tokens.repeat_interleave(num_copies, 0), mask=mask)

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
    for name in ("input_ids", "attention_mask"):
        value = arguments.get(name)
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a Tensor, got {value!r:.50} ({type(value).__name__}).")
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
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
            mask = ids.new_ones(1, 1).expand(len(ids), cache.get_seq_length() + 1)  # a view, however long the text is
    elif ids is None and call.options["bos_token_id"] is not None:
        ids = arguments["input_ids"] = torch.full((1, 1), call.options["bos_token_id"], dtype=torch.long, device=device)
    return Prompt(ids, mask) if mask is not None else _with_inferred_mask(ids, call.options)


def _with_inferred_mask(ids: torch.Tensor | None, options: dict) -> Prompt:
    """Padding is the padding token where it begins a row, unless it also ends texts. (transformers takes it anywhere.)"""
    pad, eos = options["pad_token_id"], options["eos_token_id"]
    if ids is None or ids.ndim != 2 or not isinstance(pad, int):
        return Prompt(ids, None)
    is_padding = ids == pad
    if pad not in (eos if isinstance(eos, list | tuple) else [eos]):
        mask = (~is_padding).long().cummax(dim=1).values
        return Prompt(ids, mask, padding_id=pad) if bool(is_padding.any()) else Prompt(ids, None)
    if bool(is_padding[:, 0].any()) and not bool(is_padding[:, 0].all()):
        logging.get_logger(__name__).warning(
            "Some rows of the batch begin with the padding token, but it also ends texts and no attention_mask is passed: they "
            "are taken for tokens, and become the sinks. Pass the attention_mask that the tokenizer returns."
        )
    return Prompt(ids, None)


def with_pictures(unseen: Prompt, prompt: Prompt, call: Call, cache) -> Prompt:
    """What a cache has not seen of a prompt, with the pictures that the call passes for it. All but the last token goes through
    the model in one pass, for which the model itself puts the pictures where the text has tokens for them.

    Raises:
        ValueError: that pass can't be exact. The message says why.
    """
    if not call.pictures:
        return unseen
    name = max(call.pictures)  # pixel_values, where there are some
    strangers = sorted(call.pictures.keys() - inspect.signature(call.model.forward).parameters.keys())
    if strangers:
        name, reason = strangers[0], f"{type(call.model).__name__} does not take it. Leave it out"
    else:
        reason = _reason_against_pictures(unseen, prompt, call, cache)
    if reason is not None:
        raise ValueError(f"{name} can't be used with SinkCache: {reason}.")
    return replace(unseen, pictures=call.pictures)


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
