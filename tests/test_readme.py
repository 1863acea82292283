"""README.md and docs/: every example and every command runs, links lead somewhere, and tables say what was measured.

Examples run on the tiny model in place of the models and repositories that they name on the Hub. Nothing here fixes the
wording of a page.
"""

import functools
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

import pytest
import transformers
import yaml
from packaging.version import Version

import evaluate
import processes
from custom_generate.feed import DEFAULT_PREFILL_CHUNK_SIZES
from custom_generate.generate import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, generate
from custom_generate.options import UNSUPPORTED_OPTIONS
from processes import run_code, run_script

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
METADATA = yaml.safe_load(re.match(r"---\n(.*?\n)---\n", TEXTS[README], re.DOTALL)[1])
MODEL_ID = "Qwen/Qwen3-0.6B"
# The name of this repository in the examples: another one in what has been published.
REPO_ID = re.search(r'custom_generate="([\w.-]+/[\w.-]+)"', TEXTS[README])[1]
# What is published and what the commands need.
COPIED = ("custom_generate", "docs", "figures", "results", "scripts", "tests")
ENVIRONMENT = os.environ | processes.ENVIRONMENT
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Options that make a measurement small: they stand behind those of the page, and the last one counts.
SMALL = {
    "scripts/benchmark.py": "--preset tiny --window-length 32 --num-tokens 4 --num-rounds 2 --batch-size 2 "
    "--methods sink dynamic --age 20 40 --stream-length 20 40 --prefill-windows 4 --chunk-length 8 --prefill-rounds 1",
    "scripts/chat.py": "--max-new-tokens 20",
    "scripts/demo.py": "--max-new-tokens 300",
    "scripts/evaluate.py": "--num-tokens 200 --skip-tokens 0 --batch-size 2 --window-length 96",
    "scripts/plot.py": "",
    "scripts/stream_eval.py": "--num-streams 2 --num-queries 1 --window-length 32",
}
# Options that ask for another model than the tiny one.
ANOTHER_MODEL = {"--model", "--dataset", "--task"}


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of code of a page in one language: the line on which each begins, and its code."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL)
    return [(TEXTS[page].count("\n", 0, block.start(1)), block[1]) for block in found]


def images(page: Path) -> list[tuple[str, str]]:
    """Description and path of each figure of a page."""
    return re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", TEXTS[page])


def commands(page: Path) -> list[str]:
    """The commands of a page that run a script of this repository, without repetitions."""
    lines = [line for _, code in blocks(page, "bash") for line in code.splitlines()]
    found = [line.rpartition("&& ")[2].partition("  # ")[0].strip() for line in lines]
    return list(dict.fromkeys(command for command in found if command.startswith("python scripts/")))


