"""What is checked where numbers, tokens and passes come in. Each error names the value, and says what to do."""

import torch

from .layers import wrong_dtypes
from .plan import Pass
from .probe import MAX_EXACT_POSITION, ModelTraits
from .releases import MODELS_ASK_FOR_QUERY_OFFSET


def check_count(name: str, value, least: int = 1, why: str = "") -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r} ({type(value).__name__}){why * is_int}.")


def check_arguments(window_length, num_sink_tokens, **modes: bool) -> None:
    check_count("window_length", window_length, why=": with less, no token could attend even to itself")
    check_count("num_sink_tokens", num_sink_tokens, least=0)
    if num_sink_tokens >= window_length:
        raise ValueError(
            f"num_sink_tokens must be less than window_length={window_length}, got {num_sink_tokens}: the window holds the sinks "
            "and at least the token being processed."
        )
    asked = [name for name, is_asked in modes.items() if is_asked]
    if len(asked) > 1:
        raise ValueError(f"A window can't be {' and '.join(asked)} at once: it is kept in one way. Choose one.")


def check_tensors(**values) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a Tensor, got {value!r:.50} ({type(value).__name__}).")


def check_tokens(tokens, num_dims: int, attention_mask, cache) -> list[int]:
    """Refuse what is no batch of tokens with its mask. Returns the number of tokens of each row, or a single one for all."""
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != num_dims or 0 in tokens.shape[:2]:
        shape = f"shape {tuple(tokens.shape)}" if isinstance(tokens, torch.Tensor) else f"{tokens!r:.50}"
        raise ValueError(
            "No tokens: pass input_ids [batch, num_columns] (one text is input_ids[None]), or inputs_embeds [batch, num_columns, "
            f"hidden], with at least one column; got {shape}."
        )
    batch_size, num_columns = tokens.shape[:2]
    if num_dims == 2 and (tokens.is_floating_point() or tokens.dtype == torch.bool):
        raise ValueError(f"input_ids must be whole numbers, got {tokens.dtype}. Embeddings are passed as inputs_embeds.")
    num_held = -1 if cache.stream is None else cache.stream.batch_size
    if num_held not in (-1, batch_size):
        raise ValueError(
            f"This cache holds {num_held} rows, and {batch_size} are passed. Pass as many, a new cache, this one after reset(), "
            "or one brought to that size with batch_select_indices or batch_repeat_interleave."
        )
    if attention_mask is None:
        return [num_columns]
    check_tensors(attention_mask=attention_mask)
    shape, has_seen = tuple(attention_mask.shape), cache.num_tokens_seen > 0
    may_be_longer = has_seen and len(shape) == 2 and shape[0] == batch_size and shape[1] > num_columns
    if shape != (batch_size, num_columns) and not may_be_longer:
        others = ", or more columns for tokens that the cache has seen" if has_seen else ""
        raise ValueError(f"attention_mask has shape {shape}, and must have {(batch_size, num_columns)}{others}.")
    return count_tokens(attention_mask[:, -num_columns:])


def count_tokens(attention_mask: torch.Tensor) -> list[int]:
    """The tokens of each row of a left-padded mask `[batch, length]`.

    Raises:
        ValueError: it is no such mask.
    """
    is_token = attention_mask.bool()
    is_neither = attention_mask != is_token
    if bool(is_neither.any()):
        raise ValueError(f"attention_mask must have 1 for a token and 0 for padding, got {attention_mask[is_neither][0].item()}.")
    rows = (is_token[:, :-1] & ~is_token[:, 1:]).any(dim=1)  # padding after a token
    if bool(rows.any()):
        raise ValueError(
            f"attention_mask of row {int(rows.nonzero()[0])} has padding on the right or a hole: tokens after it would be "
            'numbered wrongly. Pad on the left, tokenizer(..., padding=True, padding_side="left").'
        )
    return is_token.sum(dim=1).tolist()


def check_parts(num_columns: int, num_new: list[int], num_parts, takes_parts: bool) -> None:
    check_count("num_parts", num_parts, why=f"; num_parts_of({num_columns}) says how many are best")
    reason = None
    if num_columns % num_parts:
        reason = f"{num_columns} tokens can't be divided into so many parts of one length. Take num_parts_of({num_columns})"
    elif min(num_new) < num_columns:
        reason = "a row has padding. Leave it out"
    elif not takes_parts:
        reason = "the window of a row is not full yet, or layers of the model have to go through a row in one piece. Leave it out"
    if reason is not None:
        raise ValueError(f"num_parts={num_parts!r} can't be used for this pass: {reason}.")


