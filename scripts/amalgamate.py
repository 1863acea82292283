"""All modules of custom_generate/ as one file, which is what goes to the Hub.

Releases of transformers before 5.21 can't load a method of several files from the Hub on Windows, those before 4.57 nowhere; one
file loads everywhere. Each module stands below the modules that it imports from, word for word but for its imports, and its
docstring stands above it as a comment. Nothing is renamed. So all modules share one namespace in the file, and what would change
its meaning there is refused, with file and line: two modules that bind one name to different things, `import x as y`, imports of
other modules in functions or in blocks, `from __future__`, a cycle, a module that generate.py does not import. The same modules
give the same bytes.

    python scripts/amalgamate.py                                 checks that it can be done
    python scripts/amalgamate.py --output /tmp/generate.py       and writes the file

`scripts/publish.py` does this by itself. The last line is one JSON document.
"""

import argparse
import ast
import builtins
import hashlib
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "custom_generate"
ENTRY = "generate"
WIDTH = 119
LINE = "# " + "-" * (WIDTH - 2)


class CannotAmalgamate(ValueError):
    """Why these modules can't be one file: where it is, what it would break, what to do."""


class Module:
    """One file of the folder.

    Attributes:
        siblings: names that it imports from other modules, by module.
        imports: its other imports at the top: `(module, None)` of `import module`, `(module, name)` of `from module import name`.
        defined: names that its other statements at the top bind, with the line.
        changed: names that its functions bind anew, by `global`.
        body: its lines without docstring and imports.
    """

    def __init__(self, name: str, source: str):
        self.name, self.source = name, source
        self.tree = ast.parse(source, f"{name}.py")
        self.docstring = ast.get_docstring(self.tree)
        self.siblings: dict[str, set[str]] = {}
        self.imports: dict[tuple[str, str | None], int] = {}
        self.defined: dict[str, int] = {}
        self.changed = {name for node in ast.walk(self.tree) if isinstance(node, ast.Global) for name in node.names}
        if not self.docstring:
            raise self.refusal(
                1, "no docstring, which would stand above the module in the one file. Say what the module is about"
            )
        self._refuse_hidden_imports()
        cut = [range(node.lineno, node.end_lineno + 1) for node in self.tree.body[:1]]
        for node in self.tree.body[1:]:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._note_import(node)
                cut.append(self._lines_of_import(node))
            else:
                for bound in names_bound(node):
                    self.defined.setdefault(bound, node.lineno)
        removed = {number for lines in cut for number in lines}
        self.body = "\n".join(text for number, text in enumerate(source.splitlines(), 1) if number not in removed).strip("\n")

    def refusal(self, line: int, reason: str) -> CannotAmalgamate:
        return CannotAmalgamate(f"{FOLDER}/{self.name}.py, line {line}: {reason}.")

    def _refuse_hidden_imports(self) -> None:
        """Imports of other modules that would not go away, and text that transformers takes for an import."""
        top = {id(node) for node in self.tree.body}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.level and id(node) not in top:
                raise self.refusal(
                    node.lineno, "an import of another module in a function or a block. Move it to the top of the file"
                )
            if isinstance(node, ast.ImportFrom | ast.Import) and any(name.split(".")[0] == FOLDER for name in modules_of(node)):
                raise self.refusal(node.lineno, f"an import from {FOLDER}. Write `from .module import name`")
        real = {node.lineno for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom)}
        for number, text in enumerate(self.source.splitlines(), 1):
            if number not in real and re.match(r"\s*(from\s+\.\S+\s+import|import\s+\.)", text):
                raise self.refusal(number, "text that transformers takes for an import of a file. Word it in another way")

    def _note_import(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            raise self.refusal(node.lineno, "`from __future__` has to be the first statement of a file. Do without it")
        for alias in node.names:
            if alias.asname is not None:
                reason = f"other modules would see the name of `as {alias.asname}`. Use {alias.name} by its own name"
                raise self.refusal(node.lineno, reason)
            if alias.name == "*":
                raise self.refusal(node.lineno, "`import *` does not say which names it binds. Name them")
        if isinstance(node, ast.Import):
            self.imports |= {(alias.name, None): node.lineno for alias in node.names}
        elif node.level == 0:
            self.imports |= {(node.module, alias.name): node.lineno for alias in node.names}
        elif node.level > 1 or node.module is None or "." in node.module:
            raise self.refusal(node.lineno, "only `from .module import name` is understood, of modules side by side")
        else:
            self.siblings.setdefault(node.module, set()).update(alias.name for alias in node.names)

    def _lines_of_import(self, node: ast.Import | ast.ImportFrom) -> range:
        """The lines of an import, with the comment right above it."""
        lines, first = self.source.splitlines(), node.lineno
        for other in self.tree.body:
            if other is not node and not (other.end_lineno < node.lineno or other.lineno > node.end_lineno):
                raise self.refusal(node.lineno, "two statements in one line. Give each a line of its own")
        while lines[first - 2].startswith("#"):
            first -= 1
        return range(first, node.end_lineno + 1)

    def bindings(self) -> dict[str, tuple]:
        """Name -> what it is, for all that it imports from elsewhere or binds by itself."""
        imported = {
            (module.split(".")[0] if name is None else name): (module.split(".")[0] if name is None else module, name)
            for module, name in self.imports
        }
        return imported | dict.fromkeys(self.defined, (f"{FOLDER}/{self.name}.py", "defined"))


def modules_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if node.level == 0 else []


def names_bound(node: ast.AST) -> set[str]:
    """Names that a statement binds in the module; those within functions and classes are their own."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return set()
    found = {node.id} if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) else set()
    if isinstance(node, ast.Import | ast.ImportFrom):
        found = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ExceptHandler) and node.name:
        found = {node.name}
    return found.union(*map(names_bound, ast.iter_child_nodes(node)))


def in_order(modules: dict[str, Module]) -> list[Module]:
    """Each behind those that it imports from; checks that every name it imports is there."""
    if ENTRY not in modules:
        raise CannotAmalgamate(f"{FOLDER}/ has no {ENTRY}.py, which is what transformers looks for.")
    for module in modules.values():
        for sibling, names in module.siblings.items():
            if sibling not in modules:
                raise CannotAmalgamate(
                    f"{FOLDER}/{module.name}.py imports from .{sibling}, and there is no {FOLDER}/{sibling}.py."
                )
            lacking = sorted(names - modules[sibling].bindings().keys() - set().union(*modules[sibling].siblings.values()))
            if lacking:
                raise CannotAmalgamate(f"{FOLDER}/{module.name}.py imports {', '.join(lacking)}, not defined in {sibling}.py.")
            changed = sorted(names & modules[sibling].changed)
            if changed:
                raise CannotAmalgamate(
                    f"{FOLDER}/{module.name}.py imports {', '.join(changed)}, which {sibling}.py changes by `global`: "
                    "an import has the first value, one file the last. Keep it in an object, or behind a function."
                )
    left_out = [f"{name}.py" for name in sorted(modules.keys() - modules[ENTRY].siblings.keys() - {ENTRY})]
    if left_out:
        raise CannotAmalgamate(
            f"{FOLDER}/{ENTRY}.py does not import from {', '.join(left_out)}: transformers before 5.12 copies only the modules "
            "that it imports by itself. Import something of each there."
        )
    try:
        order = TopologicalSorter({name: sorted(modules[name].siblings) for name in sorted(modules)}).static_order()
        return [modules[name] for name in order]
    except CycleError as error:
        circle = " -> ".join(f"{name}.py" for name in error.args[1])
        reason = f"Modules of {FOLDER}/ import each other in a circle: {circle}. Move what they share to another module."
        raise CannotAmalgamate(reason) from None


def refuse_conflicts(modules: list[Module]) -> None:
    """In one namespace, a name can stand for one thing only."""
    meant: dict[str, tuple[tuple, str]] = {}
    for module in modules:
        for name, thing in module.bindings().items():
            other, where = meant.setdefault(name, (thing, module.name))
            if other != thing:
                raise CannotAmalgamate(
                    f"{name} is one thing in {FOLDER}/{where}.py ({describe(other)}) and another in {FOLDER}/{module.name}.py "
                    f"({describe(thing)}). In one file it would be one of them only. Give one another name."
                )
            if hasattr(builtins, name) and thing[1] == "defined" and not name.startswith("__"):
                reason = f"{name} would hide Python's own {name} from all modules. Give it another name"
                raise module.refusal(module.defined[name], reason)


def describe(thing: tuple) -> str:
    where, name = thing
    return "defined there" if name == "defined" else f"import {where}" if name is None else f"from {where} import {name}"


def as_comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def head(modules: list[Module], source: str, version: str) -> str:
    """What the file is, for who opens it on the Hub."""
    made_of = f"the modules in {FOLDER}/ of {source or 'the repository that it was published from'}"
    lines = [
        f"One file, made of {made_of}{f', {version}' if version else ''}.",
        "To read or to change them, go there: scripts/amalgamate.py puts them together when they are published.",
        "Each stands below those that it imports from, word for word but for its imports and its docstring:",
        *(f"    {module.name + '.py':<15} {module.docstring.splitlines()[0]}" for module in modules),
    ]
    return "\n".join([LINE, as_comment("\n".join(lines)), LINE])


def amalgamate(sources: dict[str, str], source: str = "", version: str = "") -> str:
    """The one file.

    Args:
        sources: text of each module by its name, without `.py`.
        source, version: where the modules are and which state of them this is, for the head.

    Raises:
        CannotAmalgamate: it would not mean what the modules mean.
    """
    modules = in_order({name: Module(name, text) for name, text in sources.items()})
    refuse_conflicts(modules)
    imports = {key for module in modules for key in module.imports}
    plain = [f"import {module}" for module, name in sorted(imports, key=str) if name is None]
    names: dict[str, list[str]] = {}
    for module, name in sorted(key for key in imports if key[1] is not None):
        names.setdefault(module, []).append(name)
    named = [line for module in names for line in import_lines(module, names[module])]
    docstring = ast.get_docstring(modules[-1].tree, clean=False)
    parts = [f'"""{docstring}"""\n\n{head(modules, source, version)}\n\n' + "\n".join(plain + named)]
    for module in modules:
        about = module.docstring if module.name != ENTRY else "See the top of the file."
        parts.append(f"{LINE}\n# {module.name}.py\n#\n{as_comment(about)}\n{LINE}\n\n\n{module.body}")
    text = "\n\n\n".join(parts) + "\n"
    compile(text, f"{ENTRY}.py", "exec")
    return text


def import_lines(module: str, names: list[str]) -> list[str]:
    line = f"from {module} import {', '.join(names)}"
    return [line] if len(line) <= WIDTH else [f"from {module} import (", *(f"    {name}," for name in names), ")"]


def read_modules(root: Path) -> dict[str, str]:
    """The modules of a checkout."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((root / FOLDER).glob("*.py"))}


def published_code(root: Path, source: str = "", version: str = "") -> str:
    """What goes to the Hub as custom_generate/generate.py: of a single file (the first version was one), that file as it is."""
    sources = read_modules(root)
    return sources[ENTRY] if sources.keys() == {ENTRY} else amalgamate(sources, source, version)


def git(root: Path, *arguments: str) -> str:
    """What git says of a checkout, and nothing where there is none."""
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root)
    return done.stdout.strip() if done.returncode == 0 else ""


