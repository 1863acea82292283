"""What the scripts share: where the repository is, and how they load a model and this repository's code."""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "custom_generate"))

from generate import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(ROOT), help="Hub id or folder (default: the model of this repository)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and cache (default: %(default)s)")


def load_weights(args: argparse.Namespace):
    """The model that the arguments name, in its dtype from the start: a conversion would round its rotary frequencies as well."""
    dtype = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    return AutoModelForCausalLM.from_pretrained(args.model, **{dtype: DTYPES[args.dtype]}).to(args.device).eval()


def load_model(args: argparse.Namespace):
    """That model and its tokenizer."""
    return load_weights(args), AutoTokenizer.from_pretrained(args.model)


__all__ = [
    "DEFAULT_NUM_SINK_TOKENS",
    "DEFAULT_WINDOW_LENGTH",
    "DTYPES",
    "ROOT",
    "add_model_arguments",
    "load_model",
    "load_weights",
]
