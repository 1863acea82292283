"""The scripts, as a user calls them: a short run each, and the JSON document that ends it."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmark
import plot
import version_matrix
from common import page_block
from families import TRANSFORMERS
from processes import run_script
from zoo import ZOO_TYPES

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments, expect_failure: bool = False) -> subprocess.CompletedProcess:
    done = run_script(script, *arguments, cwd=ROOT, check=False)
    assert (done.returncode != 0) == expect_failure, done.stderr[-3000:]
    return done


def last_line(done: subprocess.CompletedProcess) -> dict:
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_demo():
    done = run("scripts/demo.py", "--max-new-tokens", 300, "--window-length", 64, "--num-sink-tokens", 2)
    result = last_line(done)
    assert result["new_tokens"] == 300 and result["tokens_held"] == 64 and result["num_sink_tokens"] == 2
    # 4 layers, 2 heads of 32, float32, keys and values
    assert result["full_cache_bytes"] == result["tokens_seen"] * 4 * 2 * 32 * 4 * 2
    assert result["bytes_held"] < result["full_cache_bytes"] / 4
    assert result["tokens_per_second_end"] > 0
    assert "class Parser" in done.stdout and "64 held" in done.stdout


def test_demo_reads_a_file_and_is_reproducible(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("import os\n")
    texts = [run("scripts/demo.py", "--prompt-file", prompt, "--max-new-tokens", 40).stdout.split("\n\n")[0] for _ in range(2)]
    assert texts[0] == texts[1] and texts[0].startswith("import os")


def test_evaluate_and_recall_and_their_figures(tmp_path):
    """The commands, one after the other: what they print and write, and what is drawn of it. (tests/test_evaluate.py looks at numbers.)"""
    pytest.importorskip("matplotlib")
    short = ["--window-length", 32, "--num-tokens", 300]
    lines = ["scripts/evaluate.py", *short, "--batch-size", 2, "--csv", tmp_path / "evaluate.csv"]
    result = last_line(run(*lines))
    assert [row["method"] for row in result["results"]] == ["full", "window", "sinks", "recompute", "recompute-sinks"]
    cost = ["--batch-size", 1, "--methods", "full", "sinks", "--bucket-length", 50, "--csv", tmp_path / "cost.csv"]
    run("scripts/evaluate.py", *short, *cost)
    recall = [
        "--window-length",
        32,
        "--num-streams",
        2,
        "--num-queries",
        1,
        "--distance",
        16,
        40,
        "--csv",
        tmp_path / "recall.csv",
    ]
    run("scripts/stream_eval.py", *recall)
    figures = last_line(run("scripts/plot.py", "--results-dir", tmp_path, "--output-dir", tmp_path / "figures"))
    names = ["kept.png", "perplexity_by_position.png", "cost_by_position.png", "recall_by_distance.png"]
    assert [Path(path).name for path in figures["figures"]] == names and min(figures["bytes"]) > 5000


SHORT_BENCHMARK = ["scripts/benchmark.py", "--preset", "tiny", "--window-length", 32, "--num-tokens", 4, "--num-rounds", 2]


def test_benchmark(tmp_path):
    """Every method that is not compiled, with two rows; what can't run here is named. (quanto compiles itself for a minute.)"""
    path = tmp_path / "results" / "benchmark.csv"
    uncompiled = [method for method in benchmark.DECODERS if not method.endswith(("-compiled", "-quanto"))]
    arguments = [*SHORT_BENCHMARK, "--batch-size", 2, "--limits", "--csv", path, "--methods", *uncompiled]
    result = last_line(run(*arguments))
    rows = {row["method"]: row for row in result["results"] if row["measure"] == "decode"}
    assert {*rows, *result["left_out"]} == set(uncompiled)
    assert {"sink", "sink-static", "dynamic", "static", "native-window", "rerotate", "rotate-at-read", "recompute"} <= rows.keys()
    for row in rows.values():
        assert row["ms_low"] <= row["ms_per_token"] <= row["ms_high"] and row["ratio"] > 0 and row["bytes_held"] > 0
    assert rows["dynamic"]["ratio"] == 1
    pairs = {(row["method"], row["reference"]) for row in result["results"] if row["measure"] == "ratio"}
    assert pairs == {(ours, other) for ours in ("sink", "sink-static") for other in rows if other != ours}
    written = list(csv.DictReader(path.open()))
    assert len(written) == len(result["results"]) and written[0]["torch"] and written[0]["seed"] == "0"
    run(*SHORT_BENCHMARK, "--csv", path, "--methods", "sink", "dynamic")
    assert len(list(csv.DictReader(path.open()))) == len(written) + 3


def test_benchmark_of_ages():
    """Streams of different lengths, in turns: as much is held, whatever the length."""
    result = last_line(run(*SHORT_BENCHMARK, "--measure", "age", "--age", 300, 20, 60))
    rows = [row for row in result["results"] if row["measure"] == "age"]
    assert [row["position"] for row in rows] == [20, 60, 300] and rows[0]["ratio"] == 1
    assert rows[1]["bytes_held"] == rows[2]["bytes_held"] and all(row["ms_per_token"] > 0 for row in rows)


