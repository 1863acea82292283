"""What the scripts share: where the repository is, how they load a model, what they say of a run, the text of the tiny model, and
their blocks in the README and in docs/.

Importing it puts the root of the repository on `sys.path`, so that `from custom_generate.generate import ...` finds the code of
this checkout, whatever the folder from which a script is started.
"""

import argparse
import platform
import re
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

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
    source = {"revision": args.revision, "gguf_file": args.gguf_file}
    model = AutoModelForCausalLM.from_pretrained(args.model, **source, dtype=DTYPES[args.dtype])
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


# The text of the tiny model: the source code of the Python standard library that runs this script. It is the one large body of
# real text that every machine with Python has, offline. About one file in twenty is held out of training, chosen by a checksum of
# its path, so that the split is the same everywhere.


# Tests and bundled packages are left out: they are long tables and copies rather than prose-like code.
EXCLUDED_DIRECTORIES = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
HELD_OUT_ONE_IN = 20
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(held_out: bool) -> Iterator[Path]:
    """Source files of the standard library, sorted by path: the held-out ones, or the ones for training."""
    for path in sorted(STDLIB.rglob("*.py")):
        relative = path.relative_to(STDLIB)
        if EXCLUDED_DIRECTORIES.isdisjoint(relative.parts):
            if (zlib.crc32(relative.as_posix().encode()) % HELD_OUT_ONE_IN == 0) == held_out:
                yield path


def readable(paths: Iterable[Path]) -> Iterator[str]:
    """The text of each file; files that are not UTF-8 are skipped."""
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def stdlib_text(held_out: bool) -> list[str]:
    """The text of each file of `stdlib_files`."""
    return list(readable(stdlib_files(held_out)))


def unseen_text() -> Iterator[str]:
    """Text that no training has seen, a file at a time: the held-out files, and then the tests of the standard library.

    Some distributions of Python leave the tests out; with them it is more than a million tokens.
    """
    yield from stdlib_text(held_out=True)
    yield from readable(sorted((STDLIB / "test").rglob("*.py")))


# Blocks: what a program writes into a page, between `<!-- name: begin -->` and `<!-- name: end -->`


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def split_page(name: str) -> tuple[Path, list[str]]:
    """The page that has the block of that name, and its text before, in and after the block."""
    for page in pages():
        pattern = rf"(?<=<!-- {name}: begin -->\n)(.*)(?=\n<!-- {name}: end -->)"
        parts = re.split(pattern, page.read_text(encoding="utf-8"), flags=re.DOTALL)
        if len(parts) == 3:
            return page, parts
    sys.exit(f"Neither README.md nor a page of docs/ has a block <!-- {name}: begin --> ... <!-- {name}: end -->.")


def page_block(name: str) -> str:
    """The text of the block of that name."""
    return split_page(name)[1][1]


def write_page_block(name: str, text: str) -> None:
    page, (before, _, after) = split_page(name)
    page.write_text(before + text + after, encoding="utf-8")


def add_block_arguments(parser: argparse.ArgumentParser) -> None:
    """Of a script that makes a block of the README or of docs/."""
    parser.add_argument("--check", action="store_true", help="exit with 1 if the README or docs/ say something else")
    parser.add_argument("--write", action="store_true", help="write it into the README or into docs/")


def check_or_write_block(args: argparse.Namespace, name: str, text: str) -> None:
    """What the arguments of `add_block_arguments` ask for."""
    if args.check and page_block(name) != text:
        page = split_page(name)[0].relative_to(ROOT)
        sys.exit(f"The block {name} of {page} is not what is found here. Run {Path(sys.argv[0]).name} --write.")
    if args.write:
        write_page_block(name, text)
