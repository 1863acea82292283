"""The model card: its code and its commands run, and what it lists, links and shows is what is there.

Examples run on the tiny model in place of the models and repositories that they name on the Hub.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import evaluate
import publish
import pytest
import transformers
from families import TRANSFORMERS, allow_local_code
from packaging.version import Version

from custom_generate.generate import generate
from custom_generate.options import DEFAULT_PREFILL_CHUNK_SIZES, UNSUPPORTED_OPTIONS
from custom_generate.window import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METADATA, TEXT = publish.split_card(README)
# Its name in the examples: another one in what has been published.
REPO_ID = re.search(r'custom_generate="([\w.-]+/[\w.-]+)"', TEXT)[1]
MODEL_ID = "Qwen/Qwen3-0.6B"
# One entry for each block of code: the heading above it, and the code.
PARTS = [(part.partition("\n")[0].strip(), part) for part in re.split(r"^#+ ", TEXT, flags=re.MULTILINE)]
PYTHON = [(heading, code) for heading, part in PARTS for code in re.findall(r"```python\n(.*?)```", part, re.DOTALL)]
BASH = [(heading, code) for heading, part in PARTS for code in re.findall(r"```bash\n(.*?)```", part, re.DOTALL)]
IMAGES = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", TEXT)
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
SECTIONS = [
    "Description",
    "Base model",
    "Model compatibility",
    "Additional Arguments",
    "Output Type changes",
    "Example usage",
    "Results",
    "How it works",
    "FAQ",
    "Limits",
    "Files",
    "Publish your own",
    "Citation",
]
# The long commands, cut short: option and value -> what takes their place. A command without an entry runs as it is.
SHORTER = {
    "scripts/evaluate.py": "scripts/evaluate.py --num-tokens 200 --batch-size 2",
    "scripts/stream_eval.py": "scripts/stream_eval.py --num-streams 2 --num-queries 1 --window-length 32",
    "--num-tokens 1000000": "--num-tokens 300",
    "--num-tokens 100000 --skip-tokens 900000": "--num-tokens 200 --skip-tokens 100",
    "--window-length 16 32 64 128 256 512 1024 2048 4096": "--window-length 16 256",
    "--num-tokens 700": "--num-tokens 300",
    "--num-tokens 12288": "--num-tokens 300",
    "--num-tokens 16384": "--num-tokens 300",
    "--max-new-tokens 200000": "--max-new-tokens 300",
    "--num-threads 1": "--num-threads 1 --preset tiny --window-length 32 --num-tokens 4 --num-rounds 2 --methods sink dynamic",
    "--window-length 16384 32768 --num-rounds 9 --num-tokens 16": "--max-fill-length 8",
    "--batch-size 8 --window-length 256 1024 4096 --num-rounds 9 --num-tokens 16": "--batch-size 2",
    "--methods sink sink-compiled dynamic static static-compiled rerotate frozen": "--methods sink frozen",
    "--methods sink sink-compiled dynamic static-compiled rerotate frozen": "--methods sink frozen",
    "--measure age --preset tiny --window-length 256 --num-tokens 200 --num-rounds 60 --age 512 100000 1000000": "--measure age --age 20 40",
    "--measure stream --preset tiny --window-length 256 --stream-length 1000 10000 100000": "--measure stream --stream-length 20 40",
    "--methods sink-generate sink-static-generate sink-compiled dynamic-generate native-window-generate rerotate": "--methods sink-generate",
    "--measure prefill --window-length 256": "--measure prefill --prefill-windows 4",
    "--chunk-length 128 256 --max-dynamic-length 4096 --prefill-rounds 5": "--chunk-length 8 --prefill-rounds 1",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def run(command: list, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=600, **kwargs
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_example(code: str, repo: Path, cwd: Path) -> str:
    """The standard output of an example, run on the model in the folder `repo`."""
    for name in (REPO_ID, MODEL_ID):
        code = code.replace(f'"{name}"', repr(str(repo)))
    assert str(repo) in code
    code = code.replace("torch.compile(", 'torch.compile(backend="eager", model=')  # captured, not translated: that takes minutes
    return run([sys.executable, "-c", allow_local_code(repo) + code], cwd).stdout


@pytest.fixture(scope="module")
def copy_of_repository(tmp_path_factory) -> Path:
    """What is published, in a folder in which commands may write."""
    folder = tmp_path_factory.mktemp("copy") / "sink_cache"
    for path in publish.list_files(ROOT, publish.PATTERNS):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return folder


# What runs


@pytest.mark.parametrize("code", [pytest.param(code, id=heading) for heading, code in PYTHON])
def test_the_code_runs(code, tmp_path):
    assert run_example(code, ROOT, tmp_path).strip()


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished answers", "answers cut short"])
def test_the_chat_follows_a_chat_template(copy_of_repository, tmp_path, is_finished):
    """The ids are put together turn by turn, and have to be those of the template for the whole conversation; the tiny model has
    none, so the example as it is only shows the other branch."""
    repo = Path(shutil.copytree(copy_of_repository, tmp_path / "with_template"))
    (repo / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    code = dict(PYTHON)["Chat"]
    assert "max_new_tokens=50" in code
    if is_finished:  # the last token allowed is the one that ends an answer
        code = code.replace("max_new_tokens=50", "max_new_tokens=50, forced_eos_token_id=tokenizer.eos_token_id")
    code += """
