"""What a model writes far past its window, with each kind of cache, and how soon it falls apart.

Each method (scripts/evaluate.py says what they are) goes on from the same long beginning of a text. It samples as the generation
config of the model says, or greedily where that says nothing. Two things are measured of each stretch of the text:

    distinct   the share of its n-grams, of 1 to 4 tokens, that are not repetitions: low in a text that goes round in circles
    nats       a token, under the same model with a fresh cache of at most --judged-length tokens: high in a text that makes no
               sense, low in one that goes round in circles

Both are also measured of the real text from there on (`text`), which does neither. Time is that of the process.

    python scripts/write_text.py --model models/smollm2 --text book.txt --window-length 512

Each line of `--csv` is one stretch. The texts are written to `--texts-dir`; `--excerpts` is a file of Markdown with the end of
each text. The last line is one JSON document.
"""

import argparse
import json
import sys
import time
import zlib
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from common import ROOT, add_model_arguments, count, describe_run, load_model
from custom_generate.generate import generate
from evaluate import (
    METHOD_COLUMNS,
    Method,
    Results,
    add_method_arguments,
    chosen_methods,
    documents,
    join_texts,
    model_name,
    text_name,
)

METHODS = ("full", "window", "sinks")
THE_TEXT = "text"  # that goes on, in place of a method
CONDITIONS = (
    "text text_crc32 num_prompt_tokens num_tokens stretch_length judged_length seed sampling model revision torch transformers "
    "device device_name dtype num_threads"
).split()
MEASURED = "start stop distinct_1 distinct_2 distinct_3 distinct_4 nats ms_per_token".split()
CSV_COLUMNS = ["date", "commit", "measure", *METHOD_COLUMNS, *MEASURED, *CONDITIONS, "python"]
NUM_EXCERPT_CHARACTERS = 900


class Clock(BaseStreamer):
    """Notes when each token came, and shows how many there are."""

    def __init__(self, progress: tqdm):
        self.progress = progress
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.progress.update(len(self.times) > 0)  # the first is the prompt
        self.times.append(time.process_time())

    def end(self) -> None:
        pass


def write(model, method: Method, prompt: torch.Tensor, args) -> tuple[list[int], list[float]]:
    """The new tokens, and the seconds that each took: the first one with the prompt."""
    length = {"max_new_tokens": args.num_tokens, "min_new_tokens": args.num_tokens}  # so that no text ends before
    cache = {} if method.name == "full" else {"window_length": method.window_length, "num_sink_tokens": method.num_sink_tokens}
    if method.quantized is not None:
        cache["quantized"] = method.quantized
    torch.manual_seed(args.seed)
    with tqdm(total=args.num_tokens, desc=str(method), unit="token", file=sys.stderr) as progress:
        clock = Clock(progress)
        if cache:
            ids = generate(model=model, inputs=prompt, streamer=clock, **cache, **length)
        else:
            ids = model.generate(prompt, streamer=clock, **length)
    return ids[0, prompt.shape[1] :].tolist(), [after - before for before, after in zip(clock.times, clock.times[1:])]


