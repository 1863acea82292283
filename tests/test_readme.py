"""The README's code runs, its commands are the ones that are tested, and what it lists is what the code has."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from generate import DEFAULT_NUM_SINK_TOKENS, DEFAULT_PREFILL_CHUNK_SIZE, DEFAULT_WINDOW_LENGTH, UNSUPPORTED_OPTIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_the_code_runs(index):
    """On the tiny model in place of what it names on the Hub."""
    code = re.sub(r'"(org/sink_cache|Qwen/Qwen3-0.6B)"', repr(str(ROOT)), BLOCKS[index])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"^pip install.*pytest.*$", README, re.MULTILINE).group()
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_refused_options_are_listed():
    for name in UNSUPPORTED_OPTIONS:
        assert f"`{name}`" in README


def test_defaults_are_those_of_the_code():
    filling, full = DEFAULT_PREFILL_CHUNK_SIZE
    assert f"| `window_length` | {DEFAULT_WINDOW_LENGTH} |" in README
    assert f"| `num_sink_tokens` | {DEFAULT_NUM_SINK_TOKENS} |" in README
    assert f"| `prefill_chunk_size` | {filling} and {full} |" in README


def test_files_are_listed_and_listed_files_are_there():
    for path in re.findall(r"`((?:scripts|custom_generate)/[\w./]+\.py)", README):
        assert (ROOT / path).exists(), path
    for script in (ROOT / "scripts").glob("*.py"):
        if "argparse" in script.read_text(encoding="utf-8") and script.name != "common.py":
            assert f"`scripts/{script.name}`" in README, script
