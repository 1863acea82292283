"""`scripts/amalgamate.py`: the one file means what the modules mean, or there is none."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from amalgamate import FOLDER, CannotAmalgamate, amalgamate, names_bound, published_code, read_modules, source_of, version_of
from checks import feed, left_padded, random_ids
from custom_generate.generate import SinkCache
from families import build_model

ROOT = Path(__file__).parents[1]
SOURCES = read_modules(ROOT)
is_of_modules = pytest.mark.skipif(SOURCES.keys() == {"generate"}, reason="a single file")

SMALL = {
    "generate": '''"""Says hello.

A second paragraph.
"""

import json
import os.path

# Of a sibling: this comment goes with it.
from .numbers import FIRST, Adder
from .texts import hello  # noqa: F401


def generate():
    """Calls all of them."""
    return json.dumps([hello("x"), Adder().add(FIRST), os.path.sep])
''',
    "numbers": '''"""Numbers."""

from json import dumps

import json

FIRST = 1
# It stays: what stands above a statement.
try:
    from itertools import pairwise
except ImportError:
    pairwise = None


class Adder:
    def add(self, number):
        return number + len(dumps(json.loads("[2]"))) + (pairwise is not None)
''',
    "texts": '''"""Texts.

Words, and how they are said.
"""

from .numbers import (
    FIRST,
    Adder,
)


def hello(name):
    return f"hello {name} {FIRST} {Adder().add(2)}"
''',
}


def load_file(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def run_modules(sources: dict[str, str], folder: Path) -> str:
    for name, text in sources.items():
        (folder / "pack").mkdir(exist_ok=True)
        (folder / "pack" / f"{name}.py").write_text(text)
    code = "from pack.generate import generate; print(generate())"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_one_file_does_what_the_modules_do(tmp_path):
    (tmp_path / "one.py").write_text(amalgamate(SMALL))
    assert load_file(tmp_path / "one.py", "one").generate() == run_modules(SMALL, tmp_path) == '["hello x 1 6", 5, "/"]'


def test_what_the_one_file_says():
    """The docstring of generate.py is its own, those of the others stand above them, in the order of the imports, and nothing is lost."""
    text = amalgamate(SMALL, "https://example.org/sinks", "commit abc (after v2)")
    assert text.startswith('"""Says hello.\n\nA second paragraph.\n"""\n')
    assert "made of the modules in custom_generate/ of https://example.org/sinks, commit abc (after v2).\n" in text
    assert re.findall(r"^# (\w+\.py)$", text, re.MULTILINE) == ["numbers.py", "texts.py", "generate.py"]
    assert "# texts.py\n#\n# Texts.\n#\n# Words, and how they are said.\n" in text
    assert "\nimport json\nimport os.path\nfrom json import dumps\n" in text and "from ." not in text
    assert (
        "goes with it" not in text
        and "# It stays: what stands above a statement.\ntry:\n    from itertools import pairwise" in text
    )


def test_the_same_modules_give_the_same_bytes():
    names = list(SMALL)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert amalgamate({name: SMALL[name] for name in names}) == amalgamate(SMALL)


def with_line(name: str, line: str) -> dict[str, str]:
    """`SMALL` with a statement at the end of one module."""
    return SMALL | {name: f"{SMALL[name]}\n\n{line}\n"}


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        (SMALL | {"texts": '"""x"""\nfrom __future__ import annotations\n'}, "texts.py, line 2: `from __future__`"),
        (with_line("texts", "import json as j"), "`as j`"),
        (with_line("texts", "from json import dumps as d"), "`as d`"),
        (with_line("texts", "from json import *"), "`import *`"),
        (with_line("texts", "def f():\n    from .numbers import FIRST"), "in a function or a block"),
        (with_line("texts", "if FIRST:\n    from .numbers import Adder"), "in a function or a block"),
        (with_line("texts", "from . import numbers"), "only `from .module import name`"),
        (with_line("texts", "from ..numbers import FIRST"), "only `from .module import name`"),
        (with_line("texts", "from .numbers.more import FIRST"), "only `from .module import name`"),
        (with_line("texts", "from custom_generate.numbers import FIRST"), "an import from custom_generate"),
        (with_line("texts", "import json; TEXT = 1"), "two statements in one line"),
        (with_line("texts", "class Adder:\n    pass"), "Adder is one thing in custom_generate/numbers.py (defined there) and another in"),
        (with_line("texts", "for FIRST in range(3):\n    pass"), "FIRST is one thing"),
        (with_line("texts", "from pickle import dumps"), "dumps is one thing in custom_generate/numbers.py (from json import dumps) and"),
        (with_line("texts", "json = None"), "json is one thing"),
        (with_line("texts", "def json_():\n    pass\n\n\ndef dumps():\n    pass"), "dumps is one thing"),
        (with_line("texts", "def min(a, b):\n    return a"), "would hide Python's own min"),
        (with_line("texts", "TEXT = '''\nfrom .old import names\n'''"), "text that transformers takes for an import"),
        (with_line("numbers", "from .texts import hello"), "in a circle: "),
        (with_line("texts", "from .generate import generate"), "in a circle: "),
        (with_line("texts", "from .nowhere import thing"), "there is no custom_generate/nowhere.py"),
        (with_line("texts", "from .numbers import SECOND"), "imports SECOND, not defined in numbers.py"),
        (with_line("numbers", "def f():\n    global FIRST\n    FIRST = 2"), "which numbers.py changes by `global`"),
        (SMALL | {"more": '"""More."""\n'}, "generate.py does not import from more.py"),
        (SMALL | {"texts": "from .numbers import FIRST, Adder\n\nhello = None\n"}, "texts.py, line 1: no docstring"),
        ({"numbers": '"""x"""\n'}, "has no generate.py"),
    ],
)  # fmt: skip
def test_what_would_not_mean_the_same_is_refused(sources, reason):
    with pytest.raises(CannotAmalgamate, match=re.escape(reason)):
        amalgamate(sources)


def test_names_within_functions_are_their_own():
    """Else harmless modules would be refused; and a name bound in any other way is seen."""
    import ast

    code = """
