"""How well a model predicts a long text with each kind of cache: nats a token, by position in the stream.

One text goes through all methods, in the same process: the full cache (`--full`), and sinks + window for every `--num-sink-tokens`
and `--window-length` (0 sinks is the plain window). Each stream is fed in exact chunks, so memory is bounded by the window.

    python scripts/evaluate.py --num-tokens 1400 --num-texts 16 --full --window-length 128 256 --num-sink-tokens 0 1 4 \\
        --csv nats.csv
    python scripts/evaluate.py --num-tokens 50000 --window-length 256 --num-sink-tokens 4
"""

import argparse
import csv
import json
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from common import ROOT, add_model_arguments, load_model
from generate import SinkCache
from stdlib_text import stdlib_text
from tqdm import tqdm
from transformers import DynamicCache

CHUNK_LENGTH = 128


@torch.no_grad()
def stream_nats(model, input_ids: torch.Tensor, cache, name: str, chunk_length: int = CHUNK_LENGTH) -> torch.Tensor:
    """Nats of each token but the first, `[batch, num_tokens - 1]`. `cache` is a `SinkCache` or a `DynamicCache`."""
    nats, last = [], None
    progress = tqdm(total=input_ids.shape[1], desc=name, unit="token", file=sys.stderr)
    start = 0
    while start < input_ids.shape[1]:
        room = cache.num_columns_at_once if isinstance(cache, SinkCache) else chunk_length
        chunk = input_ids[:, start : start + min(chunk_length, room)]
        inputs = cache.prepare(chunk) if isinstance(cache, SinkCache) else {"input_ids": chunk, "past_key_values": cache}
        logits = model(**inputs).logits.float()
        predictions = logits if last is None else torch.cat([last, logits], dim=1)
        targets = chunk[:, 1:] if last is None else chunk
        nats.append(torch.nn.functional.cross_entropy(predictions[:, :-1].transpose(1, 2), targets, reduction="none").cpu())
        last = logits[:, -1:]
        start += chunk.shape[1]
        progress.update(chunk.shape[1])
        progress.set_postfix(nats=f"{nats[-1].mean():.3f}")
    progress.close()
    return torch.cat(nats, dim=1)


def load_texts(args, tokenizer) -> torch.Tensor:
    """Token ids `[num_texts, num_tokens]`: whole files that are long enough, or if one text is wanted, all files in a row."""
    texts = [Path(path).read_text(encoding="utf-8") for path in args.text] if args.text else stdlib_text(held_out=True)
    if args.num_texts == 1:
        texts = ["\n".join(texts)]
    rows = [ids[: args.num_tokens] for ids in tokenizer(texts).input_ids if len(ids) >= args.num_tokens][: args.num_texts]
    if len(rows) < args.num_texts:
        sys.exit(
            f"Found {len(rows)} texts of {args.num_tokens} tokens, {args.num_texts} are wanted. Pass more --text, or less --num-tokens."
        )
    return torch.tensor(rows)


def write_csv(path: Path, about: dict, columns: dict[str, torch.Tensor]) -> None:
    """One row a position: the mean of all texts, for each cache. How it was measured stands in a comment, as JSON."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {json.dumps(about)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["position", *columns])
        for position, values in enumerate(zip(*(nats.mean(0).tolist() for nats in columns.values())), start=1):
            writer.writerow([position, *(f"{value:.3f}" for value in values)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--text", nargs="+", help="text files (default: held-out files of the Python standard library)")
    parser.add_argument("--num-tokens", type=int, default=1400, help="length of each stream (default: %(default)s)")
    parser.add_argument("--num-texts", type=int, default=1, help="streams side by side in one batch (default: %(default)s)")
    parser.add_argument("--window-length", type=int, nargs="+", default=[256], help="(default: 256)")
    parser.add_argument("--num-sink-tokens", type=int, nargs="+", default=[4], help="(default: 4)")
    parser.add_argument("--buckets", type=int, nargs="+", default=[0, 128, 256, 384, 768], help="starts of the position buckets")
    parser.add_argument("--full", action="store_true", help="also the full cache: time and memory grow with the text")
    parser.add_argument("--quantized", nargs="+", type=json.loads, default=[], metavar="JSON", help="also windows quantized so")
    parser.add_argument("--chunk-length", type=int, default=CHUNK_LENGTH, help="tokens fed at once (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="also write the nats at each position to this file; it must not exist")
    args = parser.parse_args()
    if args.csv and args.csv.exists():
        sys.exit(f"{args.csv} exists. Remove it first, or write to another file.")

    model, tokenizer = load_model(args)
    input_ids = load_texts(args, tokenizer).to(args.device)
    edges = [start for start in args.buckets if start < args.num_tokens] + [args.num_tokens]
    caches = [("full cache", None)] if args.full else []
    windows = [(f"window {w}, {s} sink{'' if s == 1 else 's'}", (w, s)) for w in args.window_length for s in args.num_sink_tokens]
    caches += windows
    for options in args.quantized:
        what = ", ".join(f"{value}" if name == "backend" else f"{name} {value}" for name, value in options.items())
        caches += [(f"{name}: {what}", (*numbers, False, options)) for name, numbers in windows]
    rows, columns = [], {}
    for name, numbers in caches:
        cache = DynamicCache() if numbers is None else SinkCache.from_model(model, *numbers)
        started = time.perf_counter()
        nats = stream_nats(model, input_ids, cache, name, args.chunk_length)
        columns[name] = nats
        by_bucket = [round(nats[:, start:stop].mean().item(), 3) for start, stop in zip(edges, edges[1:])]
        held = cache.num_bytes_held if numbers else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        rows.append({"cache": name, "nats": by_bucket, "bytes_held": held, "seconds": round(time.perf_counter() - started, 1)})
    print("| nats a token at positions | " + " | ".join(f"{a}-{b}" for a, b in zip(edges, edges[1:])) + " | MiB held |")
    print("|---" * (len(edges) + 1) + "|")
    for row in rows:
        print(f"| {row['cache']} | " + " | ".join(f"{n:.2f}" for n in row["nats"]) + f" | {row['bytes_held'] / 2**20:.2f} |")
    about = {
        "model": "the tiny model" if Path(args.model) == ROOT else args.model,
        "dtype": args.dtype,
        "num_texts": len(input_ids),
    }
    if args.csv:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version()}
        command = " ".join(["python", *sys.argv])
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        write_csv(args.csv, {"command": command, **about, "device": args.device, **versions}, columns)
    print(json.dumps({**about, "edges": edges, "results": rows}))


if __name__ == "__main__":
    main()
