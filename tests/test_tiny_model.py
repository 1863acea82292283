"""The model that stands beside `config.json`: small, whole, and it shows what sinks do to real text it has never seen."""

from pathlib import Path

import pytest
import torch

from common import stdlib_text
from custom_generate.generate import SinkCache

ROOT = Path(__file__).parents[1]
WINDOW_LENGTH = 128


@pytest.fixture(scope="module")
def texts(tokenizer) -> torch.Tensor:
    """Held-out files of at least 1,024 tokens, as a batch."""
    encoded = [tokenizer(text).input_ids for text in stdlib_text(held_out=True)]
    return torch.tensor([ids[:1024] for ids in encoded if len(ids) >= 1024][:8])


@torch.no_grad()
def nats(model, texts: torch.Tensor, cache: SinkCache | None) -> torch.Tensor:
    """Nats a token, `[batch, num_tokens - 1]`; cache None: all tokens at once."""
    if cache is None:
        logits = model(texts).logits
    else:
        logits = torch.cat([model(**cache.prepare(chunk)).logits for chunk in texts.split(64, dim=1)], dim=1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), texts[:, 1:], reduction="none")


def test_it_is_small():
    assert (ROOT / "model.safetensors").stat().st_size < 8 * 2**20


def test_it_shows_what_sinks_do(tiny_model, texts):
    """Full cache: fails past the training length. Plain window: collapses as soon as the first token is gone. Sinks: flat."""
    assert len(texts) == 8
    late = slice(512, None)
    full = nats(tiny_model, texts, None)
    plain = nats(tiny_model, texts, SinkCache.from_model(tiny_model, WINDOW_LENGTH, 0))
    sinks = nats(tiny_model, texts, SinkCache.from_model(tiny_model, WINDOW_LENGTH, 4))
    early = full[:, :WINDOW_LENGTH].mean()
    torch.testing.assert_close(plain[:, : WINDOW_LENGTH - 1], full[:, : WINDOW_LENGTH - 1], rtol=1e-3, atol=1e-3)
    assert full[:, late].mean() > early + 1.5
    assert plain[:, late].mean() > early + 0.5
    assert sinks[:, late].mean() < early + 0.2