def f(a, b=(w := 1)):
    c = 1
class D:
    e = 1
g, (h, *i) = 1, (2, 3)
j: int = 1
k += 1
for l in []: m = 1
with x as n: pass
try: pass
except E as o: import p.q
[r for r in s]
if (t := 1): from u import v
"""
    assert set().union(*map(names_bound, ast.parse(code).body)) >= set("fDghijklmnoptv")
    assert not set().union(*map(names_bound, ast.parse(code).body)) & set("abcerqu")


def test_a_single_file_is_published_as_it_is(tmp_path):
    """The first version was one; `import ... as` and all."""
    text = '"""One."""\nimport json as j\n\n\ndef generate():\n    return j\n'
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "generate.py").write_text(text)
    assert published_code(tmp_path) == text


def test_the_head_names_the_remote_and_the_commit(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert source_of(tmp_path) == version_of(tmp_path) == ""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "generate.py").write_text("")
    for command in (
        ["init"],
        ["add", "."],
        ["commit", "-m", "x"],
        ["tag", "v3"],
        ["remote", "add", "origin", "git@github.com:org/sinks.git"],
    ):
        git(*command)
    first = version_of(tmp_path)
    assert source_of(tmp_path) == "https://github.com/org/sinks" and re.fullmatch(r"commit \w{12} \(after v3\)", first)
    git("commit", "--allow-empty", "-m", "elsewhere")
    assert version_of(tmp_path) == first, "the modules are the same"
    (tmp_path / FOLDER / "window.py").write_text("")
    assert version_of(tmp_path) == f"{first} with changes that are not committed"
    for address, found in [
        ("https://user:secret@host/a/b.git", "https://host/a/b"),
        ("/home/me/sinks", ""),
        ("ssh://git@h.org/a/b", "https://h.org/a/b"),
    ]:
        git("remote", "set-url", "origin", address)
        assert source_of(tmp_path) == found


def test_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "amalgamate.py", "--output", tmp_path / "generate.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    text = (tmp_path / "generate.py").read_text(encoding="utf-8")
    assert text == published_code(ROOT, source_of(ROOT), version_of(ROOT)) and result["modules"] == len(SOURCES) and result["lines"] == len(text.splitlines())
    (tmp_path / FOLDER).mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "amalgamate.py", "--root", tmp_path], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and done.stderr == "error: custom_generate/ has no generate.py, which is what transformers looks for.\n"
    )


# The modules of this repository


@pytest.fixture(scope="module")
def one_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("one") / "generate.py"
    path.write_text(published_code(ROOT), encoding="utf-8")
    return path


def test_transformers_sees_one_file_that_needs_what_it_brings_along(one_file):
    assert get_relative_imports(one_file) == []
    assert set(get_imports(one_file)) - sys.stdlib_module_names <= {"torch", "transformers", "safetensors", "numpy"}


@is_of_modules
def test_every_line_of_code_is_in_the_one_file(one_file):
    """Word for word, in the order in which it stands."""
    text = one_file.read_text(encoding="utf-8")
    for name, source in SOURCES.items():
        at = text.index(f"# {name}.py\n#\n")
        for part in re.split(r"\n\n\n", source)[1:]:
            if not part.startswith(("from .", "import ", "from ")):
                at = text.index(part.strip("\n"), at)


@torch.no_grad()
def test_logits_of_the_one_file_are_those_of_the_modules(one_file):
    """To the bit: a batch of rows of different lengths, chunks over the edge of the window, single tokens past it."""
    model = build_model("qwen3", "sdpa")
    ids, mask = left_padded([random_ids(length, seed=length) for length in (40, 33, 21)])
    sizes = [10, 7, 1, 1, 9, *[1] * 12]
    caches = [kind.from_model(model, 16, 4) for kind in (load_file(one_file, "one_file").SinkCache, SinkCache)]
    one, modules = (feed(model, cache, ids, sizes, mask) for cache in caches)
    assert type(caches[0]) is not type(caches[1]) and one.equal(modules)
