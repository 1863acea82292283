import gc
import os
import sys
from pathlib import Path

# Small tensors: more threads only wait for each other. Said before torch is imported, and so to each process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import build_model

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def pytest_addoption(parser):
    parser.addoption(
        "--model", default=None, help="Hub id or folder of the model for tests/test_parity.py (default: the tiny model)"
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _imported_for_good():
    """The objects of torch and transformers, hundreds of thousands, stay until the end: garbage is not looked for among them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def model(request) -> torch.nn.Module:
    """Shared by the tests of a file: of the family that the file calls MODEL, or a Llama, with sdpa attention."""
    return build_model(getattr(request.module, "MODEL", "llama"), "sdpa")


@pytest.fixture(scope="session")
def tiny_model_folder() -> str:
    return str(ROOT)


@pytest.fixture
def tiny_model():
    return AutoModelForCausalLM.from_pretrained(ROOT).float().eval()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)
