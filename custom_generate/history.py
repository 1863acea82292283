"""Which tokens of a prompt a cache has not seen: it is told the whole text, the end of it, or only what is new."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .doors import count_tokens
from .prompt import Prompt


def unseen_part(prompt: Prompt, cache, num_copies: int = 1) -> Prompt:
    """The part of a prompt that the cache has not seen yet.

    Raises:
        ValueError: it can't be told, or the text is not the one that the cache has seen.
    """
    _check_shape(prompt)
    if cache.batch_size == len(prompt.tokens) * num_copies and num_copies > 1:
        prompt = prompt.repeat(num_copies)  # for a cache that beams or several return sequences have left
    num_rows, num_columns = prompt.tokens.shape[:2]
    if cache.batch_size not in (-1, num_rows):
        raise ValueError(
            f"The cache that is passed holds {cache.batch_size} rows, and the prompt has {num_rows}. Pass as many rows, a new "
            "cache, or one brought to that size with batch_select_indices or batch_repeat_interleave."
        )
    num_seen = cache.get_seq_length()
    mask_of_all = (num_rows, num_seen + num_columns)
    only_new = num_seen > 0 and prompt.mask is not None and prompt.mask.shape == mask_of_all
    if only_new:  # the way of transformers: the new tokens, and a mask for all
        prompt = replace(prompt, mask=prompt.mask[:, -num_columns:])
        if prompt.name == "input_ids":
            _check_begins_with_unseen(prompt, cache.unseen_token_ids or ())
    if prompt.mask is not None and prompt.mask.shape != (num_rows, num_columns):
        others = f" or, with only the new tokens of a text in input_ids, {mask_of_all}" if num_seen else ""
        raise ValueError(f"attention_mask has shape {tuple(prompt.mask.shape)}, and must have {(num_rows, num_columns)}{others}.")
    num_tokens = [num_columns] * num_rows if prompt.mask is None else count_tokens(prompt.mask)
    if not only_new:
        num_tokens = [_num_new_tokens(prompt, cache, row, num) for row, num in enumerate(num_tokens)]
    if 0 in num_tokens:
        raise ValueError(f"Row {num_tokens.index(0)} of the prompt is all padding: there is nothing to continue.")
    return prompt.last(num_tokens)


def _check_shape(prompt: Prompt) -> None:
    tokens = prompt.tokens
    if tokens is None or 0 in tokens.shape:
        raise ValueError("An empty prompt: pass input_ids with at least one token.")
    if tokens.ndim != (3 if prompt.name == "inputs_embeds" else 2):
        raise ValueError(
            f"A prompt must have the shape [batch, num_tokens], got {tuple(tokens.shape)}. One text is input_ids[None]."
        )


def _check_begins_with_unseen(prompt: Prompt, unseen: Sequence[int]) -> None:
    for row, last in enumerate(unseen):
        first = int(prompt.tokens[row, prompt.mask[row].long().argmax()])
        if first != last:
            raise ValueError(
                f"The last token returned for row {row}, {last}, has not been through the model, and input_ids begins with "
                f"{first} after it. Pass sequences[:, cache.get_seq_length():] and then your new tokens."
            )


def _num_new_tokens(prompt: Prompt, cache, row: int, num_tokens: int) -> int:
    """How many of the last tokens of a row are new, if its mask says that it has so many.

    If the mask was inferred, a padding token at the left is a token all the same where the cache knows it as a token of the text.
    """
    if cache.get_seq_length() == 0 and prompt.padding_id is None:
        return num_tokens
    seen, padding_id = SeenRow.of(cache, row), prompt.padding_id
    ids = None if prompt.name == "inputs_embeds" else prompt.tokens[row].long().cpu()
    lengths = {num_tokens} if padding_id is None else seen.lengths_with(padding_id, num_tokens, len(ids))
    lengths.discard(0)
    if not lengths:
        return 0
    found = {seen.num_new(length, None if ids is None else ids[len(ids) - length :]) for length in lengths} - {None}
    if len(found) != 1:
        has_padding = padding_id is not None and num_tokens < len(ids)
        raise seen.refusal(num_tokens, None if ids is None else ids[len(ids) - num_tokens :], padding_id if has_padding else None)
    (num_new,) = found
    if padding_id is not None:
        is_padding = ids[len(ids) - num_new :] == padding_id
        if bool(is_padding[1:].any()) or bool(is_padding[0]) and seen.unseen != padding_id:
            raise ValueError(
                f"Row {row} has the padding token among its new tokens. No attention_mask is passed, and from pad_token_id="
                f"{padding_id} it can't be told whether that is padding or text. Pass attention_mask; torch.ones_like(input_ids) "
                "if it is text."
            )
    return num_new


@dataclass(frozen=True)
class SeenRow:
    """What a cache knows of the text in one of its rows.

    Attributes:
        first: the ids of the first tokens that it holds, in order. None if it does not know them, because embeddings were passed.
        recent: the ids of the most recent tokens that it holds, in order.
        unseen: the token that `generate` returned last, which has not been through the model.
    """

    row: int
    num_seen: int
    window_length: int
    first: torch.Tensor | None
    recent: torch.Tensor | None
    unseen: int | None

    @classmethod
    def of(cls, cache, row: int) -> "SeenRow":
        if cache.get_seq_length() == 0:
            return cls(row, 0, cache.window_length, None, None, None)
        first, recent = cache.known_token_ids(row) or (None, None)
        unseen = None if cache.unseen_token_ids is None else cache.unseen_token_ids[row]
        return cls(row, cache.num_tokens_seen_by_row[row], cache.window_length, first, recent, unseen)

    def num_new(self, num_tokens: int, ids: torch.Tensor | None) -> int | None:
        """How many of these tokens are new: they are the whole text, the end of it, or only what is new. None if they aren't."""
        if ids is None or self.first is None:
            return num_tokens - self.num_seen if num_tokens > self.num_seen else None
        if num_tokens > self.num_seen and ids[: len(self.first)].equal(self.first) and self._ends(ids[: self.num_seen]):
            return num_tokens - self.num_seen
        overlap = self._overlap(ids) if num_tokens == self.window_length else 0
        if overlap > 0 and (int(ids[0]) != self.unseen or int(ids[overlap]) == self.unseen):
            return num_tokens - overlap
        if self.unseen is not None and int(ids[0]) != self.unseen or num_tokens > self.num_seen:
            return None
        is_unseen = num_tokens == 1 and self.unseen is not None
        return num_tokens if is_unseen or not self._begins(ids) else None

    def _begins(self, ids: torch.Tensor) -> bool:
        """Whether the tokens begin as the text does, as far as that is known."""
        return len(self.first) > 0 and ids[: len(self.first)].equal(self.first[: len(ids)])

    def _ends(self, ids: torch.Tensor) -> bool:
        """Whether the tokens end as the text does, as far as that is known."""
        num = min(len(ids), len(self.recent))
        return ids[len(ids) - num :].equal(self.recent[len(self.recent) - num :])

    def _overlap(self, ids: torch.Tensor) -> int:
        """The largest number of tokens at their beginning that are the last ones of the text, if new ones follow."""
        lengths = range(min(len(ids) - 1, self.num_seen), 0, -1)
        return next((num for num in lengths if self._ends(ids[:num])), 0)

    def lengths_with(self, padding_id: int, num_tokens: int, num_columns: int) -> set[int]:
        """How many columns at the right of a row may be tokens, with `num_tokens` behind the padding tokens at its left."""
        lengths = {num_tokens}
        if self.unseen == padding_id:
            lengths.add(num_tokens + 1)
        if self.first is not None:  # the text begins with the padding token; its last `window_length` tokens do
            beginning = self.recent if len(self.recent) == self.num_seen else self.first
            num_first = int((beginning == padding_id).long().cumprod(0).sum())
            lengths |= {num_tokens + num_first, max(num_tokens, self.window_length)}
        return {length for length in lengths if length <= num_columns}

    def refusal(self, num_tokens: int, ids: torch.Tensor | None, padding_id: int | None) -> ValueError:
        """Of tokens from which it can't be told which of them are new: what is wrong, and what to do."""
        if padding_id is not None:
            reason = f"Which of its padding tokens are text was inferred, from pad_token_id={padding_id}. Pass attention_mask."
        elif ids is None or self.first is None:
            reason = (
                f"Without ids to compare, only a text of more than {self.num_seen} tokens can be told from new tokens. Pass the "
                "whole text, or the new tokens with an attention_mask for the whole text."
            )
        else:
            reason = self._mistake(ids)
        return ValueError(
            f"Can't tell which of the {num_tokens} tokens passed for row {self.row} are new: they do not continue the "
            f"{self.num_seen} that the cache has seen. {reason}"
        )

    def _mistake(self, ids: torch.Tensor) -> str:
        is_longer, begins = len(ids) > self.num_seen, self._begins(ids)
        if int(ids[0]) == self.unseen and is_longer != begins:
            return "They begin with the last one that was returned. If all are new, pass an attention_mask for the whole text."
        if is_longer or begins:
            return self._difference(ids)
        if self._overlap(ids) > 1:
            return f"They begin within the text. Of its end, pass the last {self.window_length} tokens (no more, no less)."
        return (
            f"New tokens have to begin with the last one that was returned, {self.unseen}, which the cache has not seen. Pass "
            "sequences[:, cache.get_seq_length():] and then the new ids."
        )

    def _difference(self, ids: torch.Tensor) -> str:
        """Of a whole text that is another one, or too short."""
        num_seen, num_recent = self.num_seen, len(self.recent)
        first = self.first[: num_seen - num_recent]
        seen = dict(enumerate(first.tolist())) | dict(enumerate(self.recent.tolist(), start=num_seen - num_recent))
        differences = [at for at, token in seen.items() if at < len(ids) and ids[at] != token]
        if not differences:
            return "They are not longer than what it has seen. Pass the whole text, with the tokens that were returned."
        at = differences[0]
        reason = f"The first difference is at token {at}: {int(ids[at])} is passed, {seen[at]} was seen. "
        if at == 0:
            return f"{reason}For another text, pass a new cache."
        return f"{reason}If the text was decoded and tokenized again, keep the ids: torch.cat([sequences, new_ids], 1)."
