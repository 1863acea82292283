"""What a token costs with a `SinkCache`, side by side with other ways to decode.

Four measurements (`--measure`), on a model of the Hub or on random weights of a known shape (`--preset`):

    decode   time of a step at a full window. All methods decode in turns, `--num-tokens` at a time, in an order that changes from
             round to round; the ratio of two methods is that of their turns in the same round, so what the machine does besides
             hits both.
    stream   time of a step by position in one long stream, the whole way through `generate` and in a loop of one's own; memory
             on the way.
    age      time of a step in streams of very different lengths, in turns, the whole way through `generate`.
    prefill  tokens a second of a prompt many windows long, by chunk length, and the ratio of its time a token to that of the
             first chunk of a `DynamicCache`, of the length at which that is fastest; and a pass over a full window against plain
             attention over as many keys.

Times are medians; spreads are quartiles. A step takes one token of each row of a batch: its time is what a token of a row takes,
and tokens a second count all rows. The lines of the table are appended to `--csv` as they are measured, and Ctrl-C keeps what
was: the exit status is 130 then. What can't run here is left out, with the reason.

    python scripts/benchmark.py --window-length 256 1024 4096 --csv results/benchmark.csv
    python scripts/benchmark.py --preset tiny --measure stream --stream-length 1000 10000 100000 --csv results/benchmark.csv
    python scripts/benchmark.py --model Qwen/Qwen3-0.6B --dtype bfloat16 --device cuda --measure decode prefill
"""

import argparse
import csv
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config

from baselines import (
    Decoder,
    DynamicDecoder,
    FrozenDecoder,
    NativeWindowDecoder,
    QuantizedDecoder,
    RecomputingDecoder,
    RerotatingDecoder,
    RotatingAtReadDecoder,
    Setup,
    StaticDecoder,
    compiled,
    fill,
    native_window_model,
    reader,
)
from common import DTYPES, add_model_arguments, count, describe_run, load_weights, rounded, storage_bytes
from custom_generate.generate import DEFAULT_NUM_SINK_TOKENS, SinkCache, generate
from custom_generate.releases import CACHE_NAME


def shape(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, vocab: int) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
    }


# Shapes of models with random weights. The small ones have a small vocabulary, so that what is measured is not the output layer.
PRESETS = {
    "tiny": (LlamaConfig, shape(64, 2, 2, 2, 32, 192, 2048)),
    "small": (LlamaConfig, shape(512, 8, 8, 8, 64, 1536, 2048)),
    "qwen3-0.6b": (Qwen3Config, shape(1024, 28, 16, 8, 128, 3072, 151936) | {"tie_word_embeddings": True}),
    "8b": (LlamaConfig, shape(4096, 32, 32, 8, 128, 14336, 128256)),
}
MEASURES = ("decode", "stream", "age", "prefill")
NUM_FIRST_CHUNKS = 20  # are fed in each round, and their median taken: one is over in an instant
NUM_WARMUP_TURNS = 2  # what is compiled may be compiled again on the second
STREAM_PROMPT_LENGTH = 8
BUCKETS_PER_DECADE = 8  # of positions in a stream
CSV_COLUMNS = (
    "date commit measure method reference model window_length num_sink_tokens batch_size position chunk_length num_keys "
    "ms_per_token ms_low ms_high tokens_per_second ratio ratio_low ratio_high bytes_held device_peak_bytes process_peak_bytes "
    "num_rounds torch transformers python device device_name dtype attention num_threads seed"
).split()
# What is printed of each measurement.
TABLE_COLUMNS = {
    "decode": "window_length batch_size method ms_per_token ratio MiB_held",
    "ratio": "window_length batch_size method reference ratio",
    "limit": "window_length batch_size method ms_per_token",
    "stream": "window_length batch_size method position ms_per_token tokens_per_second MiB_held",
    "age": "window_length batch_size position ms_per_token ratio MiB_held",
    "prefill": "window_length batch_size method chunk_length position tokens_per_second ratio MiB_held",
    "chunk": "window_length batch_size chunk_length num_keys ms_per_token ratio MiB_held",
}


# ---------------------------------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------------------------------