def source_of(root: Path) -> str:
    """The address of the checkout's remote, if it is one that others can open."""
    address = git(root, "remote", "get-url", "origin")
    address = re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", address).removesuffix(".git")
    return re.sub(r"//[^/@]*@", "//", address) if address.startswith("https://") else ""


def version_of(root: Path, revision: str | None = None) -> str:
    """The commit that last changed the modules, with the release before it, if any; of the tree or of a revision."""
    commit = git(root, "log", "-1", "--format=%h", "--abbrev=12", revision or "HEAD", "--", FOLDER)
    tag = git(root, "describe", "--tags", "--abbrev=0", commit) if commit else ""
    changed = "" if revision or not git(root, "status", "--porcelain", "--", FOLDER) else " with changes that are not committed"
    return f"commit {commit}{f' (after {tag})' if tag else ''}{changed}" if commit else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help=f"the checkout whose {FOLDER}/ is read (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file to write (default: none is written)")
    parser.add_argument(
        "--source", help="address of the repository with the modules, for the head (default: that of git's remote)"
    )
    args = parser.parse_args()
    try:
        text = published_code(args.root, args.source or source_of(args.root), version_of(args.root))
    except (CannotAmalgamate, SyntaxError) as error:
        sys.exit(f"error: {error}")
    if args.output:
        args.output.write_text(text, encoding="utf-8", newline="\n")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    output = str(args.output) if args.output else None
    print(json.dumps({"modules": len(read_modules(args.root)), "lines": text.count("\n"), "sha256": sha256, "output": output}))


if __name__ == "__main__":
    main()
