"""Does the test suite notice when the code is wrong? Small changes, one at a time, and the tests that ought to fail.

The changes are made by a program, in all modules of custom_generate/: a comparison, a sign, `and` or `or` the other way, 1 for 0,
2 for 1, min for max, a statement left out. The tests run in a copy of the repository; those that fail fastest come first, and the
first failure is enough. What no test notices is listed at the end; a change that makes no difference stands in `EQUIVALENT`, with
the reason. The last line is one JSON document.

    python scripts/mutation_check.py --num 100 --seed 1                    a sample; about half a minute each on one core
    python scripts/mutation_check.py --since HEAD~3 --jobs 2               all changes of the lines that are new since a revision
    python scripts/mutation_check.py --only plan.py "Window.slot" --num 0  all of those with one of these in their name
"""

import argparse
import ast
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "custom_generate"

# What pytest is given, one after the other until something fails: a few seconds each at first.
TESTS = [
    [
        "tests/test_families.py::test_logits_equal_the_oracle_however_the_tokens_are_fed[llama-sdpa]",
        "tests/test_families.py::test_a_row_does_not_depend_on_padding_or_other_rows[qwen2-half-sliding-eager]",
        "tests/test_families.py::test_a_row_does_not_depend_on_padding_or_other_rows[bloom-eager]",
    ],
    ["tests/test_rotation.py", "tests/test_invariants.py"],
    ["tests/test_cache.py"],
    ["tests/test_generate.py"],
    [
        "tests/test_families.py",
        "-k",
        "(qwen2-half-sliding or mistral-long or gpt-j or dynamic or every_shape) and not oracle_notices",
    ],
    ["tests/test_errors.py", "tests/test_memory.py", "tests/test_state.py"],
    ["tests/test_fuzz.py"],
    ["tests/test_families.py", "tests/test_static.py", "-m", "not also_eager"],
]

# In place of those, for modules that they don't use.
STORED = [["tests/test_kinds_of_windows.py"], ["tests/test_memory.py"]]
TESTS_OF = {
    "offloaded": STORED,
    "quantized": STORED,
    "static": [["tests/test_static.py"]],
    "saving": [["tests/test_state.py"], ["tests/test_kinds_of_windows.py"]],
    "probe": [["tests/test_probe.py", "tests/test_rotation.py"], ["tests/test_errors.py"], ["tests/test_zoo.py"]],
    "options": [["tests/test_errors.py"], ["tests/test_generate.py"], ["tests/test_modes.py", "tests/test_compatibility.py"]],
    "prompt": [["tests/test_prompt.py", "tests/test_generate.py"], ["tests/test_errors.py", "tests/test_modes.py"]],
    "feed": [["tests/test_generate.py"], ["tests/test_beams.py", "tests/test_assisted.py"], ["tests/test_modes.py"]],
    "drafting": [["tests/test_assisted.py"]],
    "guidance": [["tests/test_modes.py"]],
    "workspace": [["tests/test_workspace.py"]],
}

# Changes that no test can notice: name -> why.
EQUIVALENT: dict[str, str] = {}

