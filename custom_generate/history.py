"""Which tokens of a prompt a cache has not seen: it is told the whole text, the end of it, or only what is new."""

from dataclasses import replace

from .doors import count_tokens
from .prompt import Prompt


def unseen_part(prompt: Prompt, cache, num_copies: int = 1) -> Prompt:
    """The part of a prompt that the cache has not seen yet.

    Raises:
        ValueError: it can't be told, or the text is not the one that the cache has seen.
    """
    _check_shape(prompt)
    if num_copies > 1 and cache.batch_size == len(prompt.tokens) * num_copies:
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
    if prompt.mask is not None and prompt.mask.shape != (num_rows, num_columns):
        others = f" or, with only the new tokens of a text in input_ids, {mask_of_all}" if num_seen else ""
        raise ValueError(f"attention_mask has shape {tuple(prompt.mask.shape)}, and must have {(num_rows, num_columns)}{others}.")
    num_tokens = [num_columns] * num_rows if prompt.mask is None else count_tokens(prompt.mask)
    if num_seen > 0 and not only_new:
        ids = prompt.tokens.tolist() if prompt.name == "input_ids" else [[None] * num_columns] * num_rows
        num_tokens = [SeenRow(cache, row).num_new(ids[row], num, prompt.padding_id) for row, num in enumerate(num_tokens)]
    if 0 in num_tokens:
        raise ValueError(f"Row {num_tokens.index(0)} of the prompt is all padding: there is nothing to continue.")
    if prompt.name == "input_ids" and (only_new or prompt.padding_id is not None):
        for row, num_new in enumerate(num_tokens):
            unseen = None if cache.unseen_token_ids is None else cache.unseen_token_ids[row]
            _check_new(row, prompt.tokens[row, -num_new:].tolist(), unseen, prompt.padding_id)
    return prompt.last(num_tokens)


def _check_shape(prompt: Prompt) -> None:
    tokens = prompt.tokens
    if tokens is None or 0 in tokens.shape:
        raise ValueError("An empty prompt: pass input_ids with at least one token.")
    if tokens.ndim != (3 if prompt.name == "inputs_embeds" else 2):
        raise ValueError(
            f"A prompt must have the shape [batch, num_tokens], got {tuple(tokens.shape)}. One text is input_ids[None]."
        )


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
            f"Row {row} has the padding token among its new tokens. No attention_mask is passed, and from pad_token_id="
            f"{padding_id} it can't be told whether that is padding or text. Pass attention_mask; torch.ones_like(input_ids) "
            "if it is text."
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
        if self.first is None or ids[-1] is None:
            return num_behind if num_behind > 0 else None
        if num_behind > 0 and not self._differences(ids):
            return num_behind
        overlap = self._overlap(ids) if num_tokens == self.window_length else 0
        if overlap > 0 and (ids[0] != self.unseen or ids[overlap] == self.unseen):
            return num_tokens - overlap
        if self.unseen is not None and ids[0] != self.unseen or num_behind > 0:
            return None
        is_unseen = num_tokens == 1 and self.unseen is not None
        return num_tokens if is_unseen or not self._begins(ids) else None

    def _begins(self, ids: list[int]) -> bool:
        """Whether the tokens begin as the text does, as far as that is known."""
        return len(self.first) > 0 and ids[: len(self.first)] == self.first[: len(ids)]

    def _overlap(self, ids: list[int]) -> int:
        """The largest number of tokens at their beginning that are the last ones of the text, if new ones follow."""
        for num in range(min(len(ids) - 1, self.num_seen), 0, -1):
            num_known = min(num, len(self.recent))
            if ids[num - num_known : num] == self.recent[len(self.recent) - num_known :]:
                return num
        return 0

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
                return f"They begin within the text. Of its end, pass the last {self.window_length} tokens (no more, no less)."
            return (
                f"New tokens have to begin with the last one that was returned, {self.unseen}, which the cache has not seen. "
                "Pass sequences[:, cache.get_seq_length():] and then the new ids."
            )
        differences = self._differences(ids)
        if not differences:
            return "They are not longer than what it has seen. Pass the whole text, with the tokens that were returned."
        at, seen = differences[0]
        remedy = "If the text was decoded and tokenized again, keep the ids: torch.cat([sequences, new_ids], 1)."
        remedy = remedy if at > 0 else "For another text, pass a new cache."
        return f"The first difference is at token {at}: {ids[at]} is passed, {seen} was seen. {remedy}"
