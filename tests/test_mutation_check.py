"""What `scripts/mutation_check.py` changes, and that it says whether a test noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mutation_check
from mutation_check import Mutator, compiles, lines_since, mutations

CODE = '''"""A module."""

LENGTH = 0


class Ring:
    def slot(self, token, num):
        """Where it is, from 0 on."""
        if token < num and num is not None:
            return max(token + 1, num)
        if token == -1:
            raise ValueError(f"{token + 1} is wrong")
        self.forget(token)
        num -= 1

        def inner():
            return not token

        return inner

    def __repr__(self):
        return "Ring" + str(1 + 1)
'''
CHANGES = [
    "ring.py Ring.slot: if token < num and num is not None:: < -> <=",
    "ring.py Ring.slot: if token < num and num is not None:: and -> or",
    "ring.py Ring.slot: if token < num and num is not None:: is not -> is",
    "ring.py Ring.slot: return max(token + 1, num): max -> min",
    "ring.py Ring.slot: return max(token + 1, num): + -> -",
    "ring.py Ring.slot: return max(token + 1, num): 1 -> 2",
    "ring.py Ring.slot: if token == -1:: == -> !=",
    "ring.py Ring.slot: if token == -1:: 1 -> 2",
    "ring.py Ring.slot: self.forget(token): self.forget(token) -> pass",
    "ring.py Ring.slot: num -= 1: num -= 1 -> pass",
    "ring.py Ring.slot: num -= 1: 1 -> 2",
    "ring.py Ring.slot.inner: return not token: not token -> bool(token)",
]


def test_the_changes_of_a_module_by_hand():
    """All of them, once: nothing in messages of errors, in docstrings, in `__repr__` or outside of functions."""
    found = Mutator("ring", CODE).found
    assert sorted(found) == sorted(CHANGES)
    assert all(change.text != CODE and change.module == "ring" for change in found.values())
    change = found["ring.py Ring.slot: return max(token + 1, num): + -> -"]
    assert change.line == 10 and change.text == CODE.replace("max(token + 1", "max(token - 1")


def test_every_module_is_changed_and_most_changes_compile():
    found = mutations()
    modules = {path.stem for path in (mutation_check.ROOT / mutation_check.FOLDER).glob("*.py")}
    assert {change.module for change in found.values()} == {module for module in modules if has_functions(module)}
    assert len(found) > 300 and mutation_check.EQUIVALENT.keys() <= found.keys()
    sample = [*found.values()][::50]
    assert sum(compiles(change.text) for change in sample) > 0.95 * len(sample)
    assert not compiles(CODE + ")")


def has_functions(module: str) -> bool:
    source = (mutation_check.ROOT / mutation_check.FOLDER / f"{module}.py").read_text(encoding="utf-8")
    return bool(Mutator(module, source).found)


def test_tests_and_modules_that_are_named_exist():
    folder = mutation_check.ROOT
    named = [name for groups in [mutation_check.TESTS, *mutation_check.TESTS_OF.values()] for group in groups for name in group]
    for name in (name for name in named if name.startswith("tests/")):
        file, _, function = name.partition("::")
        assert (folder / file).exists(), name
        assert not function or f"def {function.partition('[')[0]}(" in (folder / file).read_text(encoding="utf-8"), name
    if len(list((folder / mutation_check.FOLDER).glob("*.py"))) > 1:
        assert all((folder / mutation_check.FOLDER / f"{module}.py").exists() for module in mutation_check.TESTS_OF)


def test_since_a_revision(tmp_path):
    """Lines that are new, and lines that changed; of other lines no change is made."""

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True, capture_output=True)

    path = tmp_path / mutation_check.FOLDER / "ring.py"
    path.parent.mkdir()
    path.write_text(CODE)
    for command in (["init"], ["add", "."], ["commit", "-m", "x"]):
        git(*command)
    path.write_text(CODE.replace("num -= 1", "num -= 1\n        num += 1").replace("token == -1", "token == -2"))
    (path.parent / "new.py").write_text("a = 1\n")
    git("add", "-N", ".")
    assert lines_since("HEAD", tmp_path) == {"ring": {11, 15}, "new": {1}}
    with pytest.raises(SystemExit, match="--since nowhere"):
        lines_since("nowhere", tmp_path)


def test_a_change_that_a_test_notices_is_told_from_one_that_none_does(tmp_path, monkeypatch, capsys):
    """The whole command, on a small repository: the code as it is first, then each change."""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "custom_generate" / "code.py").write_text("def double(x):\n    return x + x\n\n\ndef unseen(x):\n    return x - 0\n")
    test = "import sys\n\nsys.path.insert(0, '.')\n\n\ndef test_it():\n    from custom_generate.code import double\n\n    assert double(2) == 4\n"
    (tmp_path / "tests" / "test_code.py").write_text(test)
    script = f"""
import sys
sys.path.insert(0, {str(Path(mutation_check.__file__).parent)!r})
import pathlib, mutation_check
mutation_check.ROOT = pathlib.Path({str(tmp_path)!r})
mutation_check.mutations.__defaults__ = (mutation_check.ROOT,)
mutation_check.TESTS = [["tests/test_code.py"]]
mutation_check.TESTS_OF = {{}}
mutation_check.import_what_tests_need = lambda: None
sys.argv = ["mutation_check.py", "--num", "0"]
mutation_check.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and result["caught"] == 1 and result["survived"] == 2
    assert all("unseen" in name for name in result["survivors"]) and "caught" in done.stdout
