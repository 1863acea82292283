"""How far back a model can look something up in a stream, with each kind of cache: recall by distance.

    copy    a passage of real text comes again, so many tokens later: how well is it predicted, against the first time? Any base
            model can do that, also the tiny one
    lines   StreamEval, made anew from its description (https://arxiv.org/abs/2309.17453, section 4.3 and appendix C): lines like
            "The REGISTER_CONTENT in line 20 is <45603>", and every --query-every lines a query for the line --distance lines
            back. For models that understand it, as they are: the text is raw, as in the paper

The same streams go through every method (scripts/evaluate.py says what these are). What is scored are the logits: an answer is
right if each of its tokens is the likeliest after the text before it, which is what greedy decoding would write. The stream goes
on with the right answer. Ctrl-C keeps what was measured: the exit status is 130 then.

    python scripts/stream_eval.py
    python scripts/stream_eval.py --window-length 64 128 --methods full window sinks --csv results/recall.csv
    python scripts/stream_eval.py --task lines --model togethercomputer/Llama-2-7B-32K-Instruct --dtype float16 \\
        --distance 20 40 60 80 100 150 200 --num-queries 100 --num-streams 100 \\
        --window-length 2049 4097 --methods sinks --csv lines.csv

Published figures for lines stand in results/published_stream_eval.csv, and are printed beside the measured ones.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from common import ROOT, add_model_arguments, count, describe_run, load_model
from evaluate import (
    METHOD_COLUMNS,
    METHODS,
    Method,
    Results,
    add_method_arguments,
    chosen_methods,
    documents,
    join_texts,
    model_name,
    read_csv,
    score,
    standard_error,
)

HEADER = "Below is a record of lines I want you to remember.\n"
LARGEST_NUMBER = 50_000  # of a register
PASSAGE_LENGTH = 16  # tokens of copy; the first few tell which passage it is, and are not scored
NUM_CUE_TOKENS = 4
NUM_TEXT_TOKENS = 200_000  # of which passages are drawn
# Distances of copy, in windows.
DISTANCES = (0.25, 0.5, 0.75, 0.875, 0.9375, 1, 1.0625, 1.125, 1.25, 1.5, 2)
PUBLISHED = ROOT / "results" / "published_stream_eval.csv"

CONDITIONS = (
    "task query_every num_queries num_streams seed text model revision torch transformers device device_name dtype num_threads "
    "batch_size"
).split()
MEASURED = (
    "distance token_distance num_answers accuracy accuracy_stderr nats token_accuracy first_nats first_token_accuracy".split()
)
CSV_COLUMNS = ["date", "commit", "measure", *METHOD_COLUMNS, *MEASURED, *CONDITIONS, "python"]


@dataclass
class Streams:
    """Token ids `[num_streams, num_tokens]`, and for each row the answers in it: `[start, stop)` of their tokens.

    `first` are those tokens where nothing tells them, to compare with: when a passage comes for the first time.
    """

    ids: torch.Tensor
    answers: list[list[tuple[int, int]]]
    first: list[list[tuple[int, int]]] = field(default_factory=list)
    token_distance: float = math.nan


def copies(text: list[int], rng: random.Random, args, distance: int, window_length: int) -> Streams:
    """Passages that come again `distance` tokens later, in a stream whose window is full. `text` begins as a text does."""
    if distance < PASSAGE_LENGTH:
        sys.exit(f"--distance {distance}: a passage has {PASSAGE_LENGTH} tokens, and can't come again before it has ended.")

    def passage(length: int) -> list[int]:
        start = rng.randrange(1, len(text) - length)
        return text[start : start + length]

    rows, answers, first = [], [], []
    for _ in range(args.num_streams):
        row = text[:1] + passage(2 * window_length)
        answers.append([])
        first.append([])
        for _ in range(args.num_queries):
            row += passage(window_length)
            repeated = passage(PASSAGE_LENGTH)
            first[-1].append((len(row) + NUM_CUE_TOKENS, len(row) + PASSAGE_LENGTH))
            row += repeated + passage(distance - PASSAGE_LENGTH)
            answers[-1].append((len(row) + NUM_CUE_TOKENS, len(row) + PASSAGE_LENGTH))
            row += repeated
        rows.append(row)
    return Streams(torch.tensor(rows), answers, first, distance)


def stream_eval(rng: random.Random, num_queries: int, distance: int, every: int) -> Iterator[tuple[str, str]]:
    """Text up to a query, and the answer: of the line `distance` lines before the last one, every `every` lines."""
    text, numbers = HEADER, {}
    line = 0
    for asked in range(0, num_queries * every, every):
        while line <= asked + distance:
            numbers[line] = rng.randint(1, LARGEST_NUMBER)
            text += f"The REGISTER_CONTENT in line {line} is <{numbers[line]}>\n"
            line += 1
        yield f"{text}Query: The REGISTER_CONTENT in line {asked} is", f" <{numbers[asked]}>\n"
        text = ""


def lines(tokenizer, rng: random.Random, args, distance: int) -> Streams:
    """One stream of StreamEval."""
    ids, answers, num_line_tokens = [], [], []
    for text, answer in stream_eval(rng, args.num_queries, distance, args.query_every):
        encoded = tokenizer(text + answer, add_special_tokens=not ids, return_offsets_mapping=True)
        start, stop = len(text) + 1, len(text) + len(answer) - 1  # from "<" to ">"
        inside = [i for i, (a, b) in enumerate(encoded.offset_mapping) if a < stop and b > start]
        answers.append((len(ids) + inside[0], len(ids) + inside[-1] + 1))
        ids += encoded.input_ids
        num_line_tokens.append(len(encoded.input_ids) / (text + answer).count("\n"))
    return Streams(torch.tensor([ids]), [answers], token_distance=distance * sum(num_line_tokens) / len(num_line_tokens))


@torch.no_grad()
def read(reader, ids: torch.Tensor, args, progress: tqdm) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of each token but the first, `[num_streams, num_tokens - 1]`, and whether it is the likeliest."""
    nats, hits, position = [], [], 0
    inputs, targets = ids[:, :-1], ids[:, 1:]
    while position < inputs.shape[1]:
        chunk = slice(position, position + min(args.chunk_length, reader.num_columns_at_once))
        logits, _ = reader.read(inputs[:, chunk].to(args.device))
        for part, scored in zip((nats, hits), score(logits, targets[:, chunk].to(args.device))):
            part.append(scored.cpu())
        position = min(chunk.stop, inputs.shape[1])
        progress.update(logits.shape[0] * logits.shape[1])
    return torch.cat(nats, dim=1), torch.cat(hits, dim=1)


