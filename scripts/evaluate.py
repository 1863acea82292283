"""How well a model predicts a long text with each kind of cache: nats and perplexity a token, by position in the stream.

The same tokens go through every method, one method after the other, in one process:

    full        a cache that keeps all
    window      the most recent `window_length` tokens: no sinks
    sinks       `SinkCache`: sinks and the most recent tokens, `window_length` in all; and quantized as each `--quantized` says
    recompute   no cache: the last `window_length` tokens anew for each prediction
    recompute-sinks   the same with the sinks in front, `window_length` in all: a cache knows more, from tokens that are evicted

What is recomputed is slow: past the first window only every `--recompute-every`-th prediction is made.

Texts are read in exact chunks: the logits are those of one token at a time, and memory is bounded by window and chunk, for
streams of millions of tokens. Position t is that of the token being processed, which predicts the next; a standard error is that
of the mean over texts, or with fewer than 8 of them over blocks of 64 tokens. Time is that of reading and scoring, on a CPU that
of the process: what else runs there does not count. Nothing is drawn at random, so there is no seed.

Each line of `--csv` is one method over one bucket of positions, written as soon as it is measured. Ctrl-C keeps what was: the
exit status is 130 then, and `--resume` leaves out what the file has. (A stream that was cut is read again from its start.)
Without it, the methods that are measured take the place of their former lines; lines of other models, texts, versions and so on
stay.

    python scripts/evaluate.py
    python scripts/evaluate.py --model Qwen/Qwen3-0.6B --text book.txt --num-tokens 20000 --window-length 1024 --csv book.csv
    python scripts/evaluate.py --preset paper-table-2 --model meta-llama/Llama-2-7b-hf --csv paper.csv

With `--preset` it is what was published, and the published figures (results/published.csv) are printed beside the measured ones.
"""

import argparse
import csv
import inspect
import itertools
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from common import (
    ROOT,
    add_model_arguments,
    count,
    describe_run,
    load_model,
    process_bytes,
    rounded,
    stdlib_text,
    storage_bytes,
    unseen_text,
)
from custom_generate.generate import SinkCache
from custom_generate.releases import CACHE_NAME

METHODS = ("full", "window", "sinks", "recompute", "recompute-sinks")
QUANTIZED = "quantized"  # and its options: a method for each `--quantized`
NUM_BUCKETS = 128  # about so many, if --bucket-length does not say
MIN_NUM_TEXTS = 8  # for a standard error between texts
BLOCK_LENGTH = 64  # tokens; else between blocks of so many, for neighbours are not independent
RECOMPUTED_AT_ONCE = 8192  # tokens in one pass, of several windows

# What was published, as defaults of the arguments. The "x+y" of both attends to the token being processed besides x sinks and y
# recent tokens: it is window_length = x + y + 1 here. Their loops over single tokens and these chunks give the same predictions.
PG19 = {"dataset": "emozilla/pg19-test", "dtype": "float16"}
PRESETS = {
    # https://arxiv.org/abs/2309.17453: book after book, each with the special tokens of a text, and the cache goes on from book
    # to book
    "paper-table-1": PG19 | {"num_tokens": 65_000, "window_length": [1025], "num_sink_tokens": [4],
                             "methods": ["window", "sinks"], "special_tokens": "each"},
    "paper-table-2": PG19 | {"num_tokens": 400_000, "window_length": [4097], "num_sink_tokens": [1, 2, 4, 8],
                             "methods": ["window", "sinks"], "special_tokens": "each"},
    "paper-table-6": PG19 | {"num_tokens": 400_000, "window_length": [513, 1025, 2049, 4097], "num_sink_tokens": [4],
                             "methods": ["sinks"], "special_tokens": "each"},
    # https://github.com/tomaarsen/attention_sinks: the first book, and the mean from the first token to each length
    "attention-sinks": PG19 | {"num_tokens": 8192, "window_length": [1025], "num_sink_tokens": [4],
                               "methods": ["full", "window", "sinks"]},
}  # fmt: skip
PUBLISHED = ROOT / "results" / "published.csv"

