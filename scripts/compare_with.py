"""The code of the working tree beside that of another commit, in one process: time, logits, and calls of Python functions.

The other commit may hold a single file or modules. Both read the same tokens with the same model. Time is measured in short
blocks in turns, in an order that changes from round to round, so what the machine does besides hits both; a ratio is that of two
blocks of one round (below 1: the working tree is faster), and the table shows medians and quartiles of ratios. Four measurements:

    decode     a step at a full window, in a loop of one's own
    compiled   the same with a static window and a compiled model
    prefill    a prompt of many windows, through `generate`
    generate   text from the first token on, through `generate`, until the window is full and past it

`--logits` compares logits instead: for seven families of models, batches of rows of different lengths, and chunks over every edge
of the window; the largest difference is told in standard deviations of the logits. `--calls` counts the calls into each code that
one token of a model of four layers takes. Exit status 1 where logits differ by more than 1e-4. The last line is one JSON
document.

    python scripts/compare_with.py 925a8cd
    python scripts/compare_with.py 925a8cd --measure decode --window-length 256 --num-rounds 40
    python scripts/compare_with.py HEAD --logits --calls
"""

import argparse
import functools
import importlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import torch
import transformers
from tqdm import tqdm

from benchmark import PRESETS, build_model, columns, milliseconds, random_ids, spread
from common import DTYPES, ROOT, count, describe_run, rounded
from custom_generate import generate as working_tree

FOLDER = "custom_generate"
MEASURES = ("decode", "compiled", "prefill", "generate")
NUM_WARMUP_ROUNDS = 2  # what is compiled may be compiled again on the second
# Pairs of halves, native windows, layers of two kinds, partial and interleaved rotations, latent attention, biases by order.
FAMILIES = ("llama", "qwen2-half-sliding", "gemma3", "gpt-neox", "cohere", "deepseek-v3", "bloom")
WINDOW_LENGTH, NUM_SINK_TOKENS = 16, 4  # of logits and calls
NUM_COUNTED = 32  # tokens whose calls are counted
MAX_LOGIT_DIFFERENCE = 1e-4