def sink_cache(model, setup: Setup, is_static: bool = False) -> SinkCache:
    return SinkCache.from_model(model, setup.window_length, setup.num_sink_tokens, static=is_static)


class SinkDecoder(Decoder):
    """`SinkCache`, in a loop of one's own."""

    def __init__(self, model, setup: Setup, is_static: bool = False, is_compiled: bool = False):
        self.cache = sink_cache(model, setup, is_static)
        rest, read = setup.prompt, reader(model, setup)
        while rest.shape[1]:
            length = min(rest.shape[1], self.cache.num_columns_at_once)
            read(**self.cache.prepare(rest[:, :length]), logits_to_keep=1)
            rest = rest[:, length:]
        self.model = compiled(model, setup.compile_mode) if is_compiled else model

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return self.model(**self.cache.prepare(token)).logits


# Name -> what decodes at a full window, in a loop of the benchmark.
DECODERS: dict[str, Callable] = {
    "sink": SinkDecoder,
    "sink-static": functools.partial(SinkDecoder, is_static=True),
    "sink-compiled": functools.partial(SinkDecoder, is_static=True, is_compiled=True),
    "dynamic": DynamicDecoder,
    "static": StaticDecoder,
    "static-compiled": functools.partial(StaticDecoder, is_compiled=True),
    "native-window": NativeWindowDecoder,
    "quantized-fp8": functools.partial(QuantizedDecoder, backend="fp8"),
    "quantized-quanto": functools.partial(QuantizedDecoder, backend="quanto"),
    "quantized-hqq": functools.partial(QuantizedDecoder, backend="hqq"),
    "rerotate": RerotatingDecoder,
    "rotate-at-read": RotatingAtReadDecoder,
    "recompute": RecomputingDecoder,
    "frozen": FrozenDecoder,
}


def stream_loop(method: str, model, setup: Setup, num_tokens: int, clock: "TokenClock") -> None:
    """The likeliest token, again and again. The prompt, too, goes step by step: what is compiled is compiled off the clock."""
    first, *others = columns(setup.prompt)
    decoder = DECODERS[method](model, replace(setup, prompt=first))
    *others, token = others
    for other in others:
        decoder.step(other)
    clock.cache = decoder.cache
    clock.put(setup.prompt)
    for _ in range(num_tokens):
        token = decoder.step(token).argmax(-1)
        clock.put(token.cpu())


def stream_sink_generate(model, setup: Setup, num_tokens: int, clock: "TokenClock", is_static: bool = False) -> None:
    clock.cache = sink_cache(model, setup, is_static)
    generate(setup.prompt, model=model, past_key_values=clock.cache, max_new_tokens=num_tokens, do_sample=False, streamer=clock)


def stream_own_generate(model, setup: Setup, num_tokens: int, clock: "TokenClock") -> None:
    clock.cache = DynamicCache(config=model.config)
    model.generate(setup.prompt, **{CACHE_NAME: clock.cache}, max_new_tokens=num_tokens, do_sample=False, streamer=clock)


def stream_native_window(model, setup: Setup, num_tokens: int, clock: "TokenClock") -> None:
    stream_own_generate(native_window_model(model, setup.window_length), setup, num_tokens, clock)


# Name -> what makes a stream: `generate`, or a loop over one of the decoders that go on without an end.
STREAMS: dict[str, Callable] = {
    "sink-generate": stream_sink_generate,
    "sink-static-generate": functools.partial(stream_sink_generate, is_static=True),
    "dynamic-generate": stream_own_generate,
    "native-window-generate": stream_native_window,
} | {
    method: functools.partial(stream_loop, method)
    for method in ("sink", "sink-static", "sink-compiled", "native-window", "rerotate", "rotate-at-read")
}
METHODS = [*DECODERS, *(method for method in STREAMS if method not in DECODERS)]
OUR_METHODS = ("sink", "sink-static", "sink-compiled")


# ---------------------------------------------------------------------------------------------------------------------
# How it is measured and written down
# ---------------------------------------------------------------------------------------------------------------------


