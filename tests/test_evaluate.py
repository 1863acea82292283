"""What scripts/evaluate.py and scripts/stream_eval.py measure: against sums made without them, and what they do when they are cut short."""

import csv
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evaluate
import stream_eval
from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, assert_same, random_ids
from families import build_model
from oracle import oracle_logits

ROOT = Path(__file__).parents[1]
SHORT = ["--num-tokens", 300, "--batch-size", 2, "--window-length", 32, "--recompute-every", 16]


def run(script, monkeypatch, capsys, *arguments) -> tuple[int, dict, str]:
    """The exit status, the last line, and all lines."""
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in (script.__name__, *arguments)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return stopped.value.code, json.loads(lines[-1]) if lines else {}, captured.out + captured.err


def by_method(path: Path) -> dict[tuple[str, str], list[dict]]:
    found = {}
    for row in csv.DictReader(path.open()):
        found.setdefault((row["method"], row["num_sink_tokens"]), []).append(row)
    return found


# The methods


def read_all(reader, ids: torch.Tensor, chunk_length: int) -> tuple[torch.Tensor, list[int]]:
    logits, positions, start = [], [], 0
    with torch.no_grad():
        while start < ids.shape[1]:
            stop = min(ids.shape[1], start + min(chunk_length, reader.num_columns_at_once))
            new, columns = reader.read(ids[:, start:stop])
            predicted = list(range(start, stop))[columns]
            if predicted:
                logits.append(new)
                positions += predicted
            start = stop
    return torch.cat(logits, dim=1), positions


@pytest.mark.parametrize("chunk_length", [1, 7, 100])
@pytest.mark.parametrize("num_sinks", [0, NUM_SINK_TOKENS])
def test_what_is_recomputed_is_a_pass_over_sinks_and_recent_tokens(num_sinks, chunk_length):
    """Each prediction against a pass of its own, over five windows, whatever the chunks; and every third one is the same prediction."""
    model, ids = build_model("llama", "sdpa"), random_ids(num_rows=2)
    expected = []
    for last in range(ids.shape[1]):
        seen = ids[:, : last + 1]
        if last >= WINDOW_LENGTH:
            seen = torch.cat([seen[:, :num_sinks], seen[:, last + 1 - WINDOW_LENGTH + num_sinks :]], dim=1)
        with torch.no_grad():
            expected.append(model(seen).logits[:, -1:])
    expected = torch.cat(expected, dim=1)
    logits, positions = read_all(evaluate.RecomputingReader(model, WINDOW_LENGTH, num_sinks, 1), ids, chunk_length)
    assert positions == list(range(ids.shape[1]))
    assert_same(logits, expected)
    logits, positions = read_all(evaluate.RecomputingReader(model, WINDOW_LENGTH, num_sinks, 3), ids, chunk_length)
    assert [position for position in positions if position >= WINDOW_LENGTH] == [
        position for position in range(WINDOW_LENGTH, ids.shape[1]) if position % 3 == 0
    ]
    assert_same(logits, expected[:, positions])


@pytest.mark.parametrize("num_sinks", [0, NUM_SINK_TOKENS])
def test_sinks_and_window_follow_the_rules(num_sinks):
    model, ids = build_model("llama", "sdpa"), random_ids()
    logits, _ = read_all(evaluate.SinkReader(model, WINDOW_LENGTH, num_sinks), ids, 7)
    assert_same(logits, oracle_logits(model, ids, WINDOW_LENGTH, num_sinks))


# The text


def test_texts_in_a_row_are_one_text(tokenizer):
    texts = ["import os\n", "import sys\n\n\nprint(1)\n"]
    whole = tokenizer("".join(texts)).input_ids
    inputs, targets = evaluate.join_texts(iter(texts), tokenizer, 1000, is_each_special=False)
    assert inputs == whole[:-1] and targets == whole[1:] and inputs[0] == tokenizer.bos_token_id
    assert evaluate.join_texts(iter(texts), tokenizer, 5, is_each_special=False) == (whole[:5], whole[1:6])


def test_book_after_book_nothing_is_predicted_across(tokenizer):
    """The protocol of the paper: each with its special token, which is never a target, and the last token of a book is not read."""
    texts = ["import os\n", "import sys\n"]
    books = [tokenizer(text).input_ids for text in texts]
    inputs, targets = evaluate.join_texts(iter(texts), tokenizer, 1000, is_each_special=True)
    assert inputs == books[0][:-1] + books[1][:-1] and targets == books[0][1:] + books[1][1:]
    assert inputs.count(tokenizer.bos_token_id) == 2 and tokenizer.bos_token_id not in targets