# What tells one run from another; then what is measured.
CONDITIONS = (
    "text text_crc32 num_tokens skip_tokens special_tokens batch_size chunk_length bucket_length recompute_every model revision "
    "torch transformers device device_name dtype num_threads"
).split()
METHOD_COLUMNS = ["method", "window_length", "num_sink_tokens"]
MEASURED = "start stop num_predictions nats nats_stderr perplexity accuracy bytes_held process_bytes ms_per_token".split()
CSV_COLUMNS = ["date", "commit", "measure", *METHOD_COLUMNS, *MEASURED, *CONDITIONS, "python"]


# ---------------------------------------------------------------------------------------------------------------------
# The text
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """What is read and what has to be predicted, `[num_texts, num_tokens]` both: as a rule the same text, one token further."""

    inputs: torch.Tensor
    targets: torch.Tensor


def documents(args) -> Iterator[str]:
    """The texts that the arguments name, one at a time."""
    if args.text:
        return (Path(path).read_text(encoding="utf-8") for path in args.text)
    if not args.dataset:
        return iter(stdlib_text(held_out=True)) if args.batch_size > 1 else unseen_text()
    try:
        from datasets import load_dataset
    except ImportError:
        sys.exit(f"--dataset {args.dataset} is read with the package datasets, which is not installed: pip install datasets")
    rows = load_dataset(args.dataset, args.dataset_config, split=args.split, streaming=True)
    return (row[args.column] for row in rows)


def text_name(args) -> str:
    if args.text:
        names = [Path(path).name for path in args.text]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more files"
    return f"{args.dataset} {args.split}" if args.dataset else "unseen files of the standard library"


def read_stream(args, tokenizer) -> Stream:
    """Of several texts, those that are long enough; for a single stream, all in a row."""
    length = args.skip_tokens + args.num_tokens
    rows = []
    if args.batch_size > 1:
        for text in documents(args):
            ids = tokenizer(text).input_ids
            if len(ids) > length:
                rows.append(split_text(ids[: length + 1], args.skip_tokens))
            if len(rows) == args.batch_size:
                break
        found = f"{len(rows)} texts of {length} tokens and one more to predict, and --batch-size {args.batch_size} takes as many"
    else:
        inputs, targets = join_texts(documents(args), tokenizer, length, is_each_special=args.special_tokens == "each")
        if len(inputs) == length:
            first = inputs[: starts_with_bos(inputs, tokenizer)] if args.skip_tokens else []
            inputs, targets = inputs[args.skip_tokens :], targets[args.skip_tokens :]
            if first:  # a stream of its own begins as a text does
                inputs, targets = first + inputs[:-1], inputs[:1] + targets[:-1]
            rows.append((inputs, targets))
        found = f"{len(inputs)} tokens to predict, and --num-tokens with --skip-tokens needs {length}"
    if len(rows) < args.batch_size:
        sys.exit(f"Found {found}. Pass more --text, or take fewer.")
    inputs, targets = (torch.tensor(part) for part in zip(*rows))
    return Stream(inputs, targets)


def split_text(ids: list[int], num_skipped: int) -> tuple[list[int], list[int]]:
    return ids[num_skipped:-1], ids[num_skipped + 1 :]


def join_texts(texts: Iterator[str], tokenizer, length: int, is_each_special: bool) -> tuple[list[int], list[int]]:
    """Inputs and targets of a stream of up to `length` tokens.

    With `is_each_special` every text has the special tokens that the tokenizer puts around texts, its first token is not
    predicted and its last one not read. Else the first text has them, and the others go on from there.
    """
    inputs, targets = [], []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=is_each_special or number == 0).input_ids
        if is_each_special:
            inputs += ids[:-1]
            targets += ids[1:]
        else:
            inputs += ids
        if len(inputs) > length:
            break
    if not is_each_special:
        inputs, targets = inputs[:-1], inputs[1:]
    return inputs[:length], targets[:length]