def row_of(distance: int, read_streams: list[tuple[Streams, torch.Tensor, torch.Tensor]]) -> dict:
    """What was recalled at one distance. A token at index i is predicted at index i - 1."""

    def at(name: str, of: int) -> list[torch.Tensor]:
        return [
            streams_and_scores[of][row, start - 1 : stop - 1].double()
            for streams_and_scores in read_streams
            for row, spans in enumerate(getattr(streams_and_scores[0], name))
            for start, stop in spans
        ]

    nats, hits = at("answers", 1), at("answers", 2)
    is_right = torch.stack([answer.min() for answer in hits])
    row = {
        "distance": distance,
        "token_distance": sum(streams.token_distance for streams, _, _ in read_streams) / len(read_streams),
        "num_answers": len(hits),
        "accuracy": is_right.mean().item(),
        "accuracy_stderr": standard_error(is_right[None]),
        "nats": torch.cat(nats).mean().item(),
        "token_accuracy": torch.cat(hits).mean().item(),
    }
    if read_streams[0][0].first:
        row["first_nats"] = torch.cat(at("first", 1)).mean().item()
        row["first_token_accuracy"] = torch.cat(at("first", 2)).mean().item()
    return row


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--task", choices=("copy", "lines"), default="copy", help="(default: %(default)s)")
    add("--distance", type=count, nargs="+",
        help="of copy in tokens (default: 0.25 to 2 windows), of lines in lines (default: 20)")  # fmt: skip
    add("--num-queries", type=count, help="in each stream (default: 2 of copy, 100 of lines)")
    add("--num-streams", type=count, help="for each distance (default: 24 of copy, 10 of lines)")
    add("--query-every", type=count, default=10, help="lines from one query to the next (default: %(default)s)")
    add("--text", nargs="+", metavar="FILE", help="text files for copy (default: files of the standard library)")
    add_method_arguments(parser, tuple(method for method in METHODS if not method.startswith("recompute")), [64, 128])
    add(
        "--max-full-length",
        type=count,
        default=20_000,
        help="the full cache is left out of longer streams (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    add("--csv", type=Path, default=ROOT / "results" / "recall.csv", help="(default: %(default)s)")
    args = parser.parse_args()
    for window_length in args.window_length:
        for num_sinks in args.num_sink_tokens:
            if not 0 <= num_sinks < window_length:
                parser.error(f"--num-sink-tokens {num_sinks} leaves no recent tokens in --window-length {window_length}.")
    if args.csv.exists() and args.csv.open(encoding="utf-8").readline().strip().split(",") != CSV_COLUMNS:
        parser.error(f"--csv {args.csv} has other columns than this script writes. Remove it first, or write to another file.")
    args.num_queries = args.num_queries or {"copy": 2, "lines": 100}[args.task]
    args.num_streams = args.num_streams or {"copy": 24, "lines": 10}[args.task]
    args.dataset, args.batch_size, args.special_tokens = None, 1, "first"
    return args


def make_streams(args, tokenizer, text: list[int], distance: int, window_length: int) -> list[Streams]:
    """The same for every method."""
    rng = random.Random(f"{args.seed} {distance}")
    if args.task == "copy":
        return [copies(text, rng, args, distance, window_length)]
    return [lines(tokenizer, rng, args, distance) for _ in range(args.num_streams)]


def measure_method(method: Method, model, tokenizer, text: list[int], args, results: Results) -> None:
    window_length = method.window_length or max(args.window_length)
    default = [round(part * window_length) for part in DISTANCES if part * window_length >= PASSAGE_LENGTH]
    for distance in args.distance or ([20] if args.task == "lines" else default):
        streams = make_streams(args, tokenizer, text, distance, window_length)
        if method.name == "full":
            streams = [each for each in streams if each.ids.shape[1] <= args.max_full_length]
        num_tokens = sum(each.ids.numel() - len(each.ids) for each in streams)
        with tqdm(total=num_tokens, desc=f"{method}, distance {distance}", unit="token", file=sys.stderr) as progress:
            done = [(each, *read(method.reader(model, args), each.ids, args, progress)) for each in streams]
            if done:
                row = row_of(distance, done)
                progress.set_postfix_str(f"accuracy {row['accuracy']:.3f}")
                results.add(method, row)


def print_table(measured: dict[Method, list[dict]], args) -> list[dict]:
    print("| cache | distance | tokens | answers | right | tokens right | at first | nats | at first |\n" + "|---" * 9 + "|")
    published = read_csv(PUBLISHED) if args.task == "lines" else []
    results = []
    for method, rows in measured.items():
        for row in rows:
            numbers = {name: float(row[name]) for name in MEASURED if row[name] not in ("", "nan")}
            names = "token_accuracy", "first_token_accuracy", "nats", "first_nats"
            shown = [f"{numbers[name]:.3f}" if name in numbers else "" for name in names]
            right = f"{numbers['accuracy']:.3f} ± {numbers.get('accuracy_stderr', math.nan):.3f}"
            for known in published:
                same = known["model"].lower() == model_name(args).lower() and known["distance"] == row["distance"]
                if same and all(known[name] == value for name, value in method.columns.items()):
                    right += f" (published: {float(known['accuracy']) / 100:.3f})"
            tokens = f"{numbers['token_distance']:.0f}"
            print(f"| {method} | {row['distance']} | {tokens} | {row['num_answers']} | {right} | {' | '.join(shown)} |")
            results.append({"name": str(method), **method.columns, **numbers})
    return results


def main() -> None:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()  # "longer than the maximum length": that is what is measured here
    model, tokenizer = load_model(args)
    if not tokenizer.is_fast and args.task == "lines":
        sys.exit(f"The tokenizer of {args.model} can't tell which tokens are the answer. Take a model with a fast tokenizer.")
    text = join_texts(documents(args), tokenizer, NUM_TEXT_TOKENS, is_each_special=False)[0] if args.task == "copy" else []
    about = describe_run(args) | {
        name: getattr(args, name) for name in ("task", "query_every", "num_queries", "num_streams", "seed")
    }
    about |= {
        "measure": "recall",
        "model": model_name(args),
        "revision": getattr(model.config, "_commit_hash", None) or args.revision or "",
        "text": "" if args.task == "lines" else Path(args.text[0]).name if args.text else "unseen files of the standard library",
        "batch_size": args.num_streams if args.task == "copy" else 1,
    }
    results = Results(args.csv, about, CSV_COLUMNS, CONDITIONS)
    is_interrupted = False
    try:
        for method in chosen_methods(args):
            results.forget(method)
            measure_method(method, model, tokenizer, text, args, results)
    except KeyboardInterrupt:
        is_interrupted = True
        print("Interrupted: what follows was measured before.", file=sys.stderr)
    table = print_table({method: results.of(method) for method in chosen_methods(args)}, args)
    print(json.dumps(about | {"csv": str(args.csv), "interrupted": is_interrupted, "results": table}))
    sys.exit(130 if is_interrupted else 0)


if __name__ == "__main__":
    main()
