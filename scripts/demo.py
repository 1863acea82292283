"""Watch a model write far past its window, with a cache that does not grow.

The text comes as it is made; what was held, what a full cache would have held, and the speed at the start and at the end come
after it. The last line is one JSON document.

    python scripts/demo.py
    python scripts/demo.py --model Qwen/Qwen3-0.6B --prompt "Once upon a time" --window-length 1024 --max-new-tokens 20000
"""

import argparse
import json
import statistics
import sys
import time

import torch
import transformers
from transformers import TextStreamer

from common import ROOT, add_model_arguments, load_model
from custom_generate.generate import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH

PROMPT = '"""Read and write configuration files."""\n\nimport os\nimport sys\n\n\nclass Parser:\n    """'
# Tokens over which the speed is taken, at the start (once the window is full, if it gets full) and at the end.
NUM_TIMED_TOKENS = 256


class TimedStreamer(TextStreamer):
    """Prints text as it comes, and notes when each token came."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)


def tokens_per_second(times: list[float]) -> float:
    """From the median time a token: one hiccup of the machine does not count."""
    return 1 / statistics.median(after - before for before, after in zip(times, times[1:]))


def full_cache_bytes(cache) -> int:
    """What keys and values of all tokens seen would take."""
    per_token = sum(
        states.shape[1] * states.shape[3] * states.element_size()
        for layer in cache.stream.layers.values()
        for states in (layer.keys, layer.values)
    )
    return per_token * cache.batch_size * cache.num_tokens_seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default=PROMPT, help="text to go on from (default: the head of a Python module)")
    source.add_argument("--prompt-file", help="file with the text to go on from; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=2000, help="tokens to write (default: %(default)s)")
    parser.add_argument("--window-length", type=int, default=DEFAULT_WINDOW_LENGTH, help="tokens held (default: %(default)s)")
    parser.add_argument(
        "--num-sink-tokens", type=int, default=DEFAULT_NUM_SINK_TOKENS, help="first tokens that stay (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of sampling; 0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()  # "exceeded the model's maximum length": that is what is shown here
    prompt = args.prompt
    if args.prompt_file:
        prompt = sys.stdin.read() if args.prompt_file == "-" else open(args.prompt_file, encoding="utf-8").read()
    model, tokenizer = load_model(args)
    inputs = tokenizer(prompt, return_tensors="pt").to(args.device)
    streamer = TimedStreamer(tokenizer)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 40} if args.temperature > 0 else {"do_sample": False}
    torch.manual_seed(args.seed)
    outputs = model.generate(
        **inputs,
        custom_generate=str(ROOT),
        trust_remote_code=True,
        window_length=args.window_length,
        num_sink_tokens=args.num_sink_tokens,
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.max_new_tokens,  # a text that the model would end goes on with another one
        streamer=streamer,
        return_dict_in_generate=True,
        **sampling,
    )

    cache, times = outputs.past_key_values, streamer.times[1:]
    start = max(0, min(args.window_length - inputs.input_ids.shape[1], len(times) - 2 * NUM_TIMED_TOKENS))
    result = {
        "model": args.model,
        "device": args.device,
        "dtype": args.dtype,
        "window_length": cache.window_length,
        "num_sink_tokens": cache.num_sink_tokens,
        "prompt_tokens": inputs.input_ids.shape[1],
        "new_tokens": outputs.sequences.shape[1] - inputs.input_ids.shape[1],
        "tokens_seen": cache.num_tokens_seen,
        "tokens_held": cache.num_tokens_held,
        "bytes_held": cache.num_bytes_held,
        "full_cache_bytes": full_cache_bytes(cache),
    }
    if len(times) > 2:
        result["tokens_per_second_start"] = round(tokens_per_second(times[start : start + NUM_TIMED_TOKENS]), 1)
        result["tokens_per_second_end"] = round(tokens_per_second(times[-NUM_TIMED_TOKENS:]), 1)
    print(f"\n\n{cache.num_tokens_seen:,} tokens seen, {cache.num_tokens_held:,} held in {cache.num_bytes_held / 2**20:.2f} MiB.")
    print(f"A full cache would hold {result['full_cache_bytes'] / 2**20:.2f} MiB by now, and more with each token.")
    if len(times) > 2:
        print(f"Tokens a second: {result['tokens_per_second_start']} at the start, {result['tokens_per_second_end']} at the end.")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