class Report:
    """Rows of measurements: kept, appended to a CSV file at once, and printed as tables in the end."""

    def __init__(self, about: dict, path: Path | None):
        self.about, self.path = about, path
        self.rows: list[dict] = []
        self.left_out: dict[str, str] = {}
        if path is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(",".join(CSV_COLUMNS) + "\n", encoding="utf-8")

    def add(self, measure: str, method: str, **values) -> None:
        row = {"measure": measure, "method": method, **values, "process_peak_bytes": process_peak_bytes()}
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
                writer.writerow({name: rounded(value) for name, value in (self.about | row).items()})

    def leave_out(self, method: str, reason: object) -> None:
        """Say once why a method is not measured."""
        text = str(reason).strip().partition("\n")[0]
        reason = text if isinstance(reason, str | ValueError | ImportError) else f"{type(reason).__name__}: {text}"
        if self.left_out.get(method) != reason:
            tqdm.write(f"{method} is left out: {reason}", file=sys.stderr)
        self.left_out[method] = reason

    def print_tables(self) -> None:
        for measure, columns in TABLE_COLUMNS.items():
            rows = [row for row in self.rows if row["measure"] == measure and row.get("is_printed", True)]
            if rows:
                print(f"{measure}:\n\n| {columns.replace(' ', ' | ')} |\n{'|---' * len(columns.split())}|")
                for row in rows:
                    print("| " + " | ".join(cell(row, column) for column in columns.split()) + " |")
                print()