def test_a_stream_that_begins_further_on_predicts_the_same_tokens(tokenizer, tmp_path):
    path = tmp_path / "text.py"
    path.write_text((ROOT / "scripts" / "evaluate.py").read_text())
    args = SimpleNamespace(text=[path], batch_size=1, special_tokens="first", skip_tokens=0, num_tokens=900)
    whole = evaluate.read_stream(args, tokenizer)
    args.skip_tokens, args.num_tokens = 600, 300
    fresh = evaluate.read_stream(args, tokenizer)
    assert fresh.inputs[0, 0] == tokenizer.bos_token_id and fresh.inputs.shape == (1, 300)
    assert fresh.inputs[0, 1:].equal(whole.inputs[0, 600:-1]) and fresh.targets[0, 1:].equal(whole.targets[0, 600:-1])


# What is measured


def test_all_methods_over_two_texts(monkeypatch, capsys, tmp_path):
    """Of every bucket the numbers of predictions; of the first, where nothing is evicted yet, the same nats with every method."""
    path = tmp_path / "new" / "evaluate.csv"
    status, result, shown = run(evaluate, monkeypatch, capsys, *SHORT, "--bucket-length", 16, "--csv", path)
    assert status == 0 and not result["interrupted"] and "window 32, 4 sinks" in shown
    found = by_method(path)
    assert list(found) == [("full", ""), ("window", "0"), ("sinks", "4"), ("recompute", "0"), ("recompute-sinks", "4")]
    for (method, _), rows in found.items():
        assert [(int(row["start"]), int(row["stop"])) for row in rows] == [(s, min(s + 16, 300)) for s in range(0, 300, 16)]
        num_late = 2 if method.startswith("recompute") else 32
        assert [int(row["num_predictions"]) for row in rows[:-1]] == [32] * 2 + [num_late] * 16
        assert float(rows[0]["nats"]) == pytest.approx(float(found["full", ""][0]["nats"]), rel=1e-3)
        assert float(rows[3]["perplexity"]) == pytest.approx(math.exp(float(rows[3]["nats"])), rel=1e-3)
        for name in ("torch", "transformers", "device_name", "dtype", "model", "text_crc32"):
            assert rows[0][name]
    nats = {entry["method"]: entry["stretches"][-1]["nats"] for entry in result["results"]}
    assert nats["sinks"] < nats["window"] and nats["recompute-sinks"] < nats["recompute"]
    held = {method: int(rows[-1]["bytes_held"]) for (method, _), rows in found.items()}
    assert held["full"] == 300 * 2 * 4 * 2 * 2 * 32 * 4 > 5 * held["sinks"] and held["recompute"] == 0
    assert {row["bytes_held"] for row in found["sinks", "4"][2:]} == {str(held["sinks"])}


def test_nats_and_accuracy_are_those_of_a_single_pass(monkeypatch, capsys, tmp_path, tiny_model, tokenizer):
    text, path = tmp_path / "text.py", tmp_path / "evaluate.csv"
    text.write_text((ROOT / "scripts" / "evaluate.py").read_text())
    arguments = [
        "--text",
        text,
        "--num-tokens",
        200,
        "--methods",
        "full",
        "--bucket-length",
        50,
        "--chunk-length",
        64,
        "--csv",
        path,
    ]
    run(evaluate, monkeypatch, capsys, *arguments)
    ids = torch.tensor([tokenizer(text.read_text()).input_ids[:201]])
    with torch.no_grad():
        logits = tiny_model(ids[:, :-1]).logits[0]
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    hits = (logits.argmax(-1) == ids[0, 1:]).double()
    for number, row in enumerate(csv.DictReader(path.open())):
        inside = slice(50 * number, 50 * number + 50)
        assert float(row["nats"]) == pytest.approx(nats[inside].mean().item(), rel=1e-3)
        assert float(row["accuracy"]) == pytest.approx(hits[inside].mean().item(), abs=1e-4)


