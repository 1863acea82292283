"""What the scripts share: where the repository is, how they load a model and this repository's code, and their blocks in the README."""

import argparse
import re
import sys
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
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


def _split_readme(name: str) -> list[str]:
    """The README before, in and after the block between `<!-- name: begin -->` and `<!-- name: end -->`."""
    parts = re.split(
        rf"(?<=<!-- {name}: begin -->\n)(.*)(?=\n<!-- {name}: end -->)", README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if len(parts) != 3:
        sys.exit(f"README.md has no block <!-- {name}: begin --> ... <!-- {name}: end -->: nothing was read or written.")
    return parts


def readme_block(name: str) -> str:
    """What the block of that name in the README says."""
    return _split_readme(name)[1]


def write_readme_block(name: str, text: str) -> None:
    before, _, after = _split_readme(name)
    README.write_text(before + text + after, encoding="utf-8")


__all__ = [
    "DEFAULT_NUM_SINK_TOKENS",
    "DEFAULT_WINDOW_LENGTH",
    "DTYPES",
    "README",
    "ROOT",
    "add_model_arguments",
    "load_model",
    "load_weights",
    "readme_block",
    "write_readme_block",
]
