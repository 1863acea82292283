"""The text that a call passes, its pictures, and which of its tokens a cache has not seen."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers.utils import logging

from .doors import check_tensors, check_tokens
from .options import TOKEN_TYPES, Call, refusal
from .plan import last_columns
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
        mask = None if min(num_tokens) == num_columns else last_columns(num_tokens, num_columns, self.tokens.device).long()
        return Prompt(self.tokens[:, -num_columns:], mask, self.name)


def whole_prompt(call: Call, cache) -> Prompt:
    """The text that the call passes. If it passes none, `input_ids` becomes the last token returned for each row, which the cache
    has not seen, or, for a new cache, the token that begins texts."""
    arguments, device = call.arguments, input_device(call.model)
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    check_tensors(input_ids=ids, attention_mask=mask, inputs_embeds=arguments.get("inputs_embeds"))
    if arguments.get("inputs_embeds") is not None:
        if mask is None and ids is not None and ids.shape == arguments["inputs_embeds"].shape[:2]:
            mask = _with_inferred_mask(ids, call).mask
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
    elif ids is None and call.option("bos_token_id") is not None:
        ids = arguments["input_ids"] = torch.full((1, 1), call.option("bos_token_id"), dtype=torch.long, device=device)
    return Prompt(ids, mask) if mask is not None else _with_inferred_mask(ids, call)


def _with_inferred_mask(ids: torch.Tensor | None, call: Call) -> Prompt:
    """Padding is the padding token where it begins a row, unless it also ends texts. (transformers takes it anywhere.)"""
    pad, ends = call.option("pad_token_id"), call.option("eos_token_id")
    pad, ends = ([] if each is None else torch.as_tensor(each).flatten().tolist() for each in (pad, ends))
    if ids is None or ids.ndim != 2 or 0 in ids.shape or len(pad) != 1:
        return Prompt(ids)
    is_padding = ids == pad[0]
    if bool(is_padding.any()) and pad[0] not in ends:
        return Prompt(ids, (~is_padding).long().cummax(dim=1).values, padding_id=pad[0])
    for column, place, harm in ((0, "begin", "become the sinks"), (-1, "end", "the text goes on behind them")):
        if bool(is_padding[:, column].any()) and not bool(is_padding[:, column].all()):
            logging.get_logger(__name__).warning(
                f"Some rows of the batch {place} with the padding token, but it also ends texts and no attention_mask is passed: "
                f"they are taken for tokens, and {harm}. Pad on the left, and pass the attention_mask that the tokenizer returns."
            )
    return Prompt(ids)


def unseen_part(prompt: Prompt, cache, num_copies: int = 1) -> Prompt:
    """The part of a prompt that the cache has not seen yet: the prompt is the whole text, the end of it, or only what is new.

    Raises:
        ValueError: it can't be told, or the text is not the one that the cache has seen.
    """
    if num_copies > 1 and getattr(prompt.tokens, "ndim", 0) > 0 and cache.batch_size == len(prompt.tokens) * num_copies:
        prompt = prompt.repeat(num_copies)  # for a cache that beams or several return sequences have left
    num_tokens = check_tokens(prompt.tokens, 3 if prompt.name == "inputs_embeds" else 2, prompt.mask, cache)
    num_rows, num_columns = prompt.tokens.shape[:2]
    num_tokens *= num_rows // len(num_tokens)  # without a mask, it is one number for all
    num_seen, returned = cache.get_seq_length(), cache.unseen_token_ids or [None] * num_rows
    num_masked = num_columns if prompt.mask is None else prompt.mask.shape[1]
    only_new = num_masked > num_columns  # the way of transformers: the new tokens, and a mask for all
    if only_new and num_masked != num_seen + num_columns:
        raise ValueError(
            f"attention_mask has {num_masked} columns, and must have {num_columns} or, with only the new tokens of a text in "
            f"input_ids, {num_seen + num_columns}."
        )
    if num_seen > 0 and not only_new:
        ids = prompt.tokens.tolist() if prompt.name == "input_ids" else [[None] * num_columns] * num_rows
        num_tokens = [SeenRow(cache, row).num_new(ids[row], num, prompt.padding_id) for row, num in enumerate(num_tokens)]
    if 0 in num_tokens:
        raise ValueError(f"Row {num_tokens.index(0)} of the prompt is all padding: there is nothing to continue.")
    if prompt.name == "input_ids" and (only_new or prompt.padding_id is not None):
        for row, num_new in enumerate(num_tokens):
            _check_new(row, prompt.tokens[row, -num_new:].tolist(), returned[row], prompt.padding_id)
    return prompt.last(num_tokens)


def _check_new(row: int, ids: list[int], unseen: int | None, padding_id: int | None) -> None:
    """Refuse new tokens that do not begin with the token that `generate` returned last, where a mask says that they are new; and
    padding tokens among them, where there is no mask."""
    if padding_id is None and unseen is not None and ids[0] != unseen:
        raise ValueError(
            f"The last token returned for row {row}, {unseen}, has not been through the model, and input_ids begins with "
            f"{ids[0]} after it. Pass sequences[:, cache.get_seq_length():] and then your new tokens."
        )
    if padding_id is not None and padding_id in (ids[1:] if unseen == padding_id else ids):
        raise ValueError(
            f"Row {row} has the padding token among its new tokens. No attention_mask is passed, and pad_token_id={padding_id} "
            "does not tell whether that is padding or text. Pass attention_mask; torch.ones_like(input_ids) if it is text."
        )


class SeenRow:
    """What a cache knows of the text in one of its rows.

    Attributes:
        first: the ids of the first tokens that it holds, in order. None if it does not know them, because embeddings were passed.
        recent: the ids of the most recent tokens that it holds, in order.
        unseen: the token that `generate` returned last, which has not been through the model.
    """

    def __init__(self, cache, row: int):
        self.row, self.num_seen, self.window_length = row, cache.num_tokens_seen_by_row[row], cache.window_length
        known = cache.known_token_ids(row)
        self.first, self.recent = (None, None) if known is None else [ids.tolist() for ids in known]
        self.unseen = None if cache.unseen_token_ids is None else cache.unseen_token_ids[row]

    def num_new(self, ids: list, num_tokens: int, padding_id: int | None) -> int:
        """How many of the last tokens of a row are new, if its mask says that it has `num_tokens`. `ids`: None for embeddings.

        If the mask was inferred, a padding token at the left is a token all the same where the cache knows it as a token.
        """
        texts = [ids[-length:] for length in self._possible_lengths(num_tokens, padding_id) if 0 < length <= len(ids)]
        if not texts:
            return 0
        found = {self._num_new_of(text) for text in texts} - {None}
        if len(found) == 1:
            return found.pop()
        if padding_id is not None and num_tokens < len(ids):
            reason = f"Which of its padding tokens are text was inferred, from pad_token_id={padding_id}. Pass attention_mask."
        elif self.first is None and self.unseen is not None and ids[-1] is not None:
            reason = (
                f"Without ids to compare, new tokens are told by their first, the last one that was returned ({self.unseen}), "
                f"and a whole text by having it behind {self.num_seen} tokens. Here both hold, or neither: pass only the new "
                "tokens, with an attention_mask for the whole text."
            )
        elif self.first is None or ids[-1] is None:
            reason = (
                f"Without ids to compare, only a text of more than {self.num_seen} tokens can be told from new tokens. Pass the "
                "whole text, or the new tokens with an attention_mask for the whole text."
            )
        else:
            reason = self._mistake(ids[-num_tokens:])
        raise ValueError(
            f"Can't tell which of the {num_tokens} tokens passed for row {self.row} are new: they do not continue the "
            f"{self.num_seen} that the cache has seen. {reason}"
        )

    def _possible_lengths(self, num_tokens: int, padding_id: int | None) -> set[int]:
        """How many tokens a row may have, with `num_tokens` behind the padding tokens at its left."""
        lengths = {num_tokens}
        if padding_id is not None and self.unseen == padding_id:
            lengths.add(num_tokens + 1)
        if padding_id is not None and self.first is not None:  # the text begins with them; its last `window_length` tokens do
            beginning = self.recent if len(self.recent) == self.num_seen else self.first
            num_first = next((at for at, token in enumerate(beginning) if token != padding_id), len(beginning))
            lengths |= {num_tokens + num_first, max(num_tokens, self.window_length)}
        return lengths

    def _num_new_of(self, ids: list) -> int | None:
        """How many of these tokens are new: they are the whole text, the end of it, or only what is new. None if they aren't."""
        num_tokens, num_behind = len(ids), len(ids) - self.num_seen
        if ids[-1] is None or self.first is None and self.unseen is None:
            return num_behind if num_behind > 0 else None
        if self.first is None:  # the token returned last begins what is new
            is_whole, may_be_end = num_behind > 0 and ids[-num_behind] == self.unseen, num_tokens == self.window_length
            if ids[0] != self.unseen:
                return num_behind if is_whole else None
            return None if is_whole or may_be_end and self.unseen in ids[1:] else num_tokens
        if num_behind > 0 and not self._differences(ids):
            return num_behind
        overlap = self._overlap(ids)
        if overlap > 0 and num_tokens == self.window_length and (ids[0] != self.unseen or ids[overlap] == self.unseen):
            return num_tokens - overlap
        if self.unseen is not None and ids[0] != self.unseen or num_behind > 0:
            return None
        if num_tokens == 1 and self.unseen is not None:
            return num_tokens
        # Whether two tokens or more repeat the end of the text, before the one that was returned last or another in its place.
        is_end = min(overlap, len(self.recent)) > 1 and (ids[overlap] == self.unseen or num_tokens == self.window_length)
        return None if is_end or self._begins(ids) else num_tokens

    def _begins(self, ids: list[int]) -> bool:
        """Whether the tokens begin as the text does, as far as that is known."""
        return len(self.first) > 0 and ids[: len(self.first)] == self.first[: len(ids)]

    def _overlap(self, ids: list[int]) -> int:
        """The largest number of tokens at their beginning that are the last ones of the text, if new ones follow. If they begin
        with the token that was returned last: the largest that it follows, if any, since a text may say it several times."""
        lengths, num_known = range(1, min(len(ids) - 1, self.num_seen) + 1), len(self.recent)
        found = [num for num in lengths if ids[max(num - num_known, 0) : num] == self.recent[max(num_known - num, 0) :]]
        return max(found, key=lambda num: (ids[0] == self.unseen == ids[num], num), default=0)

    def _differences(self, ids: list[int]) -> list[tuple[int, int]]:
        """The tokens held that are others in this text: the number of each, and its id that was seen."""
        begin = self.num_seen - len(self.recent)
        held = [*enumerate(self.first[:begin]), *enumerate(self.recent, begin)]
        return [(at, token) for at, token in held if at < len(ids) and ids[at] != token]

    def _mistake(self, ids: list[int]) -> str:
        """Why it can't be told which of the tokens are new, and what to do."""
        is_longer, begins = len(ids) > self.num_seen, self._begins(ids)
        if ids[0] == self.unseen and is_longer != begins:
            return "They begin with the last one that was returned. If all are new, pass an attention_mask for the whole text."
        if not is_longer and not begins:
            if self._overlap(ids) > 1:
                end = f". Of its end, pass the last {self.window_length} tokens (no more, no less)"
                if len(ids) == self.window_length:
                    end = f", with another token where {self.unseen} was returned. If they are its end, keep {self.unseen} there"
                if ids[0] == self.unseen:
                    return f"They begin within the text{end}. If all are new, pass an attention_mask for the whole text."
                return f"They begin within the text{end}, the new ones among them."
            return (
                f"New tokens have to begin with the last one that was returned, {self.unseen}, which the cache has not seen. "
                "Pass sequences[:, cache.get_seq_length():] and then the new ids."
            )
        differences = self._differences(ids)
        if not differences:
            return f"They are no more than the {self.num_seen} seen. Pass the whole text, with the tokens that were returned."
        at, seen = differences[0]
        remedy = "If the text was decoded and tokenized again, keep the ids: torch.cat([sequences, new_ids], 1)."
        remedy = remedy if at > 0 else "For another text, pass a new cache."
        return f"The first difference is at token {at}: {ids[at]} is passed, {seen} was seen. {remedy}"


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
    # Of the types, which the call passes for all tokens, those of this pass.
    types = {name: call.pictures[name][:, -unseen.num_columns : -1] for name in TOKEN_TYPES if name in call.pictures}
    return replace(unseen, pictures=call.pictures | types)


def _reason_against_pictures(unseen: Prompt, prompt: Prompt, call: Call, cache) -> str | None:
    num_rows, num_columns, num_new = len(prompt.tokens), prompt.num_columns, unseen.num_columns
    if any(hasattr(module, "get_rope_index") for module in call.model.modules()):
        return f"{type(call.model).__name__} gives pictures positions in three dimensions, the cache has one. Text alone works"
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