def test_benchmark_of_streams_and_prompts_and_their_figures(tmp_path):
    pytest.importorskip("matplotlib")
    methods = ["sink", "dynamic", "sink-generate", "dynamic-generate"]
    lengths = ["--stream-length", 100, 300, "--max-dynamic-length", 200, "--prefill-windows", 4, "--chunk-length", 8, 64]
    arguments = ["--measure", "decode", "stream", "prefill", "--csv", tmp_path / "benchmark.csv", "--methods", *methods]
    result = last_line(run(*SHORT_BENCHMARK, *lengths, *arguments))

    def measured(measure: str, *columns: str) -> set:
        return {tuple(row[column] for column in columns) for row in result["results"] if row["measure"] == measure}

    assert {("sink-generate", 100), ("sink-generate", 300), ("sink", 300), ("dynamic-generate", 200)} <= measured(
        "stream", "method", "position"
    )
    held = {row["method"]: row["bytes_held"] for row in result["results"] if row["measure"] == "stream"}
    assert held["dynamic-generate"] > 3 * held["sink-generate"] and held["sink-generate"] == held["sink"]
    assert measured("prefill", "method", "chunk_length", "position") == {
        ("sink", "default", 128),
        ("sink", 8, 128),
        ("dynamic", 8, 8),
        ("dynamic", 8, 128),
    }
    assert measured("chunk", "chunk_length", "num_keys") == {(8, 4 * 8 + 28 + 8)}  # sinks for each query, recent ones, new ones
    figures = last_line(run("scripts/plot.py", "--results-dir", tmp_path, "--output-dir", tmp_path / "figures"))
    names = ["kept.png", "time_by_position.png", "memory_by_position.png", "time_by_window.png"]
    assert [Path(path).name for path in figures["figures"]] == names and min(figures["bytes"]) > 5000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-tokens", 32], "--num-tokens 32: a turn must be shorter than --window-length 32"),
        (["--num-sink-tokens", 31], "--num-sink-tokens 31 leaves no recent tokens in --window-length 32"),
        (["--measure", "stream", "--stream-length", 5], "--stream-length 5 must be more"),
        (["--num-rounds", 0], "at least 1, got 0"),
        (["--methods", "paged"], "paged"),
        (["--csv", ROOT / "results" / "published.csv"], "other columns"),
        pytest.param(["--device", "cuda"], "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    ],
)
def test_benchmark_says_what_is_wrong(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in SHORT_BENCHMARK + arguments])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_an_interrupted_benchmark_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    path = tmp_path / "benchmark.csv"
    arguments = [*SHORT_BENCHMARK, "--methods", "sink", "dynamic", "--measure", "decode", "stream", "--csv", path]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    monkeypatch.setattr(benchmark, "measure_stream", interrupted)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stopped.value.code == 130 and result["interrupted"] and len(result["results"]) == 3
    assert len(list(csv.DictReader(path.open()))) == 3


def test_plot_says_when_there_is_nothing_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["--figures", *plot.FIGURES, "--results-dir", tmp_path, "--output-dir", tmp_path]
    done = run("scripts/plot.py", *arguments, expect_failure=True)
    assert "no rows of decode" in done.stderr and "Measure first" in done.stderr


def test_figures_of_different_conditions_have_names_of_their_own():
    rows = [{"model": "small", "dtype": dtype, "window_length": length} for dtype in ("float32", "bf/16") for length in "12"]
    assert [*plot.groups(rows, ("model",))] == [""]
    assert [*plot.groups(rows, ("model", "dtype"))] == ["-dtype_float32", "-dtype_bf_16"]


def test_a_text_read_on_other_processors_is_one_figure():
    for name, column in (("perplexity_by_position", "num_threads"), ("recall_by_distance", "device_name")):
        file_name, _, columns, *_ = plot.FIGURES[name]
        row = next(csv.DictReader((ROOT / "results" / file_name).open(encoding="utf-8")))
        assert [*plot.groups([row, row | {column: "other"}], columns)] == [""]


def test_the_table_of_speed_is_what_was_measured():
    rows = list(csv.DictReader((ROOT / "results" / "benchmark.csv").open(encoding="utf-8")))
    assert page_block("speed") == plot.speed_table(rows), "python scripts/plot.py --write"
    assert plot.speed_cell(None) == ""
    row = {
        "method": "sink",
        "reference": "dynamic",
        "ms_per_token": "9.828",
        "ratio": "0.9889",
        "ratio_low": "0.96",
        "ratio_high": "1.0",
    }
    assert plot.speed_cell(row) == "9.8 (0.99, 0.96-1.00)" and plot.speed_cell(row | {"method": "dynamic"}) == "9.8"
    assert plot.speed_cell(row | {"reference": "", "ratio": ""}) == "9.8"  # measured without the reference