def check_pass(current: Pass, traits: ModelTraits, shortest_length: int) -> None:
    num_columns, limit = current.num_columns, traits.max_positions
    num_padding = num_columns - max(current.num_new)
    if traits.is_ordered and num_padding > 0:
        raise ValueError(
            f"All rows begin with {num_padding} columns of padding, which this model would count: its scores depend on the order "
            "of the keys. Leave these columns out."
        )
    if traits.is_ordered and num_columns > 1 and max(current.num_after) > shortest_length:
        raise ValueError(
            f"{num_columns} tokens at once go past the window of {shortest_length}, and the scores of this model depend on "
            "the order of the keys. Feed them one by one."
        )
    if limit is not None:
        last = max(after - start for after, start in zip(current.num_after, current.base))
        if max(num_columns, last) > limit:
            raise ValueError(f"{num_columns} tokens at once go past the {limit} positions of this model. Feed fewer at once.")
    for row, (seen, new) in enumerate(zip(current.num_seen, current.num_new)) if traits.is_recurrent else ():
        if seen > 0 and new not in (0, num_columns):
            raise ValueError(
                f"Row {row} of the batch goes on by {new} tokens and another one by {num_columns}: the padding between would "
                "change its recurrent states as if it were text. Split the pass so that in each part a row has tokens in all "
                "columns or in none, or generate with custom_generate, which does."
            )


def check_unprepared(traits: ModelTraits, stream, num_columns: int, num_rows: int = 1) -> None:
    """Refuse a pass whose positions and masks the model makes by itself, where these would be wrong."""
    if num_rows > 1:
        raise ValueError(
            f"Without `prepare`, several rows (here {num_rows}) can't be served: padding can't be told from tokens, and would "
            "become sinks. Call model(**cache.prepare(input_ids, attention_mask)), or generate with custom_generate."
        )
    num_after = max(stream.num_tokens) + num_columns
    reason = None
    if num_columns > 1 and num_after > stream.shortest_length:
        reason = f"{num_columns} tokens at once go past the window of {stream.shortest_length}, and need a mask of their own"
    elif traits.is_ordered:
        reason = "the scores of this model depend on the order of the keys, which it takes from the mask"
    elif traits.has_local_attention and not MODELS_ASK_FOR_QUERY_OFFSET:
        reason = "this release of transformers makes a mask for layers with native windows or chunks that does not fit"
    elif traits.is_recurrent:
        reason = "the recurrent layers of this model are told by `prepare` what is padding, and positions by nobody else"
    elif any(stream.base):
        reason = "the keys so far stand at positions that `prepare` chose"
    elif num_after > min(traits.max_positions or MAX_EXACT_POSITION, MAX_EXACT_POSITION):
        reason = f"position {num_after - 1} is more than this model can tell apart"
    if reason is not None:
        remedy = "Call model(**cache.prepare(input_ids)), or generate with custom_generate"
        raise ValueError(f"This pass can't be exact as it is: {reason}. {remedy}.")


def check_rows(rows: list[int], batch_size: int) -> None:
    for row in rows:
        if type(row) is not int or not 0 <= row < batch_size:
            raise ValueError(f"There is no row {row!r}: this cache holds the rows 0 to {batch_size - 1}. Select from these.")


def check_crop(num_removed: int, stream, traits: ModelTraits) -> None:
    if traits.is_recurrent:
        raise ValueError(
            f"Can't take back {num_removed} tokens: this model has recurrent states, and they can't be turned back. To go back "
            "to a place in a text, make a copy there: copy.deepcopy(cache)."
        )
    if num_removed > min(stream.num_seen):
        raise ValueError(f"Can't take back {num_removed} tokens: a row has seen only {min(stream.num_seen)}. Take back fewer.")
    if max(stream.num_seen) > stream.num_intact and stream.num_recorded < num_removed:
        raise ValueError(
            f"Can't take back {num_removed} tokens: what they evicted is gone, but for that of the last {stream.num_recorded}. "
            "To go back to a place in a text, for another answer, make a copy there: copy.deepcopy(cache). For drafts, call "
            "activate_past_recording() before the passes that may be taken back."
        )


def in_use() -> ValueError:
    return ValueError(
        "This SinkCache is in use by another thread or call, and would mix two texts. Give each text a cache of its own, "
        "SinkCache.from_model(model, ...), or wait until the other is done."
    )


def check_keys(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, prepared: Pass | None) -> None:
    """Refuse keys `[rows, heads, columns, head_dim]` that do not fit to the slots of a cache or to the pass it has prepared."""
    (num_rows, num_heads, num_columns, head_dim), made_for = keys.shape, slots.shape
    if not keys.dtype == values.dtype == slots.dtype:
        raise wrong_dtypes(keys, values, slots.dtype)
    if (num_heads, head_dim) != made_for[1::2]:
        raise ValueError(
            f"This cache was made for keys of {made_for[1]} heads of {made_for[3]} dimensions, and the model brings {num_heads} "
            f"heads of {head_dim}: it is another model. Make a new one with SinkCache.from_model(model, ...)."
        )
    if prepared is not None and (num_rows, num_columns) != (prepared.batch_size * prepared.num_parts, prepared.part_length):
        raise ValueError(
            f"The pass was prepared for {prepared.batch_size * prepared.num_parts} rows of {prepared.part_length} tokens, and "
            f"the model brings {num_rows} rows of {num_columns}. Call the model with exactly what `prepare` returns."
        )