def cell(row: dict, column: str) -> str:
    """What a table shows; a spread behind its median."""
    if column == "MiB_held":
        return f"{row['bytes_held'] / 2**20:.2f}" if "bytes_held" in row else ""
    value = row.get(column, "")
    prefix = {"ms_per_token": "ms", "ratio": "ratio"}.get(column)
    if prefix and f"{prefix}_low" in row:
        return f"{value:.4g} ({row[f'{prefix}_low']:.4g}-{row[f'{prefix}_high']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spread(name: str, values: list[float], prefix: str | None = None) -> dict:
    """Median and quartiles, under the names of the columns."""
    prefix = prefix or name
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {name: statistics.median(values), f"{prefix}_low": low, f"{prefix}_high": high}


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return 1000 * (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def process_peak_bytes() -> int | None:
    """The most memory that the process ever had, not of one method: so it tells something where memory grows, in a stream."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class DevicePeak:
    """What a device would hold at the peak of some work if weights and one cache were all that it holds; None on a CPU."""

    def __init__(self, model):
        self.model, self.is_known = model, model.device.type == "cuda"

    def start(self) -> None:
        if self.is_known:
            torch.cuda.reset_peak_memory_stats(self.model.device)
            self.before = torch.cuda.memory_allocated(self.model.device)

    def bytes(self, num_bytes_held: int) -> int | None:
        if not self.is_known:
            return None
        extra = torch.cuda.max_memory_allocated(self.model.device) - self.before
        return storage_bytes(list(self.model.parameters())) + num_bytes_held + extra


class TokenClock:
    """A streamer that takes the time between tokens, in milliseconds. What it does at the edges of the buckets is not on the
    clock.

    Attributes:
        position: tokens so far, the prompt included.
        bucket: the time of each token since the last edge.
        total: the time of all tokens behind the prompt.
        cache: what those who measure look at.
    """

    def __init__(self, edges: list[int], on_edge: Callable[["TokenClock"], None], progress: tqdm):
        self.edges, self.on_edge, self.progress = set(edges), on_edge, progress
        self.position, self.bucket, self.total, self.cache = 0, [], 0.0, None

    def put(self, token_ids: torch.Tensor) -> None:
        if self.position == 0:  # the prompt
            self.position = token_ids.shape[1]
        else:
            self.position += 1
            self.bucket.append(1000 * (time.perf_counter() - self.last))
            self.total += self.bucket[-1]
        if self.position in self.edges:
            self.progress.update(self.position - self.progress.n)
            self.on_edge(self)
            self.bucket = []
        self.last = time.perf_counter()

    def end(self) -> None:
        """What `generate` calls at the end."""


def bucket_edges(lengths: list[int]) -> list[int]:
    """Where a stream is looked at: the lengths asked for, and between them so that logarithms are evenly spaced."""
    steps = (round(100 * 10 ** (step / BUCKETS_PER_DECADE)) for step in range(12 * BUCKETS_PER_DECADE))
    return sorted({*lengths, *(edge for edge in steps if edge < max(lengths))})


# ---------------------------------------------------------------------------------------------------------------------
# The measurements
# ---------------------------------------------------------------------------------------------------------------------


def random_ids(model, batch_size: int, num_tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, model.config.get_text_config().vocab_size, (batch_size, num_tokens), generator=generator).to(
        model.device
    )


def columns(ids: torch.Tensor) -> list[torch.Tensor]:
    """Each token by itself, `[batch, 1]`, in memory as a decoding loop has it: compiled code is made for certain strides."""
    return [column.clone()[:, None] for column in ids.unbind(1)]


def conditions(setup: Setup) -> dict:
    """The columns that say what a measurement is of."""
    return {
        "window_length": setup.window_length,
        "num_sink_tokens": setup.num_sink_tokens,
        "batch_size": len(setup.prompt),
    }


def decode_turn(decoder: Decoder, tokens: torch.Tensor) -> float:
    """Milliseconds a step."""
    turn = columns(tokens)[: decoder.max_turn_length]

    def steps() -> None:
        for token in turn:
            decoder.step(token)

    return milliseconds(steps, tokens.device) / len(turn)


def make_decoders(args, model, setup: Setup, tokens: torch.Tensor, report: Report) -> dict[str, Decoder]:
    """The decoders that can run, warm."""
    decoders = {}
    for name in (name for name in args.methods if name in DECODERS):
        if name == "recompute" and setup.window_length > args.max_recompute_length:
            report.leave_out(name, f"windows longer than --max-recompute-length {args.max_recompute_length}")
            continue
        try:
            decoder = DECODERS[name](model, setup)
            for _ in range(NUM_WARMUP_TURNS):
                decode_turn(decoder, tokens)
                decoder.rewind()
        except Exception as error:  # of any library that a method needs, and each method has its own
            report.leave_out(name, error)
        else:
            decoders[name] = decoder
    return decoders


def measure_decode(args, model, window_length: int, batch_size: int, report: Report) -> None:
    torch.compiler.reset()
    prompt = random_ids(model, batch_size, window_length, args.seed)
    is_random = window_length > args.max_fill_length
    setup = Setup(window_length, args.num_sink_tokens, prompt, args.num_tokens, args.compile_mode, is_random)
    tokens = random_ids(model, batch_size, args.num_tokens, args.seed + 1)
    decoders = make_decoders(args, model, setup, tokens, report)
    turns: dict[str, list[float]] = {name: [] for name in decoders}  # milliseconds a step
    memory: dict[str, dict] = {}
    peak = DevicePeak(model)
    progress = tqdm(range(args.num_rounds), desc=f"decode, window {window_length}, batch {batch_size}", file=sys.stderr)
    try:
        for number in progress:
            first = number % max(len(decoders), 1)
            order = [*decoders][first:] + [*decoders][:first]
            for name in order[:: 1 if number % 2 else -1]:
                peak.start()
                turns[name].append(decode_turn(decoders[name], tokens))
                held = decoders[name].num_bytes_held
                memory[name] = {"bytes_held": held, "device_peak_bytes": peak.bytes(held)}
                decoders[name].rewind()
    finally:  # also of the rounds before an interruption
        if all(turns.values()):
            report_decode(args, setup, turns, memory, report)
    if args.limits:
        for name, value in hardware_limits(args, model, window_length, batch_size).items():
            report.add("limit", name, **conditions(setup), ms_per_token=value)


def report_decode(args, setup: Setup, turns: dict[str, list[float]], memory: dict[str, dict], report: Report) -> None:
    def ratios(name: str, reference: str) -> dict:
        if reference not in turns:
            return {}
        return {"reference": reference, **spread("ratio", [one / other for one, other in zip(turns[name], turns[reference])])}

    about = {**conditions(setup), "num_rounds": min(map(len, turns.values()), default=0)}
    for name in turns:
        step = spread("ms_per_token", turns[name], "ms")
        rate = 1000 * len(setup.prompt) / step["ms_per_token"]
        report.add("decode", name, **about, **step, tokens_per_second=rate, **ratios(name, args.reference), **memory[name])
    for ours in (name for name in turns if name in OUR_METHODS):
        for other in (name for name in turns if name != ours):
            report.add("ratio", ours, **about, **ratios(ours, other))


def hardware_limits(args, model, window_length: int, batch_size: int) -> dict[str, float]:
    """Milliseconds that a step takes at least: to move its bytes, and to do its multiplications and additions.

    The bytes are the weights, but for the table of embeddings, of which a row is read, and the keys and values of the window.
    """
    config, embeddings = model.config.get_text_config(), model.get_input_embeddings().weight
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    is_tied = model.get_output_embeddings().weight is embeddings
    num_weights = sum(weight.numel() for weight in model.parameters()) - (0 if is_tied else embeddings.numel())
    num_states = 2 * config.num_hidden_layers * num_key_value_heads * head_dim * window_length * batch_size
    num_scores = config.num_hidden_layers * config.num_attention_heads * window_length * batch_size
    num_bytes = (num_weights + num_states) * embeddings.element_size()
    num_operations = 2 * num_weights * batch_size + 4 * num_scores * head_dim
    bandwidth = args.bandwidth * 1e9 if args.bandwidth else measured_bandwidth(model.device)
    rate = measured_rate(model.device, model.dtype)
    return {"bytes to move": 1000 * num_bytes / bandwidth, "operations": 1000 * num_operations / rate}


@functools.cache
def measured_bandwidth(device: torch.device, num_bytes: int = 2**28) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * num_bytes / min(milliseconds(lambda: target.copy_(source), device) for _ in range(10)) * 1000


@functools.cache
def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)  # zeros would take less power, and so less time
    return 2 * size**3 / min(milliseconds(lambda: matrix @ matrix, device) for _ in range(10)) * 1000


def measure_stream(args, model, window_length: int, batch_size: int, report: Report) -> None:
    prompt = random_ids(model, batch_size, STREAM_PROMPT_LENGTH, args.seed)
    setup = Setup(window_length, args.num_sink_tokens, prompt, compile_mode=args.compile_mode)
    peak = DevicePeak(model)
    for name in (name for name in args.methods if name in STREAMS):
        length = min(max(args.stream_length), args.max_dynamic_length if name == "dynamic-generate" else sys.maxsize)

        def on_edge(clock: TokenClock) -> None:
            report.add(
                "stream",
                name,
                **conditions(setup),
                position=clock.position,
                **spread("ms_per_token", clock.bucket, "ms"),
                tokens_per_second=1000 * batch_size * (clock.position - STREAM_PROMPT_LENGTH) / clock.total,
                bytes_held=storage_bytes(clock.cache),
                device_peak_bytes=peak.bytes(0),  # the cache was made after the start, and is counted with the rest
                is_printed=clock.position in (*args.stream_length, length),
            )

        torch.compiler.reset()
        peak.start()
        with tqdm(total=length, desc=f"stream, window {window_length}, {name}", unit="token", file=sys.stderr) as progress:
            clock = TokenClock([*bucket_edges(args.stream_length), length], on_edge, progress)
            try:
                STREAMS[name](model, setup, length - STREAM_PROMPT_LENGTH, clock)
            except Exception as error:
                report.leave_out(name, error)


def measure_age(args, model, window_length: int, batch_size: int, report: Report) -> None:
    """Streams that have read prompts of these lengths go on in turns. The passes that begin and end a turn are off the clock."""
    options = {"model": model, "do_sample": False, "return_dict_in_generate": True}
    streams, turns, ages = {}, {}, sorted(args.age)
    for age in tqdm(ages, desc=f"age, window {window_length}, prompts", file=sys.stderr):
        prompt = random_ids(model, batch_size, age, args.seed)
        numbers = {"window_length": window_length, "num_sink_tokens": args.num_sink_tokens}
        streams[age], turns[age] = generate(prompt, max_new_tokens=1, **numbers, **options), []
    progress = tqdm(range(args.num_rounds + 1), desc=f"age, window {window_length}, batch {batch_size}", file=sys.stderr)
    for number in progress:
        for age in ages[:: 1 if number % 2 else -1]:
            clock = TokenClock([], lambda clock: None, progress)
            text, cache = streams[age].sequences, streams[age].past_key_values
            streams[age] = generate(text, past_key_values=cache, max_new_tokens=args.num_tokens + 1, streamer=clock, **options)
            if number > 0:  # the first warms up
                turns[age].append(statistics.median(clock.bucket[1:]))
    for age in ages:
        ratios = spread("ratio", [one / other for one, other in zip(turns[age], turns[ages[0]])])
        about = {**conditions(Setup(window_length, args.num_sink_tokens, text)), "num_rounds": args.num_rounds}
        held = storage_bytes(streams[age].past_key_values)
        step = spread("ms_per_token", turns[age], "ms")
        report.add("age", "sink-generate", **about, position=age, reference=str(ages[0]), bytes_held=held, **step, **ratios)


def measure_prefill(args, model, window_length: int, batch_size: int, report: Report) -> None:
    """Prompts, fed in chunks: to a `SinkCache` as `generate` does it, and to a `DynamicCache` by hand."""
    prompt = random_ids(model, batch_size, args.prefill_windows * window_length, args.seed)
    setup = Setup(window_length, args.num_sink_tokens, prompt)
    chunk_lengths = [length for length in args.chunk_length if length <= window_length]
    milliseconds_taken: dict[tuple, list[float]] = {}  # by method, chunk length and position
    held: dict[tuple, int] = {}

    def note(taken: float, cache, *key) -> None:
        milliseconds_taken.setdefault(key, []).append(taken)
        held[key] = storage_bytes(cache)

    def feed_sink(chunk_length: int | None) -> None:
        cache = sink_cache(model, setup)
        options = {"past_key_values": cache, "prefill_chunk_size": chunk_length, "max_new_tokens": 1, "do_sample": False}
        taken = milliseconds(
            lambda: generate(prompt, model=model, **options), model.device
        )  # with the first token, one of thousands
        note(taken, cache, "sink", chunk_length or "default", prompt.shape[1])

    def feed_first(chunk_length: int) -> None:
        times = []
        for _ in range(NUM_FIRST_CHUNKS):
            cache = DynamicCache(config=model.config)
            feed_chunk = functools.partial(model, prompt[:, :chunk_length], **{CACHE_NAME: cache}, logits_to_keep=1)
            times.append(milliseconds(feed_chunk, model.device))
        note(statistics.median(times), cache, "dynamic", chunk_length, chunk_length)

    def feed_dynamic(chunk_length: int) -> None:
        cache, taken = DynamicCache(config=model.config), 0.0
        length = max(min(prompt.shape[1], args.max_dynamic_length) // chunk_length, 1) * chunk_length
        for chunk in prompt[:, :length].split(chunk_length, dim=1):
            taken += milliseconds(lambda: model(chunk, **{CACHE_NAME: cache}, logits_to_keep=1), model.device)
        note(taken, cache, "dynamic", chunk_length, length)

    feeds = [functools.partial(feed_sink, length) for length in (None, *chunk_lengths) if "sink" in args.methods]
    for length in chunk_lengths if "dynamic" in args.methods else ():
        feeds += [functools.partial(feed_first, length), functools.partial(feed_dynamic, length)]
    for feed in tqdm(feeds * args.prefill_rounds, desc=f"prefill, window {window_length}, batch {batch_size}", file=sys.stderr):
        feed()
    report_prefill(args, setup, milliseconds_taken, held, report)
    if {"sink", "dynamic"} <= set(args.methods):
        for chunk_length in chunk_lengths:
            measure_chunk(args, model, window_length, batch_size, chunk_length, report)


def report_prefill(args, setup: Setup, milliseconds_taken: dict, held: dict[tuple, int], report: Report) -> None:
    """Times by method, chunk length and position, each beside the fastest first chunk of a `DynamicCache`."""
    per_token = {key: [each / key[-1] for each in taken] for key, taken in milliseconds_taken.items()}
    first_chunks = [key for key in per_token if key[0] == "dynamic" and key[1] == key[2]]
    best = min(first_chunks, key=lambda key: statistics.median(per_token[key]), default=None)
    for (method, chunk_length, position), taken in per_token.items():
        ratio = {}
        if best is not None:
            ratio = {"reference": f"dynamic, first chunk of {best[1]}"}
            ratio |= spread("ratio", [one / other for one, other in zip(taken, per_token[best])])
        step = spread("ms_per_token", taken, "ms")
        report.add(
            "prefill",
            method,
            **conditions(setup),
            chunk_length=chunk_length,
            position=position,
            **step,
            **ratio,
            tokens_per_second=1000 * len(setup.prompt) / step["ms_per_token"],
            bytes_held=held[method, chunk_length, position],
            num_rounds=args.prefill_rounds,
        )


def measure_chunk(args, model, window_length: int, batch_size: int, chunk_length: int, report: Report) -> None:
    """A pass of several tokens over a full window, and one over a `DynamicCache` that hands out as many keys."""
    setup = Setup(window_length, args.num_sink_tokens, random_ids(model, batch_size, window_length, args.seed))
    chunk = random_ids(model, batch_size, chunk_length, args.seed + 1)
    sink = SinkDecoder(model, setup).cache
    inputs = sink.prepare(chunk)
    num_keys = sink.get_mask_sizes(chunk_length)[0]
    model(**inputs, logits_to_keep=1)
    dynamic = DynamicCache(config=model.config)
    fill(model, dynamic, replace(setup, prompt=random_ids(model, batch_size, num_keys - chunk_length, args.seed)))
    passes = {
        "sink": lambda: model(**sink.prepare(chunk), logits_to_keep=1),
        "dynamic": lambda: model(chunk, **{CACHE_NAME: dynamic}, logits_to_keep=1),
    }
    times: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(1 + args.num_rounds):
        for name in [*passes][:: 1 if number % 2 else -1]:
            taken = milliseconds(passes[name], model.device)
            if number > 0:  # the first warms up
                times[name].append(taken / chunk_length)
        dynamic.crop(-chunk_length)
    report.add(
        "chunk",
        "sink",
        **conditions(setup),
        reference="dynamic",
        chunk_length=chunk_length,
        num_keys=num_keys,
        **spread("ms_per_token", times["sink"], "ms"),
        **spread("ratio", [ours / theirs for ours, theirs in zip(times["sink"], times["dynamic"])]),
        bytes_held=storage_bytes(sink),
        num_rounds=args.num_rounds,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def build_model(args):
    """The model that the arguments name, or random weights of the preset's shape."""
    if args.model is not None:
        model = load_weights(args)
    else:
        torch.manual_seed(args.seed)
        config_class, sizes = PRESETS[args.preset]
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(config_class(**sizes), dtype=DTYPES[args.dtype])
    for name in ("eos_token_id", "pad_token_id"):  # a stream goes on, and has no padding
        setattr(model.generation_config, name, None)
    return model.eval()


def describe(args, model) -> dict:
    """What all rows of a run have in common."""
    about = {"model": args.model or args.preset, "attention": model.config._attn_implementation, "seed": args.seed}
    return describe_run(args) | about


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(model=None)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="shape of random weights, without --model (default: %(default)s)")
    add("--measure", nargs="+", choices=MEASURES, default=["decode"], help="(default: decode)")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=METHODS,
        metavar="METHOD",
        help=f"any of {', '.join(METHODS)} (default: all)",
    )
    add(
        "--reference",
        choices=DECODERS,
        default="dynamic",
        metavar="METHOD",
        help="of the ratios in decode (default: %(default)s)",
    )
    add("--window-length", type=count, nargs="+", default=[256, 1024, 4096, 8192], help="(default: 256 1024 4096 8192)")
    add("--num-sink-tokens", type=int, default=DEFAULT_NUM_SINK_TOKENS, help="(default: %(default)s)")
    add("--batch-size", type=count, nargs="+", default=[1], help="(default: 1)")
    add("--num-tokens", type=count, default=32, help="decoded in one turn (default: %(default)s)")
    add("--num-rounds", type=count, default=15, help="turns of each method (default: %(default)s)")
    add(
        "--max-fill-length", type=count, default=8192, help="longer windows are filled with random numbers (default: %(default)s)"
    )
    add("--max-recompute-length", type=count, default=4096, help="longest window that is recomputed (default: %(default)s)")
    add(
        "--stream-length",
        type=count,
        nargs="+",
        default=[1000, 10000],
        help="positions looked at, besides those between (default: 1000 10000)",
    )
    add("--age", type=count, nargs="+", default=[1000, 100000, 1000000], help="tokens read before (default: 1000 100000 1000000)")
    add("--max-dynamic-length", type=count, default=20000, help="most tokens in a cache that grows (default: %(default)s)")
    add("--prefill-windows", type=count, default=64, help="length of a prompt, in windows (default: %(default)s)")
    add("--prefill-rounds", type=count, default=3, help="prompts of each kind (default: %(default)s)")
    add("--chunk-length", type=count, nargs="+", default=[32, 64, 128, 256, 512],
        help="of prefill; those longer than a window are left out there (default: 32 64 128 256 512)")  # fmt: skip
    add("--compile-mode", help="of torch.compile (default: reduce-overhead on a GPU, else default)")
    add("--limits", action=argparse.BooleanOptionalAction, help="what the hardware allows at best (default: on a GPU)")
    add("--bandwidth", type=float, help="of the device's memory, GB/s (default: measured by a copy)")
    add("--num-threads", type=count, help="of torch on a CPU (default: torch's choice)")
    add("--seed", type=int, default=0, help="of weights and tokens (default: %(default)s)")
    add("--csv", type=Path, help="also append the rows to this file")
    args = parser.parse_args()

    on_gpu = args.device.startswith("cuda")
    args.compile_mode = args.compile_mode or ("reduce-overhead" if on_gpu else "default")
    args.limits = on_gpu if args.limits is None else args.limits
    shortest = min(args.window_length)
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU here. Take cpu, or install a build of torch with CUDA.")
    if args.csv and args.csv.exists() and args.csv.open(encoding="utf-8").readline().strip().split(",") != CSV_COLUMNS:
        parser.error(f"--csv {args.csv} has other columns than this benchmark writes. Remove it first, or write to another file.")
    if not 0 <= args.num_sink_tokens < shortest - 1:
        parser.error(
            f"--num-sink-tokens {args.num_sink_tokens} leaves no recent tokens in --window-length {shortest}. Take fewer."
        )
    if "decode" in args.measure and args.num_tokens >= shortest:
        parser.error(f"--num-tokens {args.num_tokens}: a turn must be shorter than --window-length {shortest}. Take fewer.")
    if "stream" in args.measure and min(args.stream_length) <= STREAM_PROMPT_LENGTH:
        parser.error(f"--stream-length {min(args.stream_length)} must be more than the prompt of {STREAM_PROMPT_LENGTH} tokens.")
    return args


@torch.no_grad()
def measure_all(args, model, report: Report) -> None:
    measurements = {"decode": measure_decode, "stream": measure_stream, "age": measure_age, "prefill": measure_prefill}
    for measure in args.measure:
        for window_length in args.window_length:
            for batch_size in args.batch_size:
                measurements[measure](args, model, window_length, batch_size, report)


def main() -> None:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()  # "exceeded the model's maximum length": that is what is measured here
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model = build_model(args)
    report = Report(describe(args, model), args.csv)
    is_interrupted = False
    try:
        measure_all(args, model, report)
    except KeyboardInterrupt:
        is_interrupted = True
        print("Interrupted: what follows was measured before.", file=sys.stderr)
    report.print_tables()
    rows = [{name: rounded(value) for name, value in row.items() if name in CSV_COLUMNS} for row in report.rows]
    print(json.dumps({**report.about, "interrupted": is_interrupted, "left_out": report.left_out, "results": rows}))
    sys.exit(130 if is_interrupted else 0)


if __name__ == "__main__":
    main()