import re
conversation = tokenizer.decode(text[0])
said = re.findall(r"\\[(user|assistant)\\](.*?)(?:</s>|$)", conversation, re.S)
messages = [{"role": role, "content": content} for role, content in said]
assert [message["role"] for message in messages] == 3 * ["user", "assistant"], conversation
assert messages[4]["content"] == "Where is the tallest?", conversation
expected = tokenizer.apply_chat_template(messages, tokenize=False)
assert expected == conversation + tokenizer.eos_token, conversation
assert cache.get_seq_length() >= text.shape[1] - 1
"""
    run_example(code, repo, tmp_path)


@pytest.mark.skipif(TRANSFORMERS < Version("4.53"), reason="the README says that scripts want 4.53 or newer")
@pytest.mark.parametrize("code", [pytest.param(code, id=heading) for heading, code in BASH if "python scripts/" in code])
def test_the_commands_run(code, copy_of_repository):
    """One after the other, in the repository. Installing is what CI does; publishing and the table of types have their own tests."""
    commands = [line.rpartition("&& ")[2] for line in code.splitlines()]
    tested_elsewhere = ("pytest", "compatibility.py", "publish.py", "hf auth")
    commands = [command for command in commands if not any(word in command for word in tested_elsewhere)]
    for command in commands:
        for long, short in SHORTER.items():
            command = command.replace(long, short)
        if command == "python scripts/demo.py":
            command += " --max-new-tokens 300"
        if "figures.py" in command or "plot.py" in command:
            pytest.importorskip("matplotlib")
        program, *arguments = shlex.split(command)
        assert program == "python"
        said = "import os\n/stats\n"  # to the chat
        assert json.loads(run([sys.executable, *arguments], copy_of_repository, input=said).stdout.strip().splitlines()[-1])


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"^pip install.*pytest.*$", README, re.MULTILINE).group()
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


# `transformers serve` and `transformers chat`

SERVE_HEADING = "`transformers serve` and `transformers chat`"
HAS_SERVE = importlib.util.find_spec("fastapi") is not None and TRANSFORMERS >= Version("5.5")
serving = pytest.mark.skipif(not HAS_SERVE, reason="needs transformers[serving], 5.5 or newer")
# A window that an answer leaves far behind, in place of the one in the examples.
SERVED_WINDOW, NUM_SERVED_TOKENS = "24", 100


class Served:
    """A folder as the README makes it, and a server as the README starts it."""

    def __init__(self, place: Path, repository: Path):
        setup, self.chat, self.request = (
            code.replace("1024", SERVED_WINDOW).strip() for heading, code in BASH if heading == SERVE_HEADING
        )
        self.place, self.folder = place, place / "qwen3-sinks"
        for line in filter(None, setup.splitlines()):
            words = shlex.split(line)
            if words[:3] == ["hf", "download", MODEL_ID]:
                assert words[3:] == ["--local-dir", self.folder.name]
                self.folder.mkdir()
                for path in publish.list_files(repository, publish.MODEL_PATTERNS):
                    shutil.copyfile(repository / path, self.folder / path)
                (self.folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
            elif words[:3] == ["hf", "download", REPO_ID]:
                assert words[3:] == ["--include", "custom_generate/*", "--local-dir", self.folder.name]
                shutil.copytree(repository / "custom_generate", self.folder / "custom_generate")
            elif words[:2] == ["transformers", "serve"]:
                self._start(words[1:])
            elif words[0] == "echo":
                run(["bash", "-c", line], place)
            else:
                assert words[:2] == ["pip", "install"]

    def _start(self, words: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://localhost:{free.getsockname()[1]}"
        words += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], "--device", "cpu"]
        self.log = open(self.place / "log", "w")
        self.process = subprocess.Popen(
            [program("transformers"), *words], cwd=self.place, env=ENVIRONMENT, stdout=self.log, stderr=self.log
        )
        for _ in range(120):
            try:
                return urllib.request.urlopen(self.url + "/health").close()
            except OSError:
                assert self.process.poll() is None, (self.place / "log").read_text()[-3000:]
                time.sleep(1)
        raise TimeoutError("The server does not answer.")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self.log.close()

    def check(self, answer: str, messages: list[dict]) -> None:
        """It must be the likeliest text with the window, and not that of a full cache. (transformers 5.23 puts the prompt in
        front of it, where a Qwen model has a template that is not Qwen's.)"""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        options = {"max_new_tokens": NUM_SERVED_TOKENS, "do_sample": False}
        texts = [
            tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True)
            for sequences in (
                generate(ids, model=model, window_length=int(SERVED_WINDOW), num_sink_tokens=4, **options),
                model.generate(ids, **options),
            )
        ]
        assert answer.endswith(texts[0]) and not answer.endswith(texts[1])


