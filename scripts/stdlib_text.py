"""The text of the tiny model: the source code of the Python standard library that runs this script.

It is the one large body of real text that every machine with Python has, offline. About one file in twenty is held out
of training, chosen by a checksum of its path, so that the split is the same everywhere.
"""

import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

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
