"""The size of the house and the direction of its imports: what a reader has to hold in the head. A change that needs a larger number has
to make room first."""

import ast
from functools import cache
from pathlib import Path

import pytest

from amalgamate import Module, in_order, read_modules

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "custom_generate"
SOURCES = read_modules(ROOT)
# The goal for all modules together is 3,000. Until then the number may only go down. (It went up by 43 for workspace.py, without
# which a long prompt takes a tenth longer.)
MAX_LINES, MAX_LINES_OF_MODULE, MAX_LINES_OF_GENERATE = 4718, 400, 500
MAX_LINES_OF_FUNCTION, MAX_LINE_LENGTH = 70, 130
MAX_LINES_OF_CACHE, MAX_METHODS_OF_CACHE = 350, 30
# What a reader needs to follow a token: these modules, and of generate.py the class and the function.
FIRST_SITTING, MAX_LINES_OF_FIRST_SITTING = ("window", "rotation", "plan", "layers"), 1000

pytestmark = pytest.mark.skipif(SOURCES.keys() == {"generate"}, reason="a single file")
of_every_module = pytest.mark.parametrize("name", sorted(SOURCES))


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name], f"{name}.py")


def num_lines(node: ast.AST) -> int:
    """With its decorators."""
    return node.end_lineno - min([node.lineno, *(each.lineno for each in node.decorator_list)]) + 1


def in_generate(name: str) -> ast.ClassDef | ast.FunctionDef:
    return next(node for node in tree("generate").body if getattr(node, "name", None) == name)


def functions(node: ast.AST) -> list:
    return [each for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_all_modules_together():
    assert sum(text.count("\n") for text in SOURCES.values()) <= MAX_LINES


@of_every_module
def test_a_module_is_short_and_says_what_it_is_about(name):
    lines = SOURCES[name].splitlines()
    assert len(lines) <= (MAX_LINES_OF_GENERATE if name == "generate" else MAX_LINES_OF_MODULE)
    assert max(map(len, lines)) <= MAX_LINE_LENGTH, "short by cramming is not short"
    assert ast.get_docstring(tree(name))


@of_every_module
def test_a_function_is_short(name):
    too_long = {each.name: num_lines(each) for each in functions(tree(name)) if num_lines(each) > MAX_LINES_OF_FUNCTION}
    assert not too_long


def test_the_cache_is_short():
    """Its own lines; and with what it inherits from classes of this repository it has no more methods than that."""
    own = in_generate("SinkCache")
    assert num_lines(own) <= MAX_LINES_OF_CACHE
    assert len([node for node in own.body if isinstance(node, ast.FunctionDef)]) <= MAX_METHODS_OF_CACHE


def test_the_first_sitting_is_one():
    read = sum(SOURCES[name].count("\n") for name in FIRST_SITTING)
    assert read + num_lines(in_generate("SinkCache")) + num_lines(in_generate("generate")) <= MAX_LINES_OF_FIRST_SITTING


def test_imports_point_one_way_and_generate_imports_every_module():
    """`in_order` refuses circles, names that are not there, and a module that generate.py does not import."""
    order = in_order({name: Module(name, text) for name, text in SOURCES.items()})
    assert order[-1].name == "generate" and len(order) == len(SOURCES)


def test_no_module_knows_the_cache():
    """Those before generate.py take it as an argument."""
    for name in SOURCES.keys() - {"generate"}:
        used = {node.id for node in ast.walk(tree(name)) if isinstance(node, ast.Name)}
        assert "SinkCache" not in used, name


@cache
def private_names() -> dict[str, set[str]]:
    """Private name -> the modules that define it: at the top, as a method, or as an attribute of `self`."""
    found: dict[str, set[str]] = {}
    for name in SOURCES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, set()).add(name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.setdefault(node.attr, set()).add(name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.setdefault(node.id, set()).add(name)
    return {name: modules for name, modules in found.items() if name.startswith("_") and not name.startswith("__")}


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@of_every_module
def test_no_private_member_of_another_module(name):
    """Neither imported, nor reached through an object, nor, in a subclass, through `self`. (What is transformers' own is not meant.)"""
    used = {node.attr for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)}
    imported = {alias.name for node in tree(name).body if isinstance(node, ast.ImportFrom) and node.level for alias in node.names}
    assert not {each for each in imported if each.startswith("_")}
    elsewhere = {each: modules for each, modules in private_names().items() if name not in modules}
    assert not used & elsewhere.keys()
