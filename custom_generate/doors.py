"""What is checked where something comes in: numbers, models, tokens and passes. Each error names the value, and says what to
do."""

import torch

from .plan import Pass
from .probe import MAX_EXACT_POSITION, ModelTraits
from .releases import MODELS_ASK_FOR_QUERY_OFFSET
from .window import Window


def check_count(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r} ({type(value).__name__}).")


def check_numbers(window_length, num_sink_tokens) -> None:
    for name, value in (("window_length", window_length), ("num_sink_tokens", num_sink_tokens)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be an int, got {value!r} ({type(value).__name__}).")
    if window_length < 1:
        raise ValueError(f"window_length must be at least 1, got {window_length}: no token could attend even to itself.")
    if not 0 <= num_sink_tokens < window_length:
        raise ValueError(
            f"num_sink_tokens must be at least 0 and less than window_length={window_length}, got {num_sink_tokens}: the window "
            "holds the sinks and at least the token being processed."
        )


def check_model(model: torch.nn.Module, traits: ModelTraits, windows: dict[int, Window], is_static: bool) -> None:
    """Refuse a model to which this kind of cache can't be bound. `windows`: of each layer with keys."""
    if is_static and traits.is_ordered:
        raise ValueError(
            f"The static mode can't serve {type(model).__name__}, which depends on the order of the keys. Leave it out."
        )
    masks = {(traits.layer_types[index] if traits.layer_types else "", window) for index, window in windows.items()}
    if not traits.is_ordered and len(masks) > len({name for name, _ in masks}):
        raise ValueError(
            f"SinkCache gives one mask to all layers of a type, and layers of {type(model).__name__} that share a mask have "
            "windows of different lengths."
        )


def check_same(model: torch.nn.Module, bound: torch.nn.Module | None, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse another model than the model to which a cache is bound, or one that has changed since."""
    if bound is not model:
        raise ValueError(
            f"This cache was made for another model, and its keys mean nothing to this {type(model).__name__}. Make a new one "
            "with SinkCache.from_model(model, ...)."
        )
    if (dtype, device) != (model.dtype, model.device):
        raise ValueError(
            f"The model is now in {model.dtype} on {model.device}, and this cache was made for it in {dtype} on {device}. Make "
            "a new one with SinkCache.from_model(model, ...)."
        )


def check_tensors(**values) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a Tensor, got {value!r:.50} ({type(value).__name__}).")


def check_tokens(tokens, num_dims: int, attention_mask, cache) -> list[int]:
    """Refuse what is no batch of tokens with its mask. Returns the number of tokens of each row, or a single one for all."""
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != num_dims or 0 in tokens.shape[:2]:
        shape = f"shape {tuple(tokens.shape)}" if isinstance(tokens, torch.Tensor) else f"{tokens!r:.50}"
        raise ValueError(
            f"No tokens: pass input_ids [batch, num_columns], or inputs_embeds [batch, num_columns, hidden], with at least one "
            f"column; got {shape}."
        )
    batch_size, num_columns = tokens.shape[:2]
    if num_dims == 2 and (tokens.is_floating_point() or tokens.dtype == torch.bool):
        raise ValueError(f"input_ids must be whole numbers, got {tokens.dtype}. Embeddings are passed as inputs_embeds.")
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
    reason = None
    if not isinstance(num_parts, int) or isinstance(num_parts, bool) or num_parts < 1:
        reason = "it must be an int of at least 1. Take num_parts_of(num_columns)"
    elif num_columns % num_parts:
        reason = f"{num_columns} tokens can't be divided into so many parts of one length. Take num_parts_of({num_columns})"
    elif min(num_new) < num_columns:
        reason = "a row has padding. Leave it out"
    elif not takes_parts:
        reason = "the window of a row is not full yet, or layers of the model have to go through a row in one piece. Leave it out"
    if reason is not None:
        raise ValueError(f"num_parts={num_parts!r} can't be used for this pass: {reason}.")


def check_pass(current: Pass, traits: ModelTraits, window_length: int, evicts: bool) -> None:
    """Refuse a pass that goes past what the model can do in one pass."""
    num_padding = current.num_columns - max(current.num_new)
    if traits.is_ordered and num_padding > 0:
        raise ValueError(
            f"All rows begin with {num_padding} columns of padding, which this model would count: its scores depend on the order "
            "of the keys. Leave these columns out."
        )
    if evicts and traits.is_ordered:
        raise ValueError(
            f"{current.num_columns} tokens at once go past the window of {window_length}, and the scores of this model depend on "
            "the order of the keys. Feed them one by one."
        )
    limit = traits.max_positions
    if limit is not None:
        last = max(after - start for after, start in zip(current.num_after, current.base))
        if max(current.num_columns, last) > limit:
            raise ValueError(
                f"{current.num_columns} tokens at once go past the {limit} positions of this model. Feed fewer at once."
            )


def check_unprepared(traits: ModelTraits, stream, num_columns: int, num_rows: int = 1) -> None:
    """Refuse a pass whose positions and masks the model makes by itself, where these would be wrong."""
    if num_rows > 1:
        raise ValueError(
            f"Without `prepare`, several rows (here {num_rows}) can't be served: this cache can't tell padding of a batch from "
            "its tokens, and padding would become the sinks. Call model(**cache.prepare(input_ids, attention_mask)), or "
            "generate with custom_generate."
        )
    num_after = max(stream.num_tokens) + num_columns
    length = min(layer.window.length for layer in stream.layers.values())
    max_positions = min(traits.max_positions or MAX_EXACT_POSITION, MAX_EXACT_POSITION)
    reason = None
    if num_columns > 1 and num_after > length:
        reason = f"{num_columns} tokens at once go past the window of {length}, and need a mask of their own"
    elif traits.is_ordered:
        reason = "the scores of this model depend on the order of the keys, which it takes from the mask"
    elif traits.has_local_attention and not MODELS_ASK_FOR_QUERY_OFFSET:
        reason = "this release of transformers makes a mask for layers with native windows or chunks that does not fit"
    elif traits.is_recurrent:
        reason = "the recurrent layers of this model are told by `prepare` what is padding, and positions by nobody else"
    elif any(stream.base):
        reason = "the keys so far stand at positions that `prepare` chose"
    elif num_after > max_positions:
        reason = f"position {num_after - 1} is more than this model can tell apart"
    if reason is not None:
        raise ValueError(
            f"This pass can't be exact as it is: {reason}. Call model(**cache.prepare(input_ids)), or generate with "
            "custom_generate."
        )


def check_crop(num_removed: int, stream, traits: ModelTraits) -> None:
    if traits.is_recurrent:
        raise ValueError(f"Can't take back {num_removed} tokens: this model has recurrent states, and they can't be turned back.")
    if num_removed > min(stream.num_seen):
        raise ValueError(f"Can't take back {num_removed} tokens: a row of the cache has seen only {min(stream.num_seen)}.")
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


def wrong_model(shape: torch.Size, made_for: torch.Size) -> ValueError:
    """For keys `[rows, heads, columns, head_dim]` that do not fit to the slots of a cache."""
    return ValueError(
        f"This cache was made for keys of {made_for[1]} heads of {made_for[3]} dimensions, and the model brings {shape[1]} heads "
        f"of {shape[3]}: it is another model. Make a new one with SinkCache.from_model(model, ...)."
    )


def wrong_pass(prepared: Pass, num_rows: int, num_columns: int) -> ValueError:
    return ValueError(
        f"The pass was prepared for {prepared.batch_size * prepared.num_parts} rows of {prepared.part_length} tokens, and the "
        f"model brings {num_rows} rows of {num_columns}. Call the model with exactly what `prepare` returns."
    )


def wrong_rows(num_rows: int, num_passed: int) -> ValueError:
    return ValueError(f"This cache holds {num_rows} rows, and {num_passed} are passed. Pass as many, or a new cache.")