def distinct(ids: list[int], length: int) -> float:
    """The share of n-grams that no earlier one equals."""
    ngrams = [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


@torch.no_grad()
def judge(model, ids: list[int], prefix: list[int], length: int) -> torch.Tensor:
    """Nats of each token, with `length // 2` to `length - 1` tokens in front of it, and fewer for the first ones. `prefix` is in
    front of all of them."""
    nats, half = [], length // 2
    for start in range(-half, len(ids) - half, half):
        tokens = torch.tensor([prefix + ids[max(start, 0) : start + length]], device=model.device)
        logits = model(tokens, use_cache=False).logits[0, :-1].float()
        new = min(half, len(ids) - half - start)
        nats.append(torch.nn.functional.cross_entropy(logits[-new:], tokens[0, 1:][-new:], reduction="none"))
        if len(nats[-1]) < new:  # nothing stands in front of the very first token
            nats[-1] = torch.nn.functional.pad(nats[-1], (new - len(nats[-1]), 0), value=float("nan"))
    return torch.cat(nats).cpu()


def stretches(model, ids: list[int], seconds: list[float] | None, prefix: list[int], args) -> list[dict]:
    """What is measured of a text, stretch by stretch."""
    nats, rows = judge(model, ids, prefix, args.judged_length), []
    for start in range(0, len(ids), args.stretch_length):
        stop = min(start + args.stretch_length, len(ids))
        row = {"start": start, "stop": stop, "nats": nats[start:stop].nanmean().item()}
        row |= {f"distinct_{length}": distinct(ids[start:stop], length) for length in range(1, 5)}
        if seconds:
            timed = seconds[max(start, 1) : stop]  # without the prompt
            row["ms_per_token"] = 1000 * sum(timed) / max(len(timed), 1)
        rows.append(row)
    return rows


def excerpt(text: str) -> str:
    """The end of a text, as a block of Markdown."""
    end = text[-NUM_EXCERPT_CHARACTERS:].partition(" ")[2]
    return "\n".join(f"> {line}".rstrip() for line in end.splitlines())


def write_excerpts(path: Path, texts: dict[str, str], about: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = (
        f"# What {about['model']} writes\n\nThe end of {about['num_tokens']:,} tokens, after {about['num_prompt_tokens']:,} "
        f"tokens of {about['text']}. Sampling: `{about['sampling']}`, seed {about['seed']}, {about['dtype']}.\n"
    )
    blocks = [f"\n## {name[0].upper()}{name[1:]}\n\n{excerpt(text)}\n" for name, text in texts.items()]
    path.write_text(head + "".join(blocks), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--text", nargs="+", metavar="FILE", help="text files to go on from (default: files of the standard library)")
    add("--num-prompt-tokens", type=count, default=8000, help="of that text (default: %(default)s)")
    add("--num-tokens", type=count, default=5000, help="to write (default: %(default)s)")
    add("--stretch-length", type=count, default=1000, help="tokens in one line of the CSV (default: %(default)s)")
    add("--judged-length", type=count, default=512, help="tokens in one pass when the text is judged (default: %(default)s)")
    add_method_arguments(parser, METHODS, [512])
    add("--temperature", type=float, help="of sampling; 0 takes the likeliest token (default: the settings of the model)")
    add("--top-k", type=count, help="with a temperature: sample from so many tokens (default: from all)")
    add("--top-p", type=float, help="with a temperature: sample from the tokens of so much probability (default: from all)")
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    add("--csv", type=Path, default=ROOT / "results" / "writing.csv", help="(default: %(default)s)")
    add("--texts-dir", type=Path, default=ROOT / "results" / "written", help="for the whole texts (default: %(default)s)")
    add("--excerpts", type=Path, metavar="FILE", help="Markdown with the end of each text (default: none)")
    add("--resume", action="store_true", help="leave out what the CSV and the folder have of this run")
    args = parser.parse_args()
    args.dataset, args.batch_size = None, 1
    return args


def sampling_of(model, args) -> dict:
    """What the generation config of the model says of sampling; with a temperature, what the arguments say in its place."""
    config = model.generation_config
    if args.temperature is not None:
        config.do_sample, config.temperature = args.temperature > 0, args.temperature or None
        config.top_k, config.top_p, config.min_p = args.top_k, args.top_p, None
    if not config.do_sample:
        return {"do_sample": False}
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p")
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


def main() -> None:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()  # "longer than the maximum length": that is what is measured here
    model, tokenizer = load_model(args)
    ids = join_texts(documents(args), tokenizer, args.num_prompt_tokens + args.num_tokens, is_each_special=False)[0]
    if len(ids) < args.num_prompt_tokens + args.num_tokens:
        sys.exit(f"The text has {len(ids)} tokens, which is less than --num-prompt-tokens and --num-tokens. Pass more --text.")
    prompt, goes_on = torch.tensor([ids[: args.num_prompt_tokens]], device=args.device), ids[args.num_prompt_tokens :]
    prefix = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    about = describe_run(args) | {name: getattr(args, name) for name in CONDITIONS if hasattr(args, name)}
    about |= {
        "measure": "writing",
        "sampling": json.dumps(sampling_of(model, args)),
        "model": model_name(args),
        "revision": getattr(model.config, "_commit_hash", None) or args.revision or "",
        "text": text_name(args),
        "text_crc32": f"{zlib.crc32(prompt.cpu().numpy().tobytes()):08x}",
    }
    results = Results(args.csv, about, CSV_COLUMNS, CONDITIONS)
    texts, table = {}, []
    for method in [Method(THE_TEXT), *chosen_methods(args)]:
        name = "the text itself" if method.name == THE_TEXT else str(method)
        path = args.texts_dir / ("-".join(filter(None, (about["model"], *method.columns.values()))) + ".txt")
        if not (args.resume and path.exists() and results.of(method)):
            new, seconds = (goes_on, None) if method.name == THE_TEXT else write(model, method, prompt, args)
            results.forget(method)
            for row in stretches(model, new, seconds, prefix, args):
                results.add(method, row)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(tokenizer.decode(new), encoding="utf-8")
        texts[name] = path.read_text(encoding="utf-8")
        rows = [{column: float(row[column]) for column in MEASURED if row[column]} for row in results.of(method)]
        table.append({"name": name, **method.columns, "stretches": rows})
        print(f"{name:28s} " + "  ".join(f"{row['nats']:.2f} nats, {row['distinct_4']:.2f} distinct" for row in rows), flush=True)
        if args.excerpts:
            write_excerpts(args.excerpts, texts, about)
    print(json.dumps(about | {"csv": str(args.csv), "results": table}))


if __name__ == "__main__":
    main()
