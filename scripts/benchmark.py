"""What a token costs with a full `SinkCache`, side by side with `DynamicCache` at the same visible length.

Both caches decode in turns in one process, `--num-tokens` at a time, and the ratio of each pair of turns is taken: what the machine
does besides hits both. `DynamicCache` is put back to the length after each turn. Default: layers of the shape of Qwen3-0.6B with
random weights.

    python scripts/benchmark.py --window-length 256 1024 4096
    python scripts/benchmark.py --model Qwen/Qwen3-0.6B --dtype bfloat16 --device cuda
"""

import argparse
import json
import statistics
import sys
import time

import torch
import transformers
from common import DEFAULT_NUM_SINK_TOKENS, DTYPES, add_model_arguments
from generate import SinkCache
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config


def build_model(args):
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model).to(DTYPES[args.dtype])
    else:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=2048,
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 64,
            num_key_value_heads=max(1, args.hidden_size // 128),
            head_dim=128,
        )
        model = AutoModelForCausalLM.from_config(config).to(DTYPES[args.dtype])
    return model.to(args.device).eval()


def seconds(decode, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    decode()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def compare(model, window_length: int, num_tokens: int, num_rounds: int, device: str) -> dict:
    """Milliseconds a token with each cache, and the ratio."""
    token = torch.randint(2, 2000, (1, 1), device=device)
    prompt = torch.randint(2, 2000, (1, window_length + 1), device=device)

    sink = SinkCache.from_model(model, window_length, DEFAULT_NUM_SINK_TOKENS)
    model(**sink.prepare(prompt[:, :window_length]), logits_to_keep=1)
    model(**sink.prepare(prompt[:, window_length:]))  # full from here on
    dynamic = DynamicCache(config=model.config)
    first_length = window_length - num_tokens // 2  # so that the lengths it has while timed are the window on average
    model(prompt[:, :first_length], past_key_values=dynamic, logits_to_keep=1)

    def decode_sink():
        for _ in range(num_tokens):
            model(**sink.prepare(token))

    def decode_dynamic():
        for step in range(num_tokens):
            model(token, past_key_values=dynamic, position_ids=torch.full((1, 1), first_length + step, device=device))

    times: dict[str, list[float]] = {"sink": [], "dynamic": []}
    for turn in tqdm(range(num_rounds + 1), desc=f"window {window_length}", file=sys.stderr):
        for name, decode in [("sink", decode_sink), ("dynamic", decode_dynamic)][:: 1 if turn % 2 else -1]:
            taken = seconds(decode, device)
            if turn > 0:  # the first warms up
                times[name].append(1000 * taken / num_tokens)
        dynamic.crop(-num_tokens)
    ratios = [ours / theirs for ours, theirs in zip(times["sink"], times["dynamic"])]
    return {
        "window_length": window_length,
        "sink_ms": round(statistics.median(times["sink"]), 3),
        "dynamic_ms": round(statistics.median(times["dynamic"]), 3),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(model=None)
    parser.add_argument("--window-length", type=int, nargs="+", default=[256, 1024, 4096], help="(default: 256 1024 4096)")
    parser.add_argument(
        "--hidden-size", type=int, default=1024, help="of the random model; multiple of 64 (default: %(default)s)"
    )
    parser.add_argument("--num-layers", type=int, default=6, help="of the random model (default: %(default)s)")
    parser.add_argument("--num-tokens", type=int, default=32, help="decoded in one turn (default: %(default)s)")
    parser.add_argument("--num-rounds", type=int, default=15, help="turns of each cache (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=None, help="of torch on a CPU (default: torch's choice)")
    args = parser.parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model = build_model(args)
    results = [compare(model, length, args.num_tokens, args.num_rounds, args.device) for length in args.window_length]
    print("| window_length | SinkCache, ms a token | DynamicCache, ms a token | ratio (spread) |\n|---|---|---|---|")
    for row in results:
        spread = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
        print(f"| {row['window_length']} | {row['sink_ms']:.2f} | {row['dynamic_ms']:.2f} | {spread} |")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(
        json.dumps(
            {"device": args.device, "dtype": args.dtype, "num_threads": torch.get_num_threads(), **versions, "results": results}
        )
    )


if __name__ == "__main__":
    main()