def program(name: str) -> str:
    """A program of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


@pytest.fixture(scope="module")
def served(tmp_path_factory, copy_of_repository):
    served = Served(tmp_path_factory.mktemp("served"), copy_of_repository)
    yield served
    served.stop()


@serving
def test_a_request_to_the_server_is_answered_from_the_window(served):
    words = shlex.split(served.request.replace("http://localhost:8000", served.url))
    assert words[0] == "curl" and words[2:4] == ["-H", "Content-Type: application/json"] and words[4] == "-d"
    body = json.loads(words[5]) | {"max_tokens": NUM_SERVED_TOKENS, "temperature": 0}
    request = urllib.request.Request(words[1], json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    assert answer["usage"]["completion_tokens"] == NUM_SERVED_TOKENS
    served.check(answer["choices"][0]["message"]["content"], body["messages"])


@serving
def test_a_chat_with_the_server_is_answered_from_the_window(served):
    """Two turns, each cut at the limit of tokens: "n" says not to go on. What was said is taken from what `!save` writes."""
    name, command, folder, *options = shlex.split(served.chat)
    flags = [served.url, "do_sample=False", f"max_new_tokens={NUM_SERVED_TOKENS}"]
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "HF_HUB_OFFLINE"}  # it forbids loopback, too
    done = subprocess.run(
        [program(name), command, folder, *flags, *options],
        input="Tell a story.\nn\nGo on.\nn\n!save\n!exit\n",
        capture_output=True,
        text=True,
        env=environment,
        cwd=served.place,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (saved,) = served.place.glob("chat_history/**/*.json")
    history = json.loads(saved.read_text())["chat_history"]
    assert [message["role"] for message in history] == 2 * ["user", "assistant"]
    for turn in (1, 3):
        served.check(history[turn]["content"], history[:turn])


# What it says


def test_the_metadata_is_what_the_hub_lists_a_method_by():
    assert METADATA["library_name"] == "transformers" and METADATA["pipeline_tag"] == "text-generation"
    assert METADATA["tags"][0] == "custom_generate" and len(set(METADATA["tags"])) == len(METADATA["tags"])
    assert METADATA["license"] == "apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    assert "base_model" not in METADATA, "the tiny model was trained from scratch"


def test_the_sections_are_in_the_order_of_the_hubs_cards():
    assert re.findall(r"^## (.*)$", TEXT, re.MULTILINE) == SECTIONS


def test_the_first_question_is_whether_the_context_gets_longer():
    first = re.search(r"^\*\*(.*?)\*\* (\w+)", TEXT.partition("## FAQ")[2], re.MULTILINE)
    assert first.groups() == ("Does the context get longer?", "No")


def test_refused_options_are_listed():
    for name in UNSUPPORTED_OPTIONS:
        assert f"`{name}`" in README


def test_defaults_are_those_of_the_code():
    filling, full, undivided = DEFAULT_PREFILL_CHUNK_SIZES
    assert f"| `window_length` | {DEFAULT_WINDOW_LENGTH} |" in README
    assert f"| `num_sink_tokens` | {DEFAULT_NUM_SINK_TOKENS} |" in README
    assert f"| `prefill_chunk_size` | {filling}, {full}, {undivided} |" in README


def test_the_range_of_releases_begins_where_the_requirements_do():
    requirements = dict(line.split(">=") for line in (ROOT / "custom_generate" / "requirements.txt").read_text().split())
    assert f"transformers {requirements['transformers']} to " in README
    assert f"torch {requirements['torch']} or newer" in README


def table_after(title: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table whose head begins with `title`."""
    table = re.search(rf"^\| {title} .*?\n\n", README, re.MULTILINE | re.DOTALL).group().strip().splitlines()
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in table)
    return head, rows


