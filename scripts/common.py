"""What the scripts share: where the repository is, how they load a model and this repository's code, what they say of a run, and their
blocks in the README."""

import argparse
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
sys.path[:0] = [str(ROOT), str(ROOT / "custom_generate")]

from generate import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(ROOT), help="Hub id or folder (default: the model of this repository)")
    parser.add_argument("--revision", help="of a model on the Hub: branch, tag or commit (default: its main branch)")
    parser.add_argument("--gguf-file", help="a GGUF file of that model, in place of its weights (with the package gguf)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and cache (default: %(default)s)")


def load_weights(args: argparse.Namespace):
    """The model that the arguments name, in its dtype from the start: a conversion would round its rotary frequencies as well."""
    dtype = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    source = {"revision": args.revision, "gguf_file": args.gguf_file}
    model = AutoModelForCausalLM.from_pretrained(args.model, **source, **{dtype: DTYPES[args.dtype]})
    return model.to(args.device).eval()


def load_model(args: argparse.Namespace):
    """That model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision, gguf_file=args.gguf_file)
    return load_weights(args), tokenizer


def count(text: str) -> int:
    """The type of an argument: a number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def describe_run(args: argparse.Namespace) -> dict:
    """What all rows of a run have in common, whatever it measures."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": args.device,
        "device_name": device_name(args.device),
        "dtype": args.dtype,
        "num_threads": torch.get_num_threads(),
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where platform.processor() says little
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of this repository; empty where it is not a git checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except FileNotFoundError:
        return ""


def rounded(value):
    """As it is written into a file: floats with five digits."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def process_bytes() -> int | str:
    """Memory that this process takes now: where the system is Linux, which tells it."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else ""


def storage_bytes(holder) -> int:
    """Bytes of the storages of all tensors that an object holds. Views of a storage hold all of it, once."""
    storages, seen, found = {}, set(), [holder]
    while found:
        item = found.pop()
        if id(item) in seen or isinstance(item, type | torch.nn.Module | PretrainedConfig) or callable(item):
            continue
        seen.add(id(item))
        if hasattr(item, "__tensor_flatten__"):  # a tensor that is made of others, as a quantized one
            found += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
        elif isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            found += item.values()
        elif isinstance(item, list | tuple | set):
            found += item
        else:
            found += getattr(item, "__dict__", {}).values()
    return sum(storages.values())


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


def add_block_arguments(parser: argparse.ArgumentParser) -> None:
    """Of a script that makes a block of the README."""
    parser.add_argument("--check", action="store_true", help="exit with 1 if the README says something else")
    parser.add_argument("--write", action="store_true", help="write it into the README")


def check_or_write_block(args: argparse.Namespace, name: str, text: str) -> None:
    """What those arguments ask for."""
    if args.check and readme_block(name) != text:
        sys.exit(f"The block {name} of README.md is not what is found here. Run {Path(sys.argv[0]).name} --write.")
    if args.write:
        write_readme_block(name, text)


__all__ = [
    "DEFAULT_NUM_SINK_TOKENS",
    "DEFAULT_WINDOW_LENGTH",
    "DTYPES",
    "README",
    "ROOT",
    "add_block_arguments",
    "add_model_arguments",
    "check_or_write_block",
    "count",
    "describe_run",
    "load_model",
    "load_weights",
    "process_bytes",
    "readme_block",
    "rounded",
    "storage_bytes",
    "write_readme_block",
]