def run(command: list, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=600, **kwargs
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def copy_of_repository(tmp_path_factory) -> Path:
    """A copy in which commands may write, and whose model has a chat template."""
    folder = tmp_path_factory.mktemp("copy") / "sink_cache"
    folder.mkdir()
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for path in [README, *ROOT.glob("*.json"), *ROOT.glob("*.safetensors")]:
        shutil.copyfile(path, folder / path.name)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


# What runs

# Every example goes on from the first one of its page, each by itself. Compiled code is captured and not translated: that would
# take minutes.
RUN_BLOCKS = """
import contextlib, copy, functools, io, json, sys
import torch
torch.compile = functools.partial(torch.compile, backend="eager")
page, blocks = json.load(sys.stdin)
first = {}
for number, (line, code) in enumerate(blocks):
    names = first if number == 0 else first | {"model": copy.deepcopy(first["model"])}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile("\\n" * line + code, page, "exec"), names)
    assert said.getvalue().strip(), f"The example in line {line + 1} of {page} prints nothing."
print(len(blocks))
"""


def on_the_tiny_model(code: str, repo: Path) -> str:
    for name in (REPO_ID, MODEL_ID):
        code = code.replace(f'"{name}"', repr(str(repo)))
    return code


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_every_example_runs(page, copy_of_repository):
    examples = [(line, on_the_tiny_model(code, copy_of_repository)) for line, code in blocks(page, "python")]
    done = run_code(RUN_BLOCKS, cwd=copy_of_repository, input=json.dumps([str(page), examples]))
    assert int(done.stdout.strip().splitlines()[-1]) == len(examples)


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished answers", "answers cut short"])
def test_the_chat_follows_a_chat_template(copy_of_repository, tmp_path, is_finished):
    """The ids are put together turn by turn, and have to be the ids of the template for the whole conversation."""
    first, *others = [code for _, code in blocks(README, "python")]
    (code,) = [code for code in others if "apply_chat_template" in code]
    if is_finished:  # the last token allowed is the one that ends an answer
        first += "\nmodel.generation_config.forced_eos_token_id = tokenizer.eos_token_id\n"
    code += """
import re
conversation = tokenizer.decode(text[0])
said = re.findall(r"\\[(user|assistant)\\](.*?)(?:</s>|$)", conversation, re.S)
messages = [{"role": role, "content": content} for role, content in said]
assert len(messages) == 6 and [message["role"] for message in messages] == 3 * ["user", "assistant"], conversation
expected = tokenizer.apply_chat_template(messages, tokenize=False)
assert expected == conversation + tokenizer.eos_token, conversation
assert cache.get_seq_length() >= text.shape[1] - 1
"""
    run_code(on_the_tiny_model(first + code, copy_of_repository), cwd=tmp_path)


@functools.cache
def help_of(script: str) -> str:
    return run_script(script, "--help", cwd=ROOT).stdout


@pytest.mark.parametrize("command", list(dict.fromkeys(command for page in PAGES for command in commands(page))))
def test_every_command_runs(command, copy_of_repository):
    """Measurements run small. Where a command needs another model or the Hub, or takes hours, only its options are compared with the
    options of its script: installing is what CI does, and the other scripts have tests of their own."""
    _, script, *options = shlex.split(command)
    if script == "scripts/plot.py":
        pytest.importorskip("matplotlib")
    if script in SMALL and ANOTHER_MODEL.isdisjoint(options):
        options += shlex.split(SMALL[script])
        done = run_script(script, *options, cwd=copy_of_repository, input="import os\n/stats\n")
        assert json.loads(done.stdout.strip().splitlines()[-1])
    else:
        assert all(option in help_of(script) for option in options if option.startswith("--"))


def test_ci_runs_the_test_command_of_the_readme():
    install, test = re.search(r"^(pip install.*) && (.*pytest.*)$", TEXTS[README], re.MULTILINE).groups()
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace(" --quiet", "").splitlines()
    assert install in lines and test in lines


# `transformers serve` and `transformers chat`

HAS_SERVE = importlib.util.find_spec("fastapi") is not None and Version(transformers.__version__) >= Version("5.5")
serving = pytest.mark.skipif(not HAS_SERVE, reason="needs transformers[serving], 5.5 or newer")
# A window that an answer leaves far behind, in place of the one in the examples.
SERVED_WINDOW, NUM_SERVED_TOKENS = "24", 100


def serve_blocks() -> list[str]:
    """Setting up, chatting, asking: the three blocks of the recipe."""
    (page,) = [page for page in PAGES if "transformers serve --" in TEXTS[page]]
    codes = [code for _, code in blocks(page, "bash")]
    start = next(number for number, code in enumerate(codes) if "transformers serve --" in code)
    return codes[start : start + 3]


class Served:
    """A folder as the recipe makes it, and a server as the recipe starts it."""

    def __init__(self, place: Path, repository: Path):
        setup, self.chat, self.request = (code.replace("1024", SERVED_WINDOW).strip() for code in serve_blocks())
        self.place, self.folder = place, place / "qwen3-sinks"
        for line in filter(None, setup.splitlines()):
            words = shlex.split(line)
            if words[:3] == ["hf", "download", MODEL_ID]:
                assert words[3:] == ["--local-dir", self.folder.name]
                self.folder.mkdir()
                for path in [*repository.glob("*.json"), *repository.glob("*.safetensors"), repository / "chat_template.jinja"]:
                    shutil.copyfile(path, self.folder / path.name)
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


def test_the_readme_is_read_in_one_sitting():
    assert len(TEXTS[README].splitlines()) <= 250


def test_the_readme_has_the_sections_of_the_hubs_cards():
    sections = ", ".join(re.findall(r"^## (.*)$", TEXTS[README], re.MULTILINE))
    first, last = (
        "Description, Base model, Model compatibility, Additional Arguments, Output Type changes, Example usage",
        "Citation",
    )
    assert sections == f"{first}, Results, FAQ, Limits, {last}"


def test_refused_options_are_listed():
    for name in UNSUPPORTED_OPTIONS:
        assert f"`{name}`" in TEXTS[ROOT / "docs" / "options.md"]


def test_defaults_are_those_of_the_code():
    filling, full, undivided = DEFAULT_PREFILL_CHUNK_SIZES
    assert f"| `window_length` | {DEFAULT_WINDOW_LENGTH} |" in TEXTS[README]
    assert f"| `num_sink_tokens` | {DEFAULT_NUM_SINK_TOKENS} |" in TEXTS[README]
    assert f"| `prefill_chunk_size` | at most {filling:,} |" in TEXTS[README]
    _, rows = table_after("a pass")
    assert [re.match(r"\d+(,\d{3})*", tokens)[0] for _, tokens in rows] == [f"{filling:,}", str(full), str(undivided), "1"]


def test_the_range_of_releases_begins_where_the_requirements_do():
    files = [ROOT / folder / "requirements.txt" for folder in ("custom_generate", "scripts")]
    requirements = dict(line.split(">=") for file in files for line in file.read_text().splitlines() if ">=" in line)
    for page in (README, ROOT / "docs" / "models.md"):
        assert f"transformers {requirements['transformers']} to " in TEXTS[page]
        assert f"torch {requirements['torch']} or newer" in TEXTS[page]


def table_after(title: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the one table whose head begins with `title`, on whatever page."""
    found = [re.search(rf"^\| {title} .*?(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL) for text in TEXTS.values()]
    (table,) = [each.group().strip().splitlines() for each in found if each]
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
    """Nats over the last tenth, in the long stream and in a stream that began there; and bytes held after the first window and
    in the end."""
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


def nats_of(rows: list[dict], thousands: str) -> float:
    """Over positions like `4-6`, in thousands."""
    start, stop = (1000 * int(edge) for edge in thousands.split("-"))
    return evaluate.over(rows, start, stop)["nats"]


def method_of(shown: str) -> str:
    """How `measured` names what a table calls `window 2,048, no sinks`."""
    return re.sub(r"(\d),(\d{3})", r"\1\2", shown).replace("no sinks", "0 sinks")


@pytest.mark.parametrize(
    ("title", "name"),
    [("SmolLM2", "smollm2.csv"), ("SmolLM2, float32", "smollm2.csv"), ("Gemma 3 270M, float32", "gemma3.csv")],
)
def test_the_results_of_real_models_are_those_that_were_measured(title, name):
    head, table = table_after(title)
    rows = measured(name)
    for shown, *cells in table:
        found = rows[f"{method_of(shown)}, float32, from 0"]
        for label, cell in zip(head[1:], cells, strict=True):
            if label == "MiB held":
                assert round(int(found[-1]["bytes_held"]) / 2**20) == int(cell), shown
            else:
                assert float(cell) == pytest.approx(nats_of(found, label), abs=0.006), (shown, label)


def test_all_windows_of_real_models_are_those_that_were_measured():
    head, table = table_after("window, dtype")
    for shown, *cells, mebibytes in table:
        length, dtype = shown.replace(",", "").split()
        rows = measured("smollm2.csv" if dtype == "float32" else f"smollm2_{dtype}.csv")
        for num_sinks, cell in filter(all, zip(head[1:-1], cells, strict=True)):
            found = rows[f"{evaluate.Method('sinks', int(length), int(num_sinks.split()[0]))}, {dtype}, from 0"]
            assert float(cell) == pytest.approx(nats_of(found, "4-20"), abs=0.006), (shown, num_sinks)
            assert int(found[-1]["bytes_held"]) / 2**20 == pytest.approx(int(mebibytes), abs=0.7)  # with and without sinks


def test_the_stream_and_the_quantized_windows_are_those_that_were_measured():
    head, (nats, times, memory) = table_after("tokens, in thousands")
    (stream,) = measured("stream_smollm2.csv").values()
    for label, *cells in zip(head[1:], nats[1:], times[1:], memory[1:], strict=True):
        start, stop = (1000 * int(edge) for edge in label.split("-"))
        found = evaluate.over(stream, start, stop)
        at_most = max(int(row["process_bytes"]) for row in stream if start <= int(row["start"]) < stop) / 2**20
        expected = [(found["nats"], 0.006), (found["ms_per_token"], 0.06), (at_most, 0.6)]
        assert [float(cell) for cell in cells] == [pytest.approx(value, abs=rounding) for value, rounding in expected]
    assert len({row["bytes_held"] for row in stream[1:]}) == 1

    head, table = table_after("window of 512")
    for (_, *cells), found in zip(table, measured("quantized_smollm2.csv").values(), strict=True):
        expected = [nats_of(found, label) for label in head[1:-1]] + [int(found[-1]["bytes_held"]) / 2**20]
        assert [float(cell) for cell in cells] == [pytest.approx(value, abs=0.06 if value > 9 else 6e-4) for value in expected]


def test_the_texts_are_those_that_were_measured():
    _, table = table_after("nats (distinct 4-grams)".replace("(", r"\(").replace(")", r"\)"))
    rows = [row for row in evaluate.read_csv(ROOT / "results" / "writing.csv") if '"temperature": 1.0' in row["sampling"]]
    for (_, *cells, _), method in zip(table, ("text", "full", "window", "sinks"), strict=True):
        found = [f"{float(row['nats']):.2f} ({float(row['distinct_4']):.2f})" for row in rows if row["method"] == method]
        assert cells == found, method


def test_the_windows_of_real_models_to_choose_from_are_those_that_were_measured():
    head, table = table_after("window of SmolLM2")
    rows = measured("smollm2.csv") | measured("choice_smollm2.csv")
    for shown, *nats, _ in table:
        length = int(shown.replace(",", ""))
        dtype = "float32" if length == 2048 else "bfloat16"
        for num_sinks, value in zip(head[1:-1], nats, strict=True):
            if value:
                method = f"{evaluate.Method('sinks', length, int(num_sinks.split()[0]))}, {dtype}, from 0"
                assert float(value) == pytest.approx(nats_of(rows[method], "4-8"), abs=0.006), method


# What it links and shows


def anchors(page: Path) -> set[str]:
    """The names that GitHub and the Hub give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=page_name)
def test_every_link_leads_somewhere(page):
    """Relative links to files work in a checkout and on the Hub."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`((?:scripts|custom_generate|tests|results|docs)/[\w./]+\.(?:py|csv|txt|md))\b", text):
        assert (ROOT / path).is_file(), path


def test_every_figure_is_shown():
    shown = {(page.parent / path).resolve() for page in PAGES for _, path in images(page)}
    assert shown == {*(ROOT / "figures").glob("*.png")}


def test_modules_are_listed_in_an_order_in_which_they_can_be_read():
    """Each module of the table imports only modules that stand above it."""
    order = re.findall(r"`custom_generate/(\w+)\.py`", TEXTS[ROOT / "docs" / "how_it_works.md"].partition("| module |")[2])
    assert sorted(order) == sorted(path.stem for path in (ROOT / "custom_generate").glob("*.py"))
    for number, name in enumerate(order):
        source = (ROOT / "custom_generate" / f"{name}.py").read_text(encoding="utf-8")
        assert set(re.findall(r"^from \.(\w+) import", source, re.MULTILINE)) <= {*order[:number]}, name


def test_names_on_the_way_of_a_token_are_names_in_the_code():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "custom_generate").glob("*.py"))
    for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?)(?:\([^`]*\))?`", TEXTS[ROOT / "docs" / "how_it_works.md"]):
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", code), name


def test_every_script_is_listed():
    for script in (ROOT / "scripts").glob("*.py"):
        assert f"`scripts/{script.name}`" in TEXTS[ROOT / "docs" / "contributing.md"], script


@pytest.mark.parametrize(
    "alt, path", [pytest.param(alt, page.parent / path, id=path) for page in PAGES for alt, path in images(page)]
)
def test_figures_are_small_and_legible_on_any_background(alt, path):
    assert len(alt) > 100, "for readers who can't see it"
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) < 150_000
    color_type = content[25]
    assert color_type in (0, 2, 3) and b"tRNS" not in content, "transparent: it would vanish in dark mode"


@pytest.mark.parametrize("name", ["releases", "compatibility", "works-with", "speed"])
def test_tables_written_by_scripts_have_their_place(name):
    """Each has its own test that it is what its script makes: test_works_with.py, test_zoo.py, test_scripts.py."""
    assert sum(text.count(f"<!-- {name}: begin -->\n") for text in TEXTS.values()) == 1
    assert sum(text.count(f"\n<!-- {name}: end -->") for text in TEXTS.values()) == 1