def starts_with_bos(ids: list[int], tokenizer) -> bool:
    return bool(ids) and ids[0] == tokenizer.bos_token_id


# ---------------------------------------------------------------------------------------------------------------------
# The methods
# ---------------------------------------------------------------------------------------------------------------------


class FullReader:
    """The cache that the model makes by itself."""

    num_columns_at_once = sys.maxsize

    def __init__(self, model):
        self.model, self.cache = model, None

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, slice]:
        """The next tokens, `[batch, num_columns]` -> logits `[batch, num_predictions, vocab]`, and of which columns they are."""
        outputs = self.model(tokens, **{CACHE_NAME: self.cache}, use_cache=True)
        self.cache = outputs[CACHE_NAME]
        return outputs.logits, slice(None)

    @property
    def num_bytes_held(self) -> int:
        return storage_bytes(self.cache)


class SinkReader:
    """Sinks and window, or with 0 sinks the window alone."""

    def __init__(self, model, window_length: int, num_sink_tokens: int, quantized: dict | None = None):
        self.model, self.cache = model, SinkCache.from_model(model, window_length, num_sink_tokens, quantized=quantized)

    @property
    def num_columns_at_once(self) -> int:
        return self.cache.num_columns_at_once

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, slice]:
        num_parts = self.cache.num_parts_of(tokens.shape[1])  # of long chunks: as exact, and attention costs less
        logits = self.model(**self.cache.prepare(tokens, num_parts=num_parts)).logits  # a row for each part
        return logits.unflatten(0, (len(tokens), num_parts)).flatten(1, 2), slice(None)

    @property
    def num_bytes_held(self) -> int:
        return self.cache.num_bytes_held