SYMBOLS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One change of one module.

    Attributes:
        module: its name, without `.py`.
        line: of the change, from 1 on.
        source: of the module, in bytes, as it is.
        start, stop, new: what is put in place of which bytes.
    """

    module: str
    line: int
    source: bytes
    start: int
    stop: int
    new: str

    @property
    def text(self) -> str:
        """The whole module with the change."""
        return (self.source[: self.start] + self.new.encode() + self.source[self.stop :]).decode()


class Mutator:
    """Makes the changes of one module."""

    def __init__(self, module: str, source: str):
        self.module, self.raw, self.lines = module, source.encode(), source.splitlines()
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line.encode()))
        self.found: dict[str, Mutation] = {}
        for function, where in functions(ast.parse(source)):
            raised = {id(inner) for node in ast.walk(function) if isinstance(node, ast.Raise) for inner in ast.walk(node)}
            nested = {id(node) for inner, _ in functions(function) for node in ast.walk(inner)}
            for node in ast.walk(function):
                if id(node) not in raised | nested:
                    self._mutate(f"{module}.py {where}", node)

    def _mutate(self, where: str, node: ast.AST) -> None:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            self._between(where, node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.BinOp):
            self._between(where, node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp) and len(node.values) == 2:
            self._between(where, *node.values, node.op)
        elif isinstance(node, ast.Name) and node.id in ("min", "max"):
            self._change(where, node, "max" if node.id == "min" else "min")
        elif isinstance(node, ast.Constant) and type(node.value) is int and node.value in (0, 1):
            self._change(where, node, str(node.value + 1))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._change(where, node, f"bool({ast.unparse(node.operand)})")
        elif isinstance(node, ast.AugAssign) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self._change(where, node, "pass")

    def _between(self, where: str, left: ast.AST, right: ast.AST, kind: ast.AST) -> None:
        """The sign between two operands the other way."""
        if type(kind) in SYMBOLS:
            start, stop = self._place(left.end_lineno, left.end_col_offset), self._place(right.lineno, right.col_offset)
            old, new = SYMBOLS[type(kind)]
            text = self.raw[start:stop].decode()
            if len(re.findall(rf"(?<![<>=!]){re.escape(old)}(?!=)", text)) == 1 or text.split() == [old]:
                self._put(where, start, stop, text.replace(old, new, 1))

    def _change(self, where: str, node: ast.AST, new: str) -> None:
        start, stop = self._place(node.lineno, node.col_offset), self._place(node.end_lineno, node.end_col_offset)
        self._put(where, start, stop, new)

    def _put(self, where: str, start: int, stop: int, new: str) -> None:
        line = self.raw[:start].count(b"\n") + 1
        old = " ".join(self.raw[start:stop].decode().split())
        name = f"{where}: {self.lines[line - 1].strip():.90}: {old:.60} -> {' '.join(new.split()):.60}"
        name = name if name not in self.found else f"{name} (at {start})"
        self.found[name] = Mutation(self.module, line, self.raw, start, stop, new)

    def _place(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column


def functions(tree: ast.AST, where: str = "") -> list[tuple[ast.FunctionDef, str]]:
    """All functions within a tree, however deep, with their names; `__repr__` says nothing that the code relies on."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{where}{node.name}"
            found += [(node, name)] if isinstance(node, ast.FunctionDef) and node.name != "__repr__" else []
            found += functions(node, f"{name}.")
        else:
            found += functions(node, where)
    return found


def mutations(root: Path = ROOT) -> dict[str, Mutation]:
    """Name -> change, of all modules."""
    found: dict[str, Mutation] = {}
    for path in sorted((root / FOLDER).glob("*.py")):
        found |= Mutator(path.stem, path.read_text(encoding="utf-8")).found
    return found