def test_labels_stand_apart_and_near():
    assert plot.apart([0, 10, 20], 5) == [0, 10, 20]
    assert plot.apart([0, 10, 10, 10], 4) == [0, 6, 10, 14]
    assert plot.apart([5, 5, 6], 4) == pytest.approx([4 / 3, 16 / 3, 28 / 3])


def test_the_compatibility_table_is_what_is_found():
    if f"transformers {TRANSFORMERS} are exact" not in page_block("compatibility"):
        pytest.skip("the table is of another release: python scripts/compatibility.py --write")
    result = last_line(run("scripts/compatibility.py", "--tables", "models", "--check"))["models"]
    assert result["exact"] >= 105 and set(result) == {"exact", "fed as by transformers", "refused", "left out"}
    assert sum(result.values()) == len(ZOO_TYPES)


def test_training(tmp_path):
    """A few steps; what is written can be loaded, and is not overwritten."""
    arguments = [
        "scripts/train_tiny_model.py",
        "--output-dir",
        tmp_path,
        "--num-steps",
        3,
        "--num-sink-steps",
        1,
        "--batch-size",
        2,
    ]
    assert last_line(run(*arguments))["parameters"] == 1968064
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("import os").input_ids[0] == model.config.bos_token_id
    assert (
        tokenizer.decode(tokenizer("def f(x):\n    return 'ä'").input_ids, skip_special_tokens=True)
        == "def f(x):\n    return 'ä'"
    )
    assert "--overwrite" in run(*arguments, expect_failure=True).stderr


NOT_COMMANDS = {"baselines.py", "common.py"}


@pytest.mark.parametrize("script", sorted({path.name for path in (ROOT / "scripts").glob("*.py")} - NOT_COMMANDS))
def test_help(script, monkeypatch, capsys):
    """In this process: a new one takes seconds to load transformers."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


def test_a_row_of_the_table_of_releases_counts_what_fails(tmp_path):
    """A release whose tests can't even be collected, or whose process dies, must not look green."""
    cases = {
        "mixed": ("import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()", (1, 1, 1)),
        "broken": ("import nothing_of_that_name", (0, 0, 1)),
        "killed": ("import os\ndef test_a(): os._exit(9)", (0, 0, 1)),
    }
    for name, (code, (passed, skipped, failed)) in cases.items():
        path = tmp_path / f"test_{name}.py"
        path.write_text(code)
        row = version_matrix.measure(sys.executable, "5.23", [str(path)])
        assert (row["passed"], row["skipped"], row["failed"]) == (passed, skipped, failed), name


def test_the_table_of_releases_keeps_one_row_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr(version_matrix, "TABLE", tmp_path / "releases.csv")
    row = dict.fromkeys(version_matrix.COLUMNS, 0) | {"python": "3.11.7", "torch": "2.13.0", "huggingface_hub": "2.4.0"}
    for release, passed in [("4.56", 5), ("5.10", 1), ("5.9", 2), ("4.57", 3), ("5.9", 4)]:
        version_matrix.write_row(row | {"release": release, "passed": passed})
    rows = [(each["release"], each["passed"]) for each in version_matrix.read_table()]
    assert rows == [("4.57", "3"), ("5.9", "4"), ("5.10", "1")], "4.56 is not served any more"


def test_the_table_of_releases_in_its_page_is_the_one_that_was_measured():
    rows = version_matrix.read_table()
    assert page_block("releases") == version_matrix.markdown_table(rows), "python scripts/version_matrix.py --write"
    assert rows and not any(int(row["failed"]) for row in rows)


def test_write_text(tmp_path):
    """Three texts, what is measured of them, and a second run that finds all of it."""
    command = [
        "scripts/write_text.py",
        "--num-prompt-tokens",
        100,
        "--num-tokens",
        40,
        "--stretch-length",
        20,
        "--judged-length",
        16,
    ]
    command += ["--window-length", 32, "--csv", tmp_path / "writing.csv", "--texts-dir", tmp_path / "texts", "--resume"]
    result = last_line(run(*command, "--temperature", 1, "--top-k", 5, "--excerpts", tmp_path / "written.md"))
    assert [row["method"] for row in result["results"]] == ["text", "full", "window", "sinks"]
    assert json.loads(result["sampling"]) == {"do_sample": True, "temperature": 1.0, "top_k": 5}
    for row in result["results"]:
        assert [stretch["stop"] for stretch in row["stretches"]] == [20, 40]
        assert all(0 < stretch["distinct_1"] <= stretch["distinct_4"] <= 1 for stretch in row["stretches"])
        assert all(0 < stretch["nats"] < 12 for stretch in row["stretches"])
    texts = {path.name: path.read_text() for path in (tmp_path / "texts").iterdir()}
    assert {"tiny-full.txt", "tiny-window-32-0.txt", "tiny-sinks-32-4.txt"} == texts.keys() and len({*texts.values()}) == 3
    assert (tmp_path / "written.md").read_text().count("\n## ") == 3
    again = last_line(run(*command, "--temperature", 1, "--top-k", 5))
    assert again["results"] == result["results"]