def code_of(revision: str, folder: Path) -> ModuleType:
    """generate.py of another commit, imported from a copy in the folder."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"{revision}: {done.stderr.strip()}")
        return done.stdout

    package = folder / "code_of_another_commit"
    package.mkdir()
    for path in git("ls-tree", "--name-only", f"{revision}:{FOLDER}").split():
        if path.endswith(".py"):
            (package / path).write_text(git("show", f"{revision}:{FOLDER}/{path}"), encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module(f"{package.name}.generate")


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


class Decoding:
    """Steps at a full window: one cache for each code, which goes on from block to block."""

    def __init__(self, code: ModuleType, model, args, window_length: int, is_compiled: bool):
        self.cache = code.SinkCache.from_model(model, window_length, args.num_sink_tokens, static=is_compiled)
        prompt = random_ids(model, args.batch_size, window_length, args.seed)
        while prompt.shape[1]:
            length = min(prompt.shape[1], self.cache.num_columns_at_once)
            model(**self.cache.prepare(prompt[:, :length]))
            prompt = prompt[:, length:]
        self.model = torch.compile(model) if is_compiled else model
        self.tokens = columns(random_ids(model, args.batch_size, args.num_tokens, args.seed + 1))

    def block(self) -> float:
        def steps() -> None:
            for token in self.tokens:
                self.model(**self.cache.prepare(token))

        return milliseconds(steps, self.tokens[0].device) / len(self.tokens)


class Generating:
    """Whole calls of `generate`, each with a new cache."""

    def __init__(self, code: ModuleType, model, args, window_length: int, prompt_length: int, num_new_tokens: int):
        self.code, self.model, self.num_tokens = code, model, prompt_length + num_new_tokens
        self.prompt = random_ids(model, args.batch_size, prompt_length, args.seed)
        self.options = {"window_length": window_length, "num_sink_tokens": args.num_sink_tokens, "do_sample": False}
        self.options |= {"max_new_tokens": num_new_tokens, "min_new_tokens": num_new_tokens}

    def block(self) -> float:
        def call() -> None:
            self.code.generate(self.prompt, model=self.model, **self.options)

        return milliseconds(call, self.prompt.device) / self.num_tokens


def side_by_side(codes: dict[str, ModuleType], model, args, measure: str, window_length: int) -> dict:
    """One row of the table."""
    torch.compiler.reset()
    sides = {}
    for name, code in codes.items():
        if measure in ("decode", "compiled"):
            sides[name] = Decoding(code, model, args, window_length, measure == "compiled")
        elif measure == "prefill":
            sides[name] = Generating(code, model, args, window_length, args.prefill_windows * window_length, 1)
        else:
            sides[name] = Generating(code, model, args, window_length, 8, window_length + args.num_tokens)
    blocks: dict[str, list[float]] = {name: [] for name in sides}
    for number in tqdm(range(NUM_WARMUP_ROUNDS + args.num_rounds), desc=f"{measure}, window {window_length}", file=sys.stderr):
        for name in [*sides][:: 1 if number % 2 else -1]:
            taken = sides[name].block()
            if number >= NUM_WARMUP_ROUNDS:
                blocks[name].append(taken)
    ours, theirs = blocks.values()
    row = {"measure": measure, "window_length": window_length}
    row |= {f"{name}_ms": rounded(spread("ms", taken)["ms"]) for name, taken in blocks.items()}
    ratios = spread("ratio", [one / other for one, other in zip(ours, theirs)])
    return row | {name: rounded(value) for name, value in ratios.items()}


def print_heading() -> None:
    print("| measurement | window_length | working tree, ms a token | other | ratio (quartiles) |")
    print("|---|---|---|---|---|", flush=True)


def print_row(row: dict) -> None:
    ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})"
    print(f"| {row['measure']} | {row['window_length']} | {row['ours_ms']:.4g} | {row['other_ms']:.4g} | {ratio} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Logits and calls
# ---------------------------------------------------------------------------------------------------------------------


def from_tests(name: str) -> ModuleType:
    """A module of tests/."""
    sys.path.append(str(ROOT / "tests"))
    return importlib.import_module(name)


def feed(code: ModuleType, model, ids: torch.Tensor, mask: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of a batch that is fed in passes of these sizes, or of less where the window takes no more at once."""
    cache, logits, rest = code.SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS), [], [*sizes]
    start = 0
    while rest:
        size = min(rest[0], cache.num_columns_at_once)
        logits.append(model(**cache.prepare(ids[:, start : start + size], mask[:, start : start + size])).logits)
        start += size
        rest = [rest[0] - size, *rest[1:]] if size < rest[0] else rest[1:]
    return torch.cat(logits, dim=1)


@torch.no_grad()
def difference_of_logits(codes: dict[str, ModuleType], family: str) -> float:
    """The largest one, in standard deviations, over all places at which a pass can end near an edge of the window."""
    families, checks = from_tests("families"), from_tests("checks")
    model = families.build_model(family, "eager" if family in families.EAGER_ONLY else "sdpa")
    worst = 0.0
    for edge in range(1, 2 * WINDOW_LENGTH + 3):
        lengths = (3 * WINDOW_LENGTH, 3 * WINDOW_LENGTH - 7, 2 * WINDOW_LENGTH + 1)
        ids, mask = checks.left_padded([checks.random_ids(length, seed=length) for length in lengths])
        left = ids.shape[1] - edge
        sizes = [edge, *(size for size in (5, 1, 1, 7) if size <= left)]
        sizes += [1] * (ids.shape[1] - sum(sizes))
        ours, theirs = (feed(code, model, ids, mask, sizes)[mask.bool()] for code in codes.values())
        worst = max(worst, ((ours - theirs).abs().max() / theirs.std()).item())
    return worst


def functions_called(work, folder: str) -> Counter:
    """How often each function of the files in a folder is called; generators, and comprehensions before Python 3.12, are some."""
    called: Counter = Counter()

    def note(frame, event, _) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder):
            called[f"{Path(code.co_filename).stem}.{code.co_qualname if hasattr(code, 'co_qualname') else code.co_name}"] += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


