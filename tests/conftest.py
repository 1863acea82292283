import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def pytest_addoption(parser):
    parser.addoption(
        "--model", default=None, help="Hub id or folder of the model for tests/test_parity.py (default: the tiny model)"
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small tensors: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_folder() -> str:
    return str(ROOT)


@pytest.fixture
def tiny_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ROOT).float().eval()


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT)