def test_standard_errors():
    """Between texts if there are some; of a single long one, between blocks: a slow drift must not look like many measurements."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(10, 1, generator=generator).expand(10, 100)
    assert evaluate.standard_error(texts) == pytest.approx(texts[:, 0].std().item() / math.sqrt(10))
    drift = torch.arange(1024.0)[None]
    independent = drift.std().item() / math.sqrt(1024)
    assert evaluate.standard_error(drift) > 5 * independent
    assert math.isnan(evaluate.standard_error(torch.zeros(1, 1)))


def test_another_model_in_a_folder_with_half_the_precision(monkeypatch, capsys, tmp_path, tokenizer):
    """--model takes any causal LM: here one of another family, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 2048}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    path = tmp_path / "evaluate.csv"
    arguments = [
        "--model",
        tmp_path / "other",
        "--dtype",
        "bfloat16",
        "--text",
        ROOT / "scripts" / "evaluate.py",
        "--num-tokens",
        200,
    ]
    status, result, _ = run(evaluate, monkeypatch, capsys, *arguments, "--window-length", 16, "--csv", path)
    assert status == 0 and result["model"] == "other" and len(result["results"]) == 5
    assert {row["dtype"] for row in csv.DictReader(path.open())} == {"bfloat16"}
    plot = pytest.importorskip("plot")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert [figure.name for figure in plot.draw(pyplot, "perplexity_by_position", tmp_path, tmp_path)] == [
        "perplexity_by_position.png"
    ]


# What is kept


def test_an_interrupted_measurement_keeps_what_was_measured_and_goes_on(monkeypatch, capsys, tmp_path):
    """Cut in the middle of the second method; the lines are then those of a run that was not cut."""
    path, whole = tmp_path / "cut.csv", tmp_path / "whole.csv"
    arguments = [*SHORT, "--bucket-length", 50, "--methods", "full", "sinks"]
    run(evaluate, monkeypatch, capsys, *arguments, "--csv", whole)
    calls = []

    def interrupted(self, tokens, read=evaluate.SinkReader.read):
        calls.append(tokens)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.SinkReader, "read", interrupted)
        status, result, shown = run(evaluate, patch, capsys, *arguments, "--chunk-length", 40, "--csv", path)
    assert status == 130 and result["interrupted"] and "--resume" in shown
    kept = path.read_text()
    assert 6 < len(kept.splitlines()) - 1 < 12
    status, _, _ = run(evaluate, monkeypatch, capsys, *arguments, "--chunk-length", 40, "--csv", path, "--resume")
    assert status == 0 and path.read_text().startswith(kept)

    def measured(path: Path) -> list[tuple]:
        return [(row["method"], row["start"], round(float(row["nats"]), 2)) for row in csv.DictReader(path.open())]

    assert measured(path) == measured(whole)


