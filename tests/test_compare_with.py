"""`scripts/compare_with.py`: it compares two codes, and would see a difference."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import compare_with
from custom_generate.generate import SinkCache

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The code of the last commit."""
    if subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, cwd=ROOT).returncode:
        pytest.skip("not a git checkout")
    path = list(sys.path)
    yield compare_with.code_of("HEAD", tmp_path_factory.mktemp("other"))
    sys.path[:] = path


def test_the_other_code_is_that_of_the_commit(other, tmp_path):
    names = subprocess.run(["git", "ls-tree", "--name-only", "HEAD:custom_generate"], capture_output=True, text=True, cwd=ROOT).stdout
    folder = Path(other.__file__).parent
    assert {path.name for path in folder.glob("*.py")} == {name for name in names.split() if name.endswith(".py")}
    assert other.SinkCache is not SinkCache and folder != ROOT / "custom_generate"
    with pytest.raises(SystemExit, match="nowhere: "):
        compare_with.code_of("nowhere", tmp_path)


def test_a_difference_of_logits_is_seen(other):
    """One sink less than asked for is a difference, the same code twice is none."""

    def one_sink_less(model, window_length, num_sink_tokens):
        return SinkCache.from_model(model, window_length, num_sink_tokens - 1)

    spoiled = SimpleNamespace(SinkCache=SimpleNamespace(from_model=one_sink_less))
    ours = SimpleNamespace(SinkCache=SinkCache)
    assert compare_with.difference_of_logits({"ours": spoiled, "other": ours}, "llama") > 0.1
    assert compare_with.difference_of_logits({"ours": ours, "other": other}, "llama") <= compare_with.MAX_LOGIT_DIFFERENCE


def test_calls_are_counted_by_hand(tmp_path):
    path = tmp_path / "counted.py"
    path.write_text("def f(n):\n    return max(map(g, range(n)))\n\n\ndef g(i):\n    return sum([i])\n")
    module = {}
    exec(compile(path.read_text(), str(path), "exec"), module)
    called = compare_with.functions_called(lambda: module["f"](3), str(tmp_path))
    assert called == {"counted.f": 1, "counted.g": 3} and sys.getprofile() is None


def test_the_command():
    """Each measurement of a small model, with the last commit; about the ratio nothing is known."""
    command = ["scripts/compare_with.py", "HEAD", "--preset", "tiny", "--window-length", "32", "--num-tokens", "4", "--num-rounds", "2"]
    measures = ["decode", "prefill", "generate"]
    done = subprocess.run([sys.executable, *command, "--measure", *measures, "--calls"], capture_output=True, text=True, cwd=ROOT)
    if "not a git repository" in done.stderr:
        pytest.skip("not a git checkout")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert [(row["measure"], row["window_length"]) for row in result["times"]] == [(measure, 32) for measure in measures]
    for row in result["times"]:
        assert row["ours_ms"] > 0 and row["other_ms"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert 10 < result["calls"]["ours"]["own loop"] < 100 and result["calls"]["other"]["generate"] > 10
