"""What the tests have in common: streams of tokens, ways to feed them, and one measure of difference."""

import contextlib
import importlib.util

import pytest
import torch
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from custom_generate.generate import SinkCache
from custom_generate.releases import LinearAttentionLayer
from families import TRANSFORMERS, VOCAB_SIZE
from oracle import TOLERANCE
from zoo import build_zoo_model

WINDOW_LENGTH, NUM_SINK_TOKENS = 16, 4
WINDOW = {"window_length": WINDOW_LENGTH, "num_sink_tokens": NUM_SINK_TOKENS}
RECORD = {"return_dict_in_generate": True, "output_logits": True}  # what `generate` is to return beside the text
NUM_TOKENS = 80  # five windows


def random_ids(num_tokens: int = NUM_TOKENS, seed: int = 1, num_rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (num_rows, num_tokens), generator=generator)


@torch.no_grad()
def feed(
    model, cache: SinkCache, input_ids: torch.Tensor, sizes: list[int | tuple[int, int]], attention_mask=None
) -> torch.Tensor:
    """Logits `[batch, num_tokens, vocab]` of a stream that is fed in passes of these sizes: `(size, num_parts)` is one in parts, where
    the model takes such passes."""
    logits, start = [], 0
    for size in sizes:
        size, num_parts = size if isinstance(size, tuple) else (size, 1)
        columns = slice(start, start + size)
        mask = None if attention_mask is None else attention_mask[:, columns]
        inputs = cache.prepare(input_ids[:, columns], mask, num_parts=num_parts if cache.takes_parts else 1)
        logits.append(model(**inputs).logits.unflatten(0, (len(input_ids), -1)).flatten(1, 2))
        start += size
    assert start == input_ids.shape[1]
    return torch.cat(logits, dim=1)


def build_recurrent_model(model_type: str, first_release: str = "5.5") -> torch.nn.Module:
    """A tiny model with recurrent states. Where the installed release has none of this type, or can't serve it, the test is skipped."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or TRANSFORMERS < Version(first_release):
        pytest.skip(f"transformers {TRANSFORMERS} has no {model_type}, or refuses it")
    model = build_zoo_model(model_type)
    try:
        cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    except ValueError as error:
        pytest.skip(f"refused with transformers {TRANSFORMERS}: {error}")
    assert any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers)
    return model


def rings_of(cache: SinkCache) -> list:
    """The keys and the values of every layer that has any, in this order."""
    return [ring for layer in cache.stream.layers.values() for ring in layer.rings]


def move_ahead(cache: SinkCache, num_tokens: int) -> None:
    """Let that many tokens more have gone by: a multiple of each ring and of the window, so that slots and positions fit."""
    lengths = {cache.window_length} | {ring.window.num_recent for ring in rings_of(cache)}
    assert all(num_tokens % length == 0 for length in lengths)
    assert all(seen >= cache.window_length for seen in cache.num_tokens_seen_by_row), "a window is still filling"
    cache.stream.num_seen = [seen + num_tokens for seen in cache.stream.num_seen]
    cache.stream.base = [base + num_tokens for base in cache.stream.base]


def is_installed(backend: str) -> bool:
    """Whether the package is there that quantizes."""
    package = {"quanto": "optimum", "hqq": "hqq"}.get(backend)
    return package is None or importlib.util.find_spec(package) is not None


def needs(backend: str) -> None:
    if not is_installed(backend):
        pytest.skip(f"{backend} is not installed")


@contextlib.contextmanager
def interrupted_at(module: torch.nn.Module):
    """Ctrl-C when a pass gets there."""

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[1, n]` of different lengths as one batch and its mask. Padding is a token like any other, to be ignored by the mask."""
    length = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), length), 7)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, length - row.shape[1] :] = row
        mask[index, length - row.shape[1] :] = 1
    return ids, mask


def difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, in standard deviations of the reference."""
    assert logits.shape == reference.shape
    return ((logits.float() - reference.float()).abs().max() / reference.float().std()).item()


def assert_same(logits: torch.Tensor, reference: torch.Tensor) -> None:
    assert reference.std() > 0.05, "flat logits: the comparison would mean nothing"
    assert difference(logits, reference) <= TOLERANCE