def measured(name: str) -> dict[str, list[dict]]:
    """The lines of a file in results/, by what the table calls each method."""
    found = {}
    for row in evaluate.read_csv(ROOT / "results" / name):
        numbers = (int(row[column]) if row[column] else None for column in ("window_length", "num_sink_tokens"))
        method = f"{evaluate.Method(row['method'], *numbers)}, {row['dtype']}, from {row['skip_tokens']}"
        found.setdefault(method, []).append(row)
    return found


def test_the_results_are_those_that_were_measured():
    """The table is made of the same numbers as the figure, and those are in the repository."""
    head, table = table_after("nats a token at positions")
    rows = measured("evaluate.csv")
    edges = [tuple(map(int, cell.split("-"))) for cell in head[1:-1]]
    assert len(edges) == 5 and len(table) == len(rows) == 5
    for name, *nats, held in table:
        for (start, stop), value in zip(edges, nats, strict=True):
            expected = evaluate.over(rows[f"{name}, float32, from 0"], start, stop)
            assert float(value) == pytest.approx(expected["nats"], abs=0.006), (name, start)
        assert float(held) == pytest.approx(expected["bytes_held"] / 2**20, abs=0.006)


def test_long_streams_are_those_that_were_measured():
    """Nats over the last tenth in the long stream and in one that began there, and what is held: after the first window, and in the end."""
    _, table = table_after("long streams")
    rows = measured("long.csv")
    for dtype, shown_length, *nats, first_held, last_held in table:
        length = int(shown_length.replace(",", ""))
        start = length * 9 // 10
        in_stream, fresh = (rows[f"window 256, 4 sinks, {dtype}, from {skipped}"] for skipped in (0, start))
        found = [evaluate.over(in_stream, start + 4000, length)["nats"], evaluate.over(fresh, 4000, length - start)["nats"]]
        assert [float(value) for value in nats] == [pytest.approx(value, abs=6e-4) for value in found]
        assert abs(found[0] / found[1] - 1) < 0.02
        assert in_stream[0]["bytes_held"] == in_stream[-1]["bytes_held"] and first_held == last_held
        assert float(last_held) == pytest.approx(int(in_stream[-1]["bytes_held"]) / 2**20, abs=0.006)


def test_the_windows_to_choose_from_are_those_that_were_measured():
    head, table = table_after("window_length")
    rows = measured("choice.csv")
    for window_length, *nats in table:
        for num_sinks, value in zip(head[1:], nats, strict=True):
            if value:
                method = f"{evaluate.Method('sinks', int(window_length), int(num_sinks.split()[0]))}, float32, from 0"
                assert float(value) == pytest.approx(evaluate.over(rows[method], 4096, 12288)["nats"], abs=0.006), method


# What it links and shows


def test_linked_files_are_published():
    published = set(publish.list_files(ROOT, publish.PATTERNS))
    links = {link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("https://")}
    assert (
        links == {path for _, path in IMAGES} == {path.relative_to(ROOT).as_posix() for path in (ROOT / "figures").glob("*.png")}
    )
    for path in links | set(re.findall(r"`((?:scripts|custom_generate|tests|results)/[\w./]+\.\w+)", TEXT)):
        assert path in published, path


def test_every_script_is_listed():
    for script in (ROOT / "scripts").glob("*.py"):
        if "argparse" in script.read_text(encoding="utf-8") and script.name != "common.py":
            assert f"`scripts/{script.name}`" in README, script


@pytest.mark.parametrize("alt, path", IMAGES)
def test_figures_are_small_and_legible_on_any_background(alt, path):
    assert len(alt) > 100, "for those who can't see it"
    content = (ROOT / path).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) < 150_000
    color_type = content[25]
    assert color_type in (0, 2, 3) and b"tRNS" not in content, "transparent: it would vanish in dark mode"


def test_tables_written_by_scripts_have_their_place():
    for name in ("releases", "compatibility", "works-with"):
        assert README.count(f"<!-- {name}: begin -->") == README.count(f"<!-- {name}: end -->") == 1
