"""Run the tests with every minor release of transformers, each in an environment of its own, and write down what came out.

Torch and pytest are installed once and shared, a release adds only what it brings itself: about 150 MB. Environments are kept, so
that a second run starts at once. Each row of the table is written as soon as it is measured; a run of some releases replaces
their rows only. The last line is one JSON document.

    python scripts/version_matrix.py                                     # all releases, about three minutes each
    python scripts/version_matrix.py --releases 4.57 newest --end-to-end
    python scripts/version_matrix.py --releases 5.23 --python python3.13 --torch 2.9.1
    python scripts/version_matrix.py --write                             # the table into its page, nothing is run
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.version import Version
from tqdm import tqdm

from common import ROOT, write_page_block

TABLE = ROOT / "results" / "releases.csv"
COLUMNS = ("release", "python", "torch", "huggingface_hub", "passed", "skipped", "failed", "seconds")
OLDEST = re.search(r"transformers>=([\d.]+)", (ROOT / "custom_generate" / "requirements.txt").read_text()).group(1)
# The rules on every family that a release has, the cache and generate. What is left out is about the newest release, or the
# scripts.
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in "families invariants cache generate beams assisted kinds_of_windows state".split()
)
END_TO_END = ("tests/test_loading.py", "tests/test_publish.py", "tests/test_static.py")
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", "-m", "not also_eager")
SHARED_PACKAGES = ("pytest>=8", "hypothesis")


def run(*command: str | Path, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], text=True, capture_output=True, **kwargs)


def run_or_stop(*command: str | Path) -> str:
    done = run(*command)
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def minor_releases() -> list[str]:
    """All minor releases from the oldest that the requirements allow, as pip sees them."""
    listed = run_or_stop(sys.executable, "-m", "pip", "index", "versions", "transformers")
    versions = [Version(text) for text in re.search(r"Available versions: (.*)", listed).group(1).split(", ")]
    minors = {(version.major, version.minor) for version in versions if version >= Version(OLDEST)}
    return [f"{major}.{minor}" for major, minor in sorted(minors)]


class Environments:
    """One environment with torch and pytest, and one on top of it for each release."""

    def __init__(self, folder: Path, python: str, torch: str):
        self.python_version = run_or_stop(python, "-c", "import platform; print(platform.python_version())").strip()
        self.python, self.folder = python, folder / f"python{self.python_version}-torch{torch}"
        numpy = "numpy<2" if Version(torch) < Version("2.3") else "numpy"  # which they were compiled with
        self.shared = self._make("shared", [f"torch=={torch}", numpy, *SHARED_PACKAGES])

    def of_release(self, release: str) -> Path:
        """The interpreter of the environment with the newest patch of a minor release."""
        return self._make(f"transformers-{release}", [f"transformers=={release}.*", "tqdm"], self.shared)

    def _make(self, name: str, packages: list[str], shared: Path | None = None) -> Path:
        folder = self.folder / name
        interpreter, is_done = folder / "bin" / "python", folder / "done"
        if not is_done.exists():
            run_or_stop(self.python, "-m", "venv", "--clear", *(["--without-pip"] if shared else []), folder)
            if shared:
                site = "import sysconfig; print(sysconfig.get_path('purelib'))"
                path = Path(run_or_stop(interpreter, "-c", site).strip(), "shared.pth")
                path.write_text(run_or_stop(shared, "-c", site))
            run_or_stop(shared or interpreter, "-m", "pip", "--python", interpreter, "install", "--quiet", *packages)
            is_done.touch()
        return interpreter


def measure(interpreter: Path, release: str, tests: list[str]) -> dict:
    """One row of the table."""
    what = "import platform; from importlib.metadata import version; "
    what += "print(platform.python_version(), version('torch'), version('huggingface_hub'))"
    python, torch, hub = run_or_stop(interpreter, "-c", what).split()
    row = {"release": release, "python": python, "torch": torch.split("+")[0], "huggingface_hub": hub}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = run(
            interpreter, *PYTEST, f"--junitxml={report}", *tests,
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        suite = ElementTree.parse(report).getroot().find("testsuite").attrib if report.exists() else {}
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    row |= {"passed": tests - skipped - failed, "skipped": skipped, "failed": failed}
    if done.returncode:
        row["failed"] = max(failed, 1)  # it may not even have got to the tests, or was killed
        tqdm.write(f"transformers {release}: {done.stdout[-4000:]}{done.stderr[-2000:]}", file=sys.stderr)
    return row | {"seconds": round(time.perf_counter() - start)}


def read_table() -> list[dict]:
    if not TABLE.exists():
        return []
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def write_row(row: dict) -> None:
    """Into the table, in the place of a row of the same release; rows of releases that are no longer served go."""
    key = row_key(row)
    kept = [other for other in read_table() if row_key(other) != key and Version(other["release"]) >= Version(OLDEST)]
    rows = sorted([*kept, row], key=row_key)
    TABLE.parent.mkdir(exist_ok=True)
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def row_key(row: dict) -> tuple:
    return tuple(Version(row[name]) for name in ("release", "python", "torch"))


def markdown_table(rows: list[dict]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join(lines + [f"| {' | '.join(str(row[name]) for name in COLUMNS)} |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--releases", nargs="+", metavar="X.Y", help=f"minor releases, or newest (default: all from {OLDEST} on)")
    parser.add_argument("--python", default=sys.executable, help="interpreter to make environments of (default: this one)")
    parser.add_argument("--torch", default="2.13.0", help="release of torch (default: %(default)s)")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest is to run (default: %(default)s)")
    parser.add_argument(
        "--end-to-end",
        action="store_true",
        help="also publish to a Hub on loopback, load the one file from there, the modules from a folder, in every way; compile",
    )
    parser.add_argument("--jobs", type=int, default=1, help="releases at a time (default: %(default)s)")
    parser.add_argument(
        "--environments",
        type=Path,
        default=ROOT / ".venv" / "matrix",
        help="folder to keep environments in (default: %(default)s)",
    )
    parser.add_argument("--write", action="store_true", help="write the table into its page, and run nothing")
    args = parser.parse_args()
    if args.write:
        rows = read_table()
        write_page_block("releases", markdown_table(rows))
        print(json.dumps({"rows": rows}))
        return

    tests = [*args.tests, *(END_TO_END if args.end_to_end else ())]
    releases = args.releases or minor_releases()
    releases = [minor_releases()[-1] if release == "newest" else release for release in releases]
    environments = Environments(args.environments, args.python, args.torch)
    interpreters = {release: environments.of_release(release) for release in tqdm(releases, desc="environments", disable=None)}
    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        measured = pool.map(lambda release: measure(interpreters[release], release, tests), releases)
        for row in tqdm(measured, desc="releases", total=len(releases), disable=None):
            tqdm.write(json.dumps(row), file=sys.stderr)
            rows.append(row)
            if tuple(tests) == TESTS:
                write_row(row)
    print(markdown_table(rows))
    print(json.dumps({"rows": rows, "failed": [row["release"] for row in rows if row["failed"]]}))
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