def test_a_second_run_takes_the_place_of_the_first_and_of_nothing_else(monkeypatch, capsys, tmp_path):
    path = tmp_path / "evaluate.csv"
    for window_length in (16, 32, 16):
        arguments = ["--num-tokens", 64, "--batch-size", 1, "--methods", "sinks", "--window-length", window_length]
        run(evaluate, monkeypatch, capsys, *arguments, "--bucket-length", 32, "--csv", path)
    assert [row["window_length"] for row in csv.DictReader(path.open())] == ["32", "32", "16", "16"]


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (
            ["--num-sink-tokens", 32, "--window-length", 32],
            2,
            "--num-sink-tokens 32 leaves no recent tokens in --window-length 32",
        ),
        (["--num-tokens", 0], 2, "at least 1, got 0"),
        (["--csv", ROOT / "results" / "benchmark.csv"], 2, "other columns"),
        (["--text", "a", "--dataset", "b"], 2, "two texts"),
        (["--dataset", "no/such"], None, "pip install datasets"),
        (["--text", ROOT / "LICENSE", "--num-tokens", 50000], None, "--num-tokens with --skip-tokens needs 50000"),
        (["--num-tokens", 30000], None, "1 texts of 30000 tokens"),
        pytest.param(
            ["--device", "cuda"], 2, "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
)
def test_it_says_what_is_wrong(arguments, status, message, monkeypatch, capsys, tmp_path):
    if "--csv" not in arguments:
        arguments = [*arguments, "--csv", tmp_path / "evaluate.csv"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert message in (capsys.readouterr().err if status == 2 else str(stopped.value.code))
    assert status is None or stopped.value.code == status


# What was published


def test_published_figures_stand_beside_the_measured_ones(monkeypatch, capsys, tmp_path):
    """The commands of the presets with the tiny model and short texts; x + y there are x + y + 1 tokens here."""
    path = tmp_path / "paper.csv"
    arguments = ["--text", ROOT / "tests" / "test_readme.py", "--num-tokens", 64, "--dtype", "float32", "--csv", path]
    for preset, defaults in evaluate.PRESETS.items():
        _, result, shown = run(evaluate, monkeypatch, capsys, "--preset", preset, *arguments)
        assert {row["source"].startswith("https://") for row in result["published"]} == {True} and "| published |" in shown
        assert any(row["measured"] is not None for row in result["published"]), preset
        assert {int(row["window_length"]) for row in result["results"] if row["window_length"]} == set(defaults["window_length"])
    for row in evaluate.read_csv(evaluate.PUBLISHED):
        if row["cache"] != "all":
            sinks, recent = row["cache"].split("+")
            assert row["num_sink_tokens"] == sinks and int(row["window_length"]) == int(sinks) + int(recent) + 1, row


# StreamEval


def test_stream_eval_is_as_it_is_described():
    """A query after every 10 lines, for the line 20 before the last: the first three stand in the paper's figure 8."""
    blocks = list(stream_eval.stream_eval(random.Random(0), num_queries=3, distance=20, every=10))
    lines = "".join(before + answer for before, answer in blocks).splitlines()
    records = [line for line in lines if line.startswith("The REGISTER_CONTENT")]
    assert [line.split(" is ")[0] for line in records] == [f"The REGISTER_CONTENT in line {number}" for number in range(41)]
    queries = [index for index, line in enumerate(lines) if line.startswith("Query: ")]
    assert [lines[index - 1].split()[4] for index in queries] == ["20", "30", "40"]
    for index, asked in zip(queries, (0, 10, 20)):
        assert lines[index] == f"Query: {records[asked]}"


class Oracle:
    """Predicts the text it is given, but for the tokens at some positions."""

    num_columns_at_once = 50

    def __init__(self, ids: torch.Tensor, wrong: list[int]):
        self.expected, self.position = ids.clone(), 0
        self.expected[:, wrong] = 0

    def read(self, tokens: torch.Tensor):
        start, self.position = self.position, self.position + tokens.shape[1]
        return torch.nn.functional.one_hot(self.expected[:, start + 1 : self.position + 1], 2048) * 20.0, slice(None)


def test_an_answer_is_right_if_all_of_it_is(tokenizer):
    args = SimpleNamespace(num_queries=5, query_every=10, chunk_length=64, device="cpu")
    streams = stream_eval.lines(tokenizer, random.Random(0), args, distance=20)
    answers = [tokenizer.decode(streams.ids[0, start:stop]).strip() for start, stop in streams.answers[0]]
    lines = tokenizer.decode(streams.ids[0]).splitlines()
    assert answers == [line.split(" is ")[1] for line in lines if line.startswith("Query: ")]
    for wrong, expected in (([], 1.0), ([streams.answers[0][1][1] - 1, streams.answers[0][3][0]], 0.6), ([3], 1.0)):
        read = stream_eval.read(Oracle(streams.ids, wrong), streams.ids, args, stream_eval.tqdm(disable=True))
        assert stream_eval.row_of(20, [(streams, *read)])["accuracy"] == pytest.approx(expected)


def test_recall_ends_where_the_window_ends(monkeypatch, capsys, tmp_path):
    """The tiny model knows a passage again that is in the window, and not a token further."""
    path, distances = tmp_path / "recall.csv", [32, 60, 61 + stream_eval.PASSAGE_LENGTH]
    arguments = ["--window-length", 64, "--methods", "sinks", "--num-streams", 16, "--distance", *distances, "--csv", path]
    status, result, _ = run(stream_eval, monkeypatch, capsys, *arguments)
    assert status == 0 and [row["distance"] for row in result["results"]] == distances
    near, at_edge, behind = ((row["token_accuracy"], row["first_token_accuracy"]) for row in result["results"])
    assert near[0] > near[1] + 0.2 and at_edge[0] > at_edge[1] + 0.2 and abs(behind[0] - behind[1]) < 0.1
    assert all(row["seed"] == "0" and row["torch"] for row in csv.DictReader(path.open()))


def test_stream_eval_with_lines_runs(monkeypatch, capsys, tmp_path):
    arguments = [
        "--task",
        "lines",
        "--num-queries",
        3,
        "--num-streams",
        2,
        "--distance",
        2,
        "--query-every",
        2,
        "--window-length",
        32,
    ]
    status, result, _ = run(stream_eval, monkeypatch, capsys, *arguments, "--csv", tmp_path / "lines.csv")
    assert status == 0 and {row["num_answers"] for row in result["results"]} == {6} and len(result["results"]) == 3