@torch.no_grad()
def calls_for_a_token(code: ModuleType) -> dict[str, Counter]:
    """Of a model of four layers past its window. In a loop of one's own: of the token in the middle, when they are sorted by
    their number of calls, for now and then a token takes more (all positions are lowered). Through `generate`: the mean of those
    beyond the first."""
    model = from_tests("families").build_model("llama", "sdpa", num_hidden_layers=4)
    cache = code.SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    tokens = from_tests("checks").random_ids(NUM_COUNTED + 2 * WINDOW_LENGTH).split(1, dim=1)
    folder = str(Path(code.__file__).parent)

    def step(token: torch.Tensor) -> None:
        model(**cache.prepare(token))

    for token in tokens[:-NUM_COUNTED]:
        step(token)
    steps = sorted(
        (functions_called(functools.partial(step, token), folder) for token in tokens[-NUM_COUNTED:]), key=Counter.total
    )

    def through_generate(num_tokens: int) -> Counter:
        options = {"window_length": WINDOW_LENGTH, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        return functions_called(lambda: code.generate(torch.cat(tokens, dim=1), model=model, **options), folder)

    through_generate(2)  # the first call may look more at the model
    longer = through_generate(2 + NUM_COUNTED)
    longer.subtract(through_generate(2))
    return {
        "own loop": steps[NUM_COUNTED // 2],
        "generate": Counter({name: num / NUM_COUNTED for name, num in longer.items() if num}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("revision", metavar="REV", help="commit, branch or tag of this repository with which the working tree is compared")
    add("--measure", nargs="+", choices=MEASURES, help="(default: all, or none with --logits or --calls)")
    add("--logits", action="store_true", help="compare logits: about two minutes")
    add("--calls", action="store_true", help="count calls")
    add("--window-length", type=count, nargs="+", default=[256, 1024, 4096], help="(default: 256 1024 4096)")
    add("--num-sink-tokens", type=int, default=working_tree.DEFAULT_NUM_SINK_TOKENS, help="(default: %(default)s)")
    add("--batch-size", type=count, default=1, help="(default: %(default)s)")
    add("--num-tokens", type=count, default=32, help="decoded in one block (default: %(default)s)")
    add("--num-rounds", type=count, default=15, help="blocks of each code (default: %(default)s)")
    add("--prefill-windows", type=count, default=8, help="length of the prompt of prefill, in windows (default: %(default)s)")
    add("--preset", choices=PRESETS, default="small", help="shape of the model, with random weights (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and cache (default: %(default)s)")
    add("--num-threads", type=count, help="of torch on a CPU (default: torch's choice)")
    add("--seed", type=int, default=0, help="of weights and tokens (default: %(default)s)")
    args = parser.parse_args()
    args.model = None
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as folder:
        codes = {"ours": working_tree, "other": code_of(args.revision, Path(folder))}
        result = describe_run(args) | {"revision": args.revision}
        measures = args.measure or (() if args.logits or args.calls else MEASURES)
        if measures:
            model, result["times"] = build_model(args), []
            print_heading()
            for measure, window_length in itertools.product(measures, args.window_length):
                with torch.no_grad():
                    row = side_by_side(codes, model, args, measure, window_length)
                print_row(row)
                result["times"].append(row)
        if args.logits:
            families = tqdm(FAMILIES, desc="logits", file=sys.stderr)
            result["logits"] = {family: rounded(difference_of_logits(codes, family)) for family in families}
            print("\n".join(f"{family:20} {difference:.2g}" for family, difference in result["logits"].items()))
        if args.calls:
            calls = {name: calls_for_a_token(code) for name, code in codes.items()}
            for name, of_code in calls.items():
                for way, called in of_code.items():
                    most = ", ".join(f"{function} {num:.3g}" for function, num in called.most_common(8))
                    print(f"{name}, {way}: {called.total():.3g} calls; {most}")
            result["calls"] = {
                name: {way: rounded(called.total()) for way, called in each.items()} for name, each in calls.items()
            }
    print(json.dumps(result))
    sys.exit(max(result.get("logits", {"": 0.0}).values()) > MAX_LOGIT_DIFFERENCE)


if __name__ == "__main__":
    main()