def compiles(text: str) -> bool:
    """Whether a changed module still is one."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def lines_since(revision: str, root: Path = ROOT) -> dict[str, set[int]]:
    """Lines of each module that are new or changed since a revision, in the working tree."""
    command = ["git", "diff", "--unified=0", "--no-color", revision, "--", f"{FOLDER}/*.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode:
        sys.exit(f"--since {revision}: {done.stderr.strip()}")
    lines: dict[str, set[int]] = {}
    module = ""
    for line in done.stdout.splitlines():
        if line.startswith("+++ "):
            module = Path(line[4:]).stem
        elif match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            start, num = int(match[1]), int(match[2] or 1)
            lines.setdefault(module, set()).update(range(start, start + num))
    return lines


def import_what_tests_need() -> None:
    """Once, before processes are made of this one for each change: that takes longer than most tests."""
    import hypothesis.stateful  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo
    import transformers

    torch.set_num_threads(1)
    for name in ("Llama", "Qwen2", "Qwen3", "Gemma3", "GPTJ", "Bloom", "Falcon", "Cohere", "Mistral", "Phi3", "DeepseekV3"):
        getattr(transformers, f"{name}ForCausalLM", None)
    for name in ("GenerationConfig", "DynamicCache"):
        getattr(transformers, name)


def run_tests(folder: Path, log: Path, groups: list[list[str]]) -> None:
    """In a process of its own: ends it with 0 if all pass, 1 if one fails."""
    import pytest

    os.chdir(folder)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        for tests in groups:
            if not all(Path(test.partition("::")[0]).exists() for test in tests if ".py" in test):
                continue
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-W", "ignore", *tests])
            for name in [name for name in sys.modules if name.startswith(("test_", "conftest"))]:
                del sys.modules[name]
            sys.stdout.flush()
            if status != 0:
                os._exit(1)
    os._exit(0)


def verdict(folder: Path, change: Mutation | None, log: Path, cpu_seconds: int, groups: list[list[str]]) -> str:
    """What these tests say of a change, or of the code as it is: caught, survived, or that they did not end."""
    path = folder / FOLDER / f"{change.module}.py" if change else None
    before = path.read_text(encoding="utf-8") if path else ""
    try:
        if path:
            path.write_text(change.text, encoding="utf-8")
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
                run_tests(folder, log, groups)
            os._exit(1)
        _, status = os.waitpid(process, 0)
    finally:
        if path:
            path.write_text(before, encoding="utf-8")
    if os.WIFSIGNALED(status):
        return "not ended" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "caught"
    return "survived" if os.WEXITSTATUS(status) == 0 else "caught"


def failed_test(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[-1].partition(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ") if lines else ""


def chosen(args: argparse.Namespace) -> dict[str, Mutation]:
    """The changes that the arguments ask for."""
    changes = mutations()
    if args.since is not None:
        new = lines_since(args.since)
        changes = {name: change for name, change in changes.items() if change.line in new.get(change.module, ())}
    if args.only is not None:
        changes = {name: change for name, change in changes.items() if any(part in name for part in args.only)}
    names = sorted(changes)
    random.Random(args.seed).shuffle(names)
    num = args.num if args.num is not None else 0 if args.since is not None else 100
    return {name: changes[name] for name in (names[:num] if num else names) if compiles(changes[name].text)}


def check(changes: dict[str, Mutation], args: argparse.Namespace) -> dict[str, str]:
    """Name -> verdict, each said as it is known."""
    results = {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        folders = [Path(temporary, f"copy-{job}") for job in range(args.jobs)]
        for folder in folders:
            shutil.copytree(
                ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
            )

        def check_one(name: str) -> tuple[str, str, str, float]:
            folder, start = folders.pop(), time.perf_counter()
            log, change = Path(f"{folder}.log"), changes.get(name)
            try:
                groups = (
                    TESTS_OF.get(change.module, TESTS)
                    if change
                    else [test for tests in [TESTS, *TESTS_OF.values()] for test in tests]
                )
                said = verdict(folder, change, log, args.cpu_seconds, groups[: args.groups] if change else groups)
                return name, said, failed_test(log), time.perf_counter() - start
            finally:
                folders.append(folder)

        names = [*changes] if args.only is not None else ["", *changes]  # first the code as it is
        for name, said, test, seconds in tqdm(pool.map(check_one, names), total=len(names), desc="changes", disable=None):
            if name == "" and said != "survived":
                sys.exit(f"The tests fail without any change ({said}: {test}): nothing can be said.")
            if name:
                results[name] = said
                known = f" (known: {EQUIVALENT[name]})" if said == "survived" and name in EQUIVALENT else ""
                tqdm.write(f"{said:9} {seconds:4.0f} s  {name}  {test}{known}")
                sys.stdout.flush()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--num", type=int, metavar="N", help="so many, drawn at random; 0: all (default: 100, and all with --since)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--since", metavar="REV", help="only in lines that are new or changed since that revision of git")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="only changes with one of these in their name: module, function, code"
    )
    parser.add_argument("--jobs", type=int, default=1, help="changes at a time (default: %(default)s)")
    parser.add_argument("--cpu-seconds", type=int, default=600, help="for the tests of one change (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=len(TESTS), help="of tests, the fastest first (default: all %(default)s)")
    parser.add_argument("--list", action="store_true", help="name the changes, and run nothing")
    args = parser.parse_args()

    changes = chosen(args)
    if args.list:
        print("\n".join(changes))
        print(json.dumps({"changes": len(changes)}))
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    import_what_tests_need()
    results = check(changes, args)
    survivors = [name for name, said in results.items() if said == "survived" and name not in EQUIVALENT]
    counts = {kind: sum(said == kind for said in results.values()) for kind in ("caught", "not ended", "survived")}
    print(f"\nNo test notices {len(survivors)} of {len(results)}:" if survivors else "\nNone is left unnoticed.")
    print("\n".join(survivors))
    print(json.dumps(counts | {"equivalent": counts["survived"] - len(survivors), "survivors": survivors}))
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
