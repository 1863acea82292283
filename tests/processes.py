"""Scripts as a user calls them, each in a process of its own that begins at once.

Importing torch and transformers takes longer than most scripts run on the tiny model. So the processes are forked from a server that has
imported both, and nothing of this repository. (Where there is no fork, on Windows, they import them anew.)
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
IMPORTED = ["torch", "transformers", "transformers.generation", "transformers.models.llama.modeling_llama", "tqdm"]
HAS_FORK = "forkserver" in multiprocessing.get_all_start_methods()
ROOT = Path(__file__).parents[1]
# Folders from which the tests import: no process finds them by itself.
FOLDERS_OF_TESTS = {str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests"), ""}
context = multiprocessing.get_context("forkserver" if HAS_FORK else "spawn")


def run_script(
    script: str | Path, *arguments, cwd: Path, input: str = "", timeout: float = 600, check: bool = True
) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, script, *arguments], cwd=cwd, input=input, capture_output=True, text=True)`, offline. With
    `check`, it has to succeed."""
    before = os.environ.copy()
    os.environ.update(ENVIRONMENT)  # huggingface_hub reads some of it when it is imported
    try:
        if HAS_FORK:
            context.set_forkserver_preload(IMPORTED)
            multiprocessing.forkserver.ensure_running()
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ("in", "out", "err")]
            streams[0].write_text(input, encoding="utf-8")
            arguments = [str(script), *map(str, arguments)]
            process = context.Process(target=_run, args=(arguments, str(cwd), [str(path) for path in streams]))
            process.start()
            process.join(timeout)
            if process.exitcode is None:
                process.kill()
                raise subprocess.TimeoutExpired(arguments, timeout)
            out, err = (path.read_text(encoding="utf-8", errors="replace") for path in streams[1:])
            assert process.exitcode == 0 or not check, err[-3000:]
            return subprocess.CompletedProcess(arguments, process.exitcode, out, err)
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_code(code: str, cwd: Path, input: str = "", timeout: float = 600) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, "-c", code], ...)`: modules are found in the folder in which it runs."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "code.py"
        script.write_text(f"import sys\nsys.path[0] = ''\n{code}", encoding="utf-8")
        return run_script(script, cwd=cwd, input=input, timeout=timeout)


def _run(arguments: list[str], cwd: str, streams: list[str]) -> None:
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    os.chdir(cwd)
    sys.argv = arguments
    sys.path[:] = [str(Path(arguments[0]).parent.resolve()), *(path for path in sys.path if path not in FOLDERS_OF_TESTS)]
    runpy.run_path(arguments[0], run_name="__main__")