class RecomputingReader:
    """Sinks and the most recent tokens anew for each prediction; while that is all of the text, it is the full cache."""

    num_bytes_held = 0  # between two predictions

    def __init__(self, model, window_length: int, num_sink_tokens: int, every: int):
        self.model, self.window_length, self.every = model, window_length, every
        self.num_sinks, self.num_recent = num_sink_tokens, window_length - num_sink_tokens
        self.filling = FullReader(model)
        self.seen: torch.Tensor | None = None  # sinks and recent tokens
        self.num_seen = 0
        self.options = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self.options["logits_to_keep"] = 1

    @property
    def num_columns_at_once(self) -> int:
        return self.window_length - self.num_seen if self.num_seen < self.window_length else sys.maxsize

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, slice]:
        first = -self.num_seen % self.every  # so that it does not depend on chunks which predictions are made
        self.num_seen += tokens.shape[1]
        seen = tokens if self.seen is None else torch.cat([self.seen, tokens], dim=1)
        sinks, recent = seen[:, : self.num_sinks], seen[:, self.num_sinks :]
        if self.num_seen <= self.window_length:
            self.seen = seen
            return self.filling.read(tokens)
        self.filling = None
        self.seen = torch.cat([sinks, recent[:, -self.num_recent :]], dim=1)
        windows = recent.unfold(1, self.num_recent, 1)[:, 1:][:, first :: self.every]  # [batch, num_predictions, num_recent]
        if not windows.shape[1]:
            return torch.zeros(len(tokens), 0, 1, device=tokens.device), slice(0)
        windows = torch.cat([sinks[:, None].expand(-1, windows.shape[1], -1), windows], dim=2)
        passes = windows.flatten(0, 1).split(max(1, RECOMPUTED_AT_ONCE // self.window_length))
        logits = torch.cat([self.model(part, **self.options).logits[:, -1] for part in passes])
        return logits.unflatten(0, windows.shape[:2]), slice(first, None, self.every)


@dataclass(frozen=True)
class Method:
    """A way to read; window and sinks where it has some."""

    name: str
    window_length: int | None = None
    num_sink_tokens: int | None = None

    def __str__(self) -> str:
        if self.name == "full":
            return "full cache"
        sinks = f"{self.num_sink_tokens} sink{'' if self.num_sink_tokens == 1 else 's'}"
        how = ", recomputed" if self.is_recomputed else f", {self.name}" if self.quantized is not None else ""
        return f"window {self.window_length}, {sinks}{how}"

    @property
    def is_recomputed(self) -> bool:
        return self.name.startswith("recompute")

    @property
    def quantized(self) -> dict | None:
        return json.loads(self.name.removeprefix(QUANTIZED)) if self.name.startswith(QUANTIZED) else None

    @property
    def columns(self) -> dict[str, str]:
        """As they stand in the CSV."""
        values = self.name, self.window_length, self.num_sink_tokens
        return {name: "" if value is None else str(value) for name, value in zip(METHOD_COLUMNS, values)}

    def reader(self, model, args):
        if self.name == "full":
            return FullReader(model)
        if self.is_recomputed:
            return RecomputingReader(model, self.window_length, self.num_sink_tokens, args.recompute_every)
        return SinkReader(model, self.window_length, self.num_sink_tokens, self.quantized)


def chosen_methods(args) -> list[Method]:
    """In the order in which they are measured. `--num-sink-tokens 0` asks for the plain window, too."""
    with_sinks = [num for num in args.num_sink_tokens if num > 0]
    numbers = {name: with_sinks if name.endswith("sinks") else [0] for name in args.methods if name != "full"}
    if 0 in args.num_sink_tokens and "sinks" in args.methods:
        numbers = {"window": [0]} | numbers
    methods = [Method("full")] if "full" in args.methods else []
    for window_length in args.window_length:
        methods += [Method(name, window_length, num) for name in METHODS for num in numbers.get(name, [])]
        quantized = [f"{QUANTIZED} {json.dumps(options)}" for options in args.quantized]
        methods += [Method(name, window_length, num) for name in quantized for num in with_sinks]
    return methods


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


class Bucket:
    """Predictions at the positions from `start` to `stop`."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop
        self.nats, self.hits, self.seconds, self.num_read = [], [], 0.0, 0

    def add(self, nats: torch.Tensor, hits: torch.Tensor, num_read: int, seconds: float) -> None:
        self.nats.append(nats)
        self.hits.append(hits)
        self.num_read += num_read
        self.seconds += seconds

    def row(self, num_bytes_held: int) -> dict:
        nats = torch.cat(self.nats, dim=1).double()  # [batch, num_predictions]
        mean = nats.mean().item() if nats.numel() else math.nan
        return {
            "start": self.start,
            "stop": self.stop,
            "num_predictions": nats.numel(),
            "nats": mean,
            "nats_stderr": standard_error(nats),
            "perplexity": perplexity(mean),
            "accuracy": torch.cat(self.hits, dim=1).double().mean().item() if nats.numel() else math.nan,
            "bytes_held": num_bytes_held,
            "process_bytes": process_bytes(),
            "ms_per_token": 1000 * self.seconds / max(self.num_read, 1),
        }


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 700))


def standard_error(nats: torch.Tensor) -> float:
    """Of the mean of nats `[batch, num_predictions]`: between texts, or of few texts between blocks of tokens, or of few blocks
    between tokens."""
    num_texts, num_predictions = nats.shape
    units = nats.mean(1) if num_texts >= MIN_NUM_TEXTS else nats[:, : num_predictions // BLOCK_LENGTH * BLOCK_LENGTH]
    if num_texts < MIN_NUM_TEXTS:
        units = units.reshape(-1, BLOCK_LENGTH).mean(1) if units.shape[1] > BLOCK_LENGTH else nats.flatten()
    return (units.std() / math.sqrt(len(units))).item() if len(units) > 1 else math.nan


@torch.no_grad()
def measure(reader, stream: Stream, args, num_tokens: int, on_row, progress: tqdm) -> None:
    """Read the stream, and hand the row of each bucket to `on_row` when it is complete."""
    bucket, position = None, 0
    clock = time.perf_counter if args.device.startswith("cuda") else time.process_time
    while position < num_tokens:
        size = min(args.chunk_length, reader.num_columns_at_once, num_tokens - position)
        chunk = slice(position, position + size)
        started = clock()
        logits, columns = reader.read(stream.inputs[:, chunk].to(args.device))
        nats, hits = (part.cpu() for part in score(logits, stream.targets[:, chunk][:, columns].to(args.device)))
        seconds = clock() - started
        predicted = torch.arange(position, position + size)[columns]
        while position < chunk.stop:
            if bucket is None:
                start = position // args.bucket_length * args.bucket_length
                bucket = Bucket(start, min(start + args.bucket_length, num_tokens))
            end = min(bucket.stop, chunk.stop)
            inside = (predicted >= position) & (predicted < end)
            num = int(inside.sum()) if isinstance(reader, RecomputingReader) else end - position
            share = num / max(len(predicted), 1) * seconds
            bucket.add(nats[:, inside], hits[:, inside], num * len(nats), share)
            position = end
            if position == bucket.stop:
                row = bucket.row(reader.num_bytes_held)
                progress.set_postfix_str(f"nats {row['nats']:.3f}, perplexity {row['perplexity']:.2f}")
                on_row(row)
                bucket = None
        progress.update(size)


def score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of the targets `[batch, num_predictions]`, and whether they are the likeliest tokens."""
    nats = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets), logits.argmax(-1) == targets


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------


class Results:
    """The lines of a CSV file, of this run and of others, each of one method under some conditions."""

    def __init__(self, path: Path, about: dict, columns: list[str], conditions: list[str]):
        self.path, self.columns, self.conditions = path, columns, conditions
        self.about = {name: str(value) for name, value in about.items()}
        self.rows: list[dict[str, str]] = read_csv(path) if path.exists() else []

    def of(self, method: "Method") -> list[dict[str, str]]:
        """What has been measured with this method under the conditions of this run."""
        wanted = {name: self.about[name] for name in self.conditions} | method.columns
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]

    def forget(self, method: "Method") -> None:
        old = self.of(method)
        self.rows = [row for row in self.rows if row not in old]
        self._write()

    def add(self, method: "Method", row: dict) -> None:
        row = self.about | {name: str(rounded(value)) for name, value in row.items()} | method.columns
        self.rows.append({name: row.get(name, "") for name in self.columns})
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(self.rows[-1])

    def _write(self) -> None:
        """All at once, in place of the former file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        other = self.path.with_name(self.path.name + ".part")
        with other.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(other, self.path)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def over(rows: list[dict[str, str]], start: int, stop: int) -> dict:
    """Several buckets, in order of position, as one. Standard errors are those of buckets that are independent of each other."""
    rows = [row for row in rows if start <= int(row["start"]) < stop and int(row["num_predictions"])]
    counts = [int(row["num_predictions"]) for row in rows]
    if not rows or int(rows[-1]["stop"]) < stop:
        return {}

    def mean(name: str, power: int = 1) -> float:
        return sum((float(row[name]) * num) ** power for row, num in zip(rows, counts)) / sum(counts) ** power

    nats = mean("nats")
    return {
        "start": start,
        "stop": stop,
        "nats": round(nats, 4),
        "nats_stderr": round(math.sqrt(mean("nats_stderr", 2)), 4),
        "perplexity": rounded(perplexity(nats)),
        "accuracy": round(mean("accuracy"), 4),
        "bytes_held": int(rows[-1]["bytes_held"]),
        "ms_per_token": rounded(mean("ms_per_token")),
    }


def table_edges(args) -> list[int]:
    """Where the columns of the table begin and end: multiples of the shortest window, each at least twice as far as the last."""
    window_length = min(args.window_length)
    factor = 2
    while window_length * factor**6 < args.num_tokens:
        factor *= 2
    edges = [0]
    position = window_length
    while position < args.num_tokens:
        edge = position // args.bucket_length * args.bucket_length
        if edge > edges[-1]:
            edges.append(edge)
        position *= factor
    return [*edges, args.num_tokens]


def print_table(edges: list[int], measured: dict[Method, list[dict]]) -> list[dict]:
    """What was measured over each stretch, and the numbers of the table once more for machines."""
    stretches = list(itertools.pairwise(edges))
    print(
        "| nats a token at positions | " + " | ".join(f"{a}-{b}" for a, b in stretches) + " | accuracy | MiB held | ms a token |"
    )
    print("|---" * (len(stretches) + 4) + "|")
    results = []
    for method, rows in measured.items():
        cells = [over(rows, *stretch) for stretch in stretches]
        known = [cell for cell in cells if cell]
        if known:
            shown = [f"{cell['nats']:.2f} ± {cell['nats_stderr']:.2f}" if cell else "" for cell in cells]
            last = known[-1]
            end = f"{last['accuracy']:.3f} | {last['bytes_held'] / 2**20:.2f} | {last['ms_per_token']:.3g}"
            print(f"| {method} | " + " | ".join(shown) + f" | {end} |")
            results.append({"name": str(method), **method.columns, "stretches": known})
    return results


def compare_with_published(args, measured: dict[Method, list[dict]]) -> list[dict]:
    """Perplexities from the first token on, published and measured. Of another model than those published, all that there is."""
    published = [row for row in read_csv(PUBLISHED) if row["preset"] == args.preset]
    name = model_name(args)
    published = [row for row in published if row["model"].lower() == name.lower()] or published
    compared = []
    for row in published:
        wanted = {column: row[column] for column in METHOD_COLUMNS}
        stop = min(args.num_tokens, max(1, round(int(row["num_tokens"]) / args.bucket_length)) * args.bucket_length)
        found = [over(rows, 0, stop) for method, rows in measured.items() if method.columns == wanted]
        value = found[0].get("perplexity") if found else None
        compared.append({key: row[key] for key in ("model", "cache", "num_tokens", "perplexity", "source")} | {"measured": value})
    print(f"\n| model | cache | tokens | published | measured, {name} | source |\n|---|---|---|---|---|---|")
    for row in compared:
        value = "" if row["measured"] is None else f"{row['measured']:.4g}"
        print(f"| {row['model']} | {row['cache']} | {row['num_tokens']} | {row['perplexity']} | {value} | {row['source']} |")
    return compared


def model_name(args) -> str:
    """Without its organization or folder."""
    return "tiny" if Path(args.model).resolve() == ROOT else args.model.rstrip("/").rpartition("/")[2] or args.model


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_method_arguments(parser: argparse.ArgumentParser, methods: tuple[str, ...], window_lengths: list[int]) -> None:
    """What is measured (`chosen_methods`), and in what chunks."""
    add = parser.add_argument
    add("--methods", nargs="+", choices=methods, default=[*methods], help="(default: all)")
    add("--window-length", type=count, nargs="+", default=window_lengths, help="(default: %(default)s)")
    add("--num-sink-tokens", type=int, nargs="+", default=[4], help="0 is the method window (default: 4)")
    add(
        "--quantized",
        nargs="+",
        type=json.loads,
        default=[],
        metavar="JSON",
        help="also windows with sinks that are quantized so",
    )
    add("--chunk-length", type=count, default=128, help="tokens in one pass (default: %(default)s)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        help="a published measurement: text, lengths, windows and dtype, where no argument says otherwise",
    )
    add("--text", nargs="+", metavar="FILE", help="text files (default: files of the standard library that no training has seen)")
    add("--dataset", help="in place of files: a data set of the Hub, streamed")
    add("--dataset-config", help="its configuration, where it has several")
    add("--split", default="test", help="(default: %(default)s)")
    add("--column", default="text", help="(default: %(default)s)")
    add("--num-tokens", type=count, default=1536, help="predictions in each stream (default: %(default)s)")
    add("--skip-tokens", type=int, default=0, help="begin so far inside of the text, with a new cache (default: %(default)s)")
    add("--batch-size", type=count, help="texts side by side; 1 reads them in a row (default: 16 of the default text, else 1)")
    add("--special-tokens", choices=("first", "each"), default="first",
        help="which texts in a row begin as the tokenizer begins a text (default: %(default)s)")  # fmt: skip
    add_method_arguments(parser, METHODS, [128])
    add("--bucket-length", type=count, help=f"positions in one line of the CSV (default: for about {NUM_BUCKETS} lines)")
    add("--recompute-every", type=count, default=8, help="1 makes every prediction of recompute (default: %(default)s)")
    add("--max-full-length", type=count, default=20_000, help="where the full cache stops (default: %(default)s)")
    add("--csv", type=Path, default=ROOT / "results" / "evaluate.csv", help="(default: %(default)s)")
    add("--resume", action="store_true", help="leave out what the CSV has of this run")
    preset = parser.parse_known_args()[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args()

    if args.text and args.dataset and preset is None:
        parser.error("--text and --dataset are two texts. Pass one of them.")
    if args.batch_size is None:
        args.batch_size = 1 if args.text or args.dataset else 16
    if args.batch_size > 1 and args.special_tokens == "each":
        parser.error("--special-tokens each is for texts in a row. Leave --batch-size out.")
    if args.bucket_length is None:
        args.bucket_length = max(8, 2 ** math.ceil(math.log2(args.num_tokens / NUM_BUCKETS)))
    for window_length, num_sinks in itertools.product(args.window_length, args.num_sink_tokens):
        if not 0 <= num_sinks < window_length:
            parser.error(f"--num-sink-tokens {num_sinks} leaves no recent tokens in --window-length {window_length}. Take fewer.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU here. Take cpu, or install a build of torch with CUDA.")
    if args.csv.exists() and args.csv.open(encoding="utf-8").readline().strip().split(",") != CSV_COLUMNS:
        parser.error(f"--csv {args.csv} has other columns than this script writes. Remove it first, or write to another file.")
    return args


def main() -> None:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()  # "longer than the maximum length": that is what is measured here
    model, tokenizer = load_model(args)
    stream = read_stream(args, tokenizer)
    names = ("num_tokens", "skip_tokens", "special_tokens", "batch_size", "chunk_length", "bucket_length", "recompute_every")
    about = describe_run(args) | {name: getattr(args, name) for name in names}
    about |= {
        "model": model_name(args),
        "revision": getattr(model.config, "_commit_hash", None) or args.revision or "",
        "text": text_name(args),
        "text_crc32": f"{zlib.crc32(stream.inputs.numpy().tobytes()):08x}",
    }
    results = Results(args.csv, about | {"measure": "stream"}, CSV_COLUMNS, CONDITIONS)

    def measured_with(method: Method) -> list[dict[str, str]]:
        return sorted(results.of(method), key=lambda row: int(row["start"]))

    measured, is_interrupted = {}, False
    try:
        for method in chosen_methods(args):
            num_tokens = min(args.num_tokens, args.max_full_length) if method.name == "full" else args.num_tokens
            known = {row["start"] for row in results.of(method)} if args.resume else set()
            if len(known) < math.ceil(num_tokens / args.bucket_length):
                if not known:
                    results.forget(method)

                def keep(row: dict) -> None:
                    if str(row["start"]) not in known:
                        results.add(method, row)

                with tqdm(total=num_tokens, desc=str(method), unit="token", file=sys.stderr) as progress:
                    measure(method.reader(model, args), stream, args, num_tokens, keep, progress)
            measured[method] = measured_with(method)
    except KeyboardInterrupt:
        is_interrupted = True
        print("Interrupted: what follows was measured before. --resume goes on.", file=sys.stderr)
        measured = {method: measured_with(method) for method in chosen_methods(args)}
    edges = table_edges(args)
    table = print_table(edges, measured)
    published = compare_with_published(args, measured) if args.preset else []
    print(
        json.dumps(
            about
            | {"csv": str(args.csv), "interrupted": is_interrupted, "edges": edges, "results": table, "published": published}
        )
    )
    sys.exit(130 if is_interrupted else 0)


if __name__ == "__main__":
    main()
