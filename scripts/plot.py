"""The figures of the README and of docs/: of what was measured, from CSV files; and of what a small cache keeps, from its code.

Of speed (scripts/benchmark.py), every point is a row of the file, a median, in a band from quartile to quartile. Of text
(scripts/evaluate.py, scripts/stream_eval.py), every row is drawn, and what is smoothed lies on top of it. Rows of different
models, devices, batches and so on go to a figure each; where a row was measured more than once, the last one counts.

    python scripts/evaluate.py
    python scripts/stream_eval.py
    python scripts/plot.py
    python scripts/plot.py --figures time_by_window --results-dir results --output-dir figures
    python scripts/plot.py --figures kept      the picture of what is kept, for which nothing has to be measured
    python scripts/plot.py --write             and the table of speed into its page
"""

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Callable
from math import exp
from pathlib import Path
from statistics import mean, median

import torch
from tqdm import tqdm

from common import ROOT, add_block_arguments, check_or_write_block
from custom_generate.window import Window

Row = dict[str, str]

# Colors that stay apart for the color-blind, and in gray.
SINK, RECENT, EVICTED, FULL_COLOR, INK = "#D55E00", "#56B4E9", "#E9E9E9", "#444444", "#222222"
# The window of the drawing of what is kept: small, so that each token can be seen.
KEPT = "kept"
DRAWN_WINDOW, DRAWN_SINKS, DRAWN_TOKENS = 8, 2, 16

# Method -> color, line and label. Methods of a kind share a color, and a label stands at each line.
BLUE, GREEN, PURPLE, ORANGE, GRAY = "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#8C8C8C"
SOLID, DASHED, DOTTED = "-", (0, (5, 2)), (0, (1, 1.5))
METHOD_STYLES = {
    "sink": (SINK, SOLID, "SinkCache"),
    "sink-static": (SINK, DASHED, "SinkCache, static"),
    "sink-compiled": (SINK, DOTTED, "SinkCache, compiled"),
    "sink-generate": (SINK, DASHED, "SinkCache, generate"),
    "sink-static-generate": (SINK, DOTTED, "SinkCache, static, generate"),
    "dynamic": (FULL_COLOR, SOLID, "DynamicCache"),
    "dynamic-generate": (FULL_COLOR, DASHED, "DynamicCache, generate"),
    "static": (BLUE, SOLID, "StaticCache"),
    "static-compiled": (BLUE, DOTTED, "StaticCache, compiled"),
    "native-window": (GREEN, SOLID, "native window"),
    "native-window-generate": (GREEN, DASHED, "native window, generate"),
    "quantized-fp8": (RECENT, SOLID, "QuantizedCache, fp8"),
    "quantized-quanto": (RECENT, DASHED, "QuantizedCache, quanto"),
    "quantized-hqq": (RECENT, DOTTED, "QuantizedCache, hqq"),
    "rerotate": (PURPLE, SOLID, "all keys rotated back"),
    "rotate-at-read": (ORANGE, SOLID, "all keys rotated at read"),
    "recompute": (GRAY, SOLID, "window recomputed"),
    "frozen": ("#222222", DOTTED, "no work for the cache"),
    "bytes to move": (GRAY, DASHED, "limit: bytes to move"),
    "operations": (GRAY, DOTTED, "limit: operations"),
}
CONDITIONS = ("model", "device_name", "dtype", "num_threads", "batch_size")
LABEL_HEIGHT = 13.0  # points from one label to the next
LOG_FROM = 8  # the least ratio of largest to smallest time for which a logarithmic axis is drawn


def load_pyplot():
    """matplotlib's pyplot, drawing to files only."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("scripts/plot.py draws with matplotlib, which is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, path: Path, num_colors: int = 64) -> None:
    """As PNG with a palette, which takes a third of the bytes."""
    from PIL import Image  # matplotlib needs it, too

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    Image.open(buffer).convert("RGB").quantize(num_colors, dither=Image.Dither.NONE).save(path, optimize=True)


# The picture of what is kept: nothing is measured for it


def draw_kept(plt, path: Path) -> None:
    """One row for each token that is processed, one column for each token of the text."""
    window = Window(DRAWN_WINDOW, DRAWN_SINKS)
    tokens = torch.arange(DRAWN_TOKENS)
    figure, axes = plt.subplots(figsize=(8.4, 6.2))
    for query in range(DRAWN_TOKENS):
        kept = [key for key in range(query + 1) if window.sees(tokens[query], tokens[key])]
        for key in range(query + 1):
            color = EVICTED if key not in kept else SINK if key < window.num_sinks else RECENT
            axes.add_patch(plt.Rectangle((key + 0.04, query + 0.04), 0.92, 0.92, color=color, linewidth=0))
            if key in kept:
                weight = "bold" if key == query else "normal"
                text_color = "white" if key < window.num_sinks else INK
                axes.text(
                    key + 0.5, query + 0.53, kept.index(key), ha="center", va="center", color=text_color, weight=weight, size=11
                )
    axes.axhline(window.length, color=INK, linewidth=1, linestyle=(0, (4, 3)), xmax=0.995)
    axes.text(DRAWN_TOKENS - 0.1, window.length - 0.16, "the window is full", ha="right", va="bottom", size=11, color=INK)
    axes.text(
        DRAWN_TOKENS - 0.1, 0.12,
        f"window_length={window.length}, num_sink_tokens={window.num_sinks}\n\n"
        "The numbers are the positions\nas the model sees them:\nnever more than the window.",
        ha="right", va="top", size=11, color=INK, linespacing=1.35,
    )  # fmt: skip
    names = {"sink: never evicted": SINK, "most recent tokens": RECENT, "evicted": EVICTED}
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, linewidth=0, label=name) for name, color in names.items()]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=11)
    axes.set(xlim=(0, DRAWN_TOKENS), ylim=(DRAWN_TOKENS, 0), aspect="equal")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    for axis, label in ((axes.xaxis, "token of the text"), (axes.yaxis, "token being processed")):
        axis.set_ticks([index + 0.5 for index in range(DRAWN_TOKENS)], range(DRAWN_TOKENS))
        axis.set_label_text(label, size=11)
    axes.tick_params(length=0, labelsize=10)
    axes.spines[:].set_visible(False)
    save(figure, path)


# Speed: what scripts/benchmark.py has written


def line_plot(plt, path: Path, rows: list[Row], x: str, y: str, labels: tuple[str, str], band=(), scale: float = 1.0) -> None:
    """A line for each method: column `y` over column `x`, and as a band the two columns of `band`; `y` divided by `scale`."""
    figure, axes = plt.subplots(figsize=(8.4, 4.8))
    axes.set_xscale("log", base=2 if x == "window_length" else 10)
    ends = []
    for method in (name for name in METHOD_STYLES if any(row["method"] == name for row in rows)):
        points = {float(row[x]): row for row in rows if row["method"] == method}  # the last row of a position counts
        ends.append(draw_line(axes, method, [points[position] for position in sorted(points)], x, y, band, scale))
    values = [value for line in axes.get_lines() for value in line.get_ydata()]
    if max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    label_axes(axes, labels)
    figure.canvas.draw()  # labels at ends need the final scales
    label_ends(axes, ends)
    note = f"{'Medians, bands from quartile to quartile. ' if band else ''}{conditions(rows[-1])}"
    axes.text(0, -0.2, note, transform=axes.transAxes, size=9, color="#666666")
    save(figure, path, num_colors=256)
    plt.close(figure)


def draw_line(axes, method: str, points: list[Row], x: str, y: str, band, scale: float) -> tuple[float, float, str, str]:
    """Where the line ends, its label and its color. A limit has no band."""
    color, style, label = METHOD_STYLES[method]
    positions, values = [float(point[x]) for point in points], [float(point[y]) / scale for point in points]
    axes.plot(positions, values, color=color, linestyle=style, linewidth=2, marker="o", markersize=3.5)
    if band and points[0][band[0]]:
        low, high = ([float(point[column]) / scale for point in points] for column in band)
        axes.fill_between(positions, low, high, color=color, alpha=0.15, linewidth=0)
    return positions[-1], values[-1], label, color


def label_axes(axes, labels: tuple[str, str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis, label in zip((axes.xaxis, axes.yaxis), labels):
        if axis.get_scale() == "log":
            base = axis.get_transform().base
            axis.set_major_locator(LogLocator(base, subs=(1, 2, 5) if base == 10 else (1,)))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.set_label_text(label, size=11)
    axes.tick_params(labelsize=10)
    axes.grid(color="#E9E9E9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes, ends: list[tuple[float, float, str, str]]) -> None:
    """A label right of the end of each line: at its height, or as near as the others allow. Lines that end before the edge have
    labels among themselves."""
    from matplotlib.patheffects import withStroke

    points = axes.figure.dpi / 72
    edge = max(end[0] for end in ends)
    for is_at_edge in (False, True):
        group = sorted((end for end in ends if (end[0] == edge) == is_at_edge), key=lambda end: end[1])
        heights = [axes.transData.transform(end[:2])[1] / points for end in group]
        for (x, y, label, color), height, free in zip(group, heights, apart(heights, LABEL_HEIGHT)):
            axes.annotate(
                label, (x, y), xytext=(7, free - height), textcoords="offset points", color=color, size=10, va="center",
                weight="bold", path_effects=[withStroke(linewidth=4, foreground="white")],
            )  # fmt: skip


def apart(heights: list[float], distance: float) -> list[float]:
    """The nearest heights (least squares) that are in the same order and at least so far apart; `heights` ascend."""
    # Labels that touch stand around their mean: less their place in the order, they have one height.
    blocks: list[list[float]] = []
    for index, height in enumerate(heights):
        blocks.append([height - index * distance])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    levels = [mean(block) for block in blocks for _ in block]
    return [level + index * distance for index, level in enumerate(levels)]


def conditions(row: Row) -> str:
    threads = f", {row['num_threads']} thread{'s' if row['num_threads'] != '1' else ''}" if row["device"] == "cpu" else ""
    return (
        f"{row['model']} (batch {row['batch_size']}, {row['dtype']}), {row['device_name']}{threads}, torch {row['torch']}, "
        f"transformers {row['transformers']}"
    )


QUARTILES = "ms_low", "ms_high"


def position_label(rows: list[Row]) -> str:
    return f"position in the stream, tokens (window_length={rows[0]['window_length']})"


def draw_time_by_position(plt, path: Path, rows: list[Row]) -> None:
    line_plot(plt, path, rows, "position", "ms_per_token", (position_label(rows), "milliseconds a token"), QUARTILES)


def draw_memory_by_position(plt, path: Path, rows: list[Row]) -> None:
    line_plot(plt, path, rows, "position", "bytes_held", (position_label(rows), "MiB held by the cache"), scale=2**20)


def draw_time_by_window(plt, path: Path, rows: list[Row]) -> None:
    labels = "window_length, tokens", "milliseconds a token"
    line_plot(plt, path, rows, "window_length", "ms_per_token", labels, QUARTILES)


def speed_table(rows: list[Row]) -> str:
    """Markdown: milliseconds a token of each method and window, and behind it the ratio to the reference with its quartiles.
    Where it was measured more than once, the last row counts."""
    rows = [row for row in rows if row["measure"] == "decode" and row["batch_size"] == "1"]
    found = {(row["method"], int(row["window_length"])): row for row in rows}
    windows = sorted({window for _, window in found})
    lines = [
        f"| ms a token (ratio, quartiles) | {' | '.join(f'{window:,}' for window in windows)} |",
        "|---" * (len(windows) + 1) + "|",
    ]
    for method in (name for name in METHOD_STYLES if any(name == other for other, _ in found)):
        cells = [speed_cell(found.get((method, window))) for window in windows]
        lines.append(f"| {METHOD_STYLES[method][2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_cell(row: Row | None) -> str:
    if row is None:
        return ""
    milliseconds = f"{float(row['ms_per_token']):.1f}"
    if row["reference"] in ("", row["method"]):
        return milliseconds
    ratio, low, high = (float(row[name]) for name in ("ratio", "ratio_low", "ratio_high"))
    return f"{milliseconds} ({ratio:.2f}, {low:.2f}-{high:.2f})"


# Text: what scripts/evaluate.py and scripts/stream_eval.py have written


# Method -> color, line and what stands at its end; windows of other lengths than the first have other lines.
READ_STYLES = {
    "full": (FULL_COLOR, "full cache"),
    "window": (BLUE, "window {window_length}, no sinks"),
    "sinks": (SINK, "window {window_length}, {num_sink_tokens} sinks"),
    "recompute": (GRAY, "window {window_length} recomputed"),
    "recompute-sinks": (ORANGE, "{num_sink_tokens} sinks + recent, recomputed"),
}
LINES = SOLID, DASHED, DOTTED
TRAINED_LENGTHS = {"tiny": 256, "smollm2": 8192}
SMOOTHED_BUCKETS = 7


def curves(rows: list[Row], x: str) -> dict[tuple[str, str, str, str], list[Row]]:
    """The rows of each method, ordered by `x`: the last one of each value counts. In the order of `READ_STYLES`."""
    found: dict[tuple, dict[float, Row]] = {}
    for row in rows:
        key = row["method"], row["window_length"], row["num_sink_tokens"], row["dtype"]
        found.setdefault(key, {})[float(row[x])] = row
    by_style = sorted(found, key=lambda key: ([*READ_STYLES].index(key[0]), *map(int, filter(None, key[1:3])), key[3]))
    return {key: [found[key][value] for value in sorted(found[key])] for key in by_style}


def style(row: Row, rows: list[Row]) -> tuple[str, object, str]:
    """Color, line and label of the curve to which a row belongs, among others."""
    color, label = READ_STYLES[row["method"]]
    lengths = sorted({each["window_length"] for each in rows if each["window_length"]}, key=int)
    dtypes = sorted({each["dtype"] for each in rows}, reverse=True)
    label = label.format(**row).replace(" 1 sinks", " 1 sink") + (f", {row['dtype']}" if len(dtypes) > 1 else "")
    index = lengths.index(row["window_length"]) if row["window_length"] else 0
    return color, LINES[max(index, dtypes.index(row["dtype"])) % len(LINES)], label


def smooth(values: list[float], edges: list[int]) -> list[float]:
    """The mean over neighbours, but not across an edge; at ends and edges, over as many as there are."""
    smoothed, half = [], SMOOTHED_BUCKETS // 2
    for start, stop in zip([0, *edges], [*edges, len(values)]):
        smoothed += [mean(values[max(start, index - half) : min(stop, index + half + 1)]) for index in range(start, stop)]
    return smoothed


def draw_perplexity_by_position(plt, path: Path, rows: list[Row]) -> None:
    """The paper's picture: each curve raw, and smoothed (nats, as their mean is what perplexity is made of) on top of it."""
    figure, axes = plt.subplots(figsize=(8.4, 5))
    axes.set_yscale("log")
    ends = []
    for (_, window_length, _, _), points in curves(rows, "start").items():
        points = [point for point in points if point["num_predictions"] != "0"]
        color, line, label = style(points[0], rows)
        middle = [(float(point["start"]) + float(point["stop"])) / 2 for point in points]
        nats = [float(point["nats"]) for point in points]
        length = int(window_length or TRAINED_LENGTHS.get(points[0]["model"], 0))
        edges = [
            index
            for index, point in enumerate(points)
            if index and int(points[index - 1]["start"]) < length <= int(point["start"])
        ]
        axes.plot(middle, [exp(value) for value in nats], color=color, alpha=0.35, linewidth=0.7)
        smoothed = [exp(value) for value in smooth(nats, edges)]
        axes.plot(middle, smoothed, color=color, linestyle=line, linewidth=2.4)
        ends.append((middle[-1], smoothed[-1], label, color))
    label_axes(axes, ("position in the text", "perplexity (less is better)"))
    axes.set_xlim(left=0, right=max(end[0] for end in ends))
    lengths = sorted({int(row["window_length"]) for row in rows if row["window_length"]})
    marks = {length: f"window of {length} is full" for length in lengths[:1]}
    if rows[0]["model"] in TRAINED_LENGTHS:
        marks.setdefault(TRAINED_LENGTHS[rows[0]["model"]], "its trained length")
    for length, text in marks.items():
        axes.axvline(length, color="#222222", linewidth=1, linestyle=(0, (4, 3)))
        is_near_left = length < 0.05 * axes.get_xlim()[1]  # where the text has no room before the line
        axes.annotate(
            text, (length, 1), xycoords=("data", "axes fraction"), xytext=(4 if is_near_left else -4, -3),
            textcoords="offset points", rotation=90, ha="left" if is_near_left else "right", va="top", size=9, color="#222222",
        )  # fmt: skip
    figure.canvas.draw()
    label_ends(axes, ends)
    row = rows[-1]
    bucket = int(row["bucket_length"])
    note = f"{row['model']}, {row['batch_size']} text{'s' if row['batch_size'] != '1' else ''}: {row['text']}, {row['dtype']}."
    note += f" Thin: means of {bucket} positions. Thick: of {bucket * SMOOTHED_BUCKETS}."
    axes.text(0, -0.17, note, transform=axes.transAxes, size=9, color="#666666")
    save(figure, path, num_colors=256)
    plt.close(figure)


def draw_real_model(plt, path: Path, rows: list[Row]) -> None:
    """The same picture of a real model: the shortest and the longest window that were measured, without sinks and with four."""
    rows = [row for row in rows if row["dtype"] == "float32" and row["method"] in READ_STYLES]
    lengths = sorted({int(row["window_length"]) for row in rows if row["method"] == "sinks"})
    shown = {str(length) for length in (lengths[:1] + lengths[-1:])}
    draw_perplexity_by_position(
        plt,
        path,
        [row for row in rows if row["method"] == "full" or (row["window_length"] in shown and row["num_sink_tokens"] in "04")],
    )


def draw_cost_by_position(plt, path: Path, rows: list[Row]) -> None:
    """What is held, and how long a token takes, while a text is read in chunks."""
    rows = [row for row in rows if row["skip_tokens"] == "0" and not row["method"].startswith("recompute")]
    from matplotlib.ticker import LogLocator

    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.4))
    half = SMOOTHED_BUCKETS // 2
    for axes, column, scale, label in zip(
        panels, ("bytes_held", "ms_per_token"), (2**20, 1), ("MiB held", "milliseconds a token")
    ):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for points in curves(rows, "start").values():
            color, line, name = style(points[0], rows)
            values = [float(point[column]) / scale for point in points]
            stops = [float(point["stop"]) for point in points]
            if column == "ms_per_token":
                axes.plot(stops, values, color=color, linewidth=0.7, alpha=0.35)
                values = [median(values[max(0, index - half) : index + half + 1]) for index in range(len(values))]
            axes.plot(stops, values, color=color, linestyle=line, linewidth=2, label=name)
        low, high = axes.get_ylim()
        axes.set_ylim(low / 2, high * 2)
        label_axes(axes, ("position in the text", label))
        axes.xaxis.set_major_locator(LogLocator(10))
    panels[0].legend(frameon=False, fontsize=10, loc="best")
    row = rows[-1]
    note = f"{row['model']}, one text read in chunks of {row['chunk_length']} tokens, {row['device_name']}, "
    note += f"{row['num_threads']} thread"
    panels[0].text(
        0,
        -0.2,
        f"{note}. Time: thin as measured, thick medians of {SMOOTHED_BUCKETS}.",
        transform=panels[0].transAxes,
        size=9,
        color="#666666",
    )
    save(figure, path, num_colors=256)
    plt.close(figure)


def draw_recall_by_distance(plt, path: Path, rows: list[Row]) -> None:
    """How much of what came before is recalled, by how many windows ago it came."""
    is_copy = rows[0]["task"] == "copy"
    column = "token_accuracy" if is_copy else "accuracy"
    longest = max(int(row["window_length"]) for row in rows if row["window_length"])
    figure, axes = plt.subplots(figsize=(8.4, 4.8))
    for (_, window_length, _, _), points in curves(rows, "token_distance").items():
        color, line, label = style(points[0], rows)
        windows = [float(point["token_distance"]) / int(window_length or longest) for point in points]
        axes.plot(
            windows, [float(point[column]) for point in points], color=color, linestyle=line, linewidth=2, marker="o",
            markersize=4, label=label,
        )  # fmt: skip
        if is_copy:
            first = [float(point["first_token_accuracy"]) for point in points]
            axes.plot(windows, first, color=color, linestyle=line, linewidth=0.8, alpha=0.6)
    axes.axvline(1, color="#222222", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "evicted", (1, 1), xycoords=("data", "axes fraction"), xytext=(6, -4), textcoords="offset points", va="top", size=10
    )
    axes.set_ylim(0, 1 if not is_copy else None)
    label_axes(axes, ("how long ago, in windows", "tokens recalled" if is_copy else "answers that are right"))
    axes.legend(frameon=False, fontsize=10, loc="upper right")
    row = rows[-1]
    note = f"{row['model']}, {row['num_answers']} answers a point, {row['dtype']}."
    if is_copy:
        note += " Thin: the same passages when they come for the first time."
    axes.text(0, -0.18, note, transform=axes.transAxes, size=9, color="#666666")
    save(figure, path, num_colors=256)
    plt.close(figure)


# Name -> the file that it needs, which of its measurements, what rows of one figure have in common, the function that draws them,
# and the script that measures. Where a figure shows no times, it makes no difference which processor measured them, on how many
# threads.
TEXT = "model", "text", "dtype", "batch_size"
FIGURES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], Callable, str]] = {
    "perplexity_by_position": ("evaluate.csv", ("stream",), (*TEXT, "text_crc32"), draw_perplexity_by_position, "evaluate"),
    "real_models": ("smollm2.csv", ("stream",), ("model",), draw_real_model, "evaluate"),
    "real_models_gemma3": ("gemma3.csv", ("stream",), ("model",), draw_real_model, "evaluate"),
    "cost_by_position": ("cost.csv", ("stream",), ("model", "text", "device_name"), draw_cost_by_position, "evaluate"),
    "recall_by_distance": ("recall.csv", ("recall",), (*TEXT, "task"), draw_recall_by_distance, "stream_eval"),
    "time_by_position": ("benchmark.csv", ("stream",), (*CONDITIONS, "window_length"), draw_time_by_position, "benchmark"),
    "memory_by_position": ("benchmark.csv", ("stream",), (*CONDITIONS, "window_length"), draw_memory_by_position, "benchmark"),
    "time_by_window": ("benchmark.csv", ("decode", "limit"), CONDITIONS, draw_time_by_window, "benchmark"),
}


def groups(rows: list[Row], columns: tuple[str, ...]) -> dict[str, list[Row]]:
    """The rows of each figure, by what tells it from the others in the names of files: nothing, where there is one."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    differing = [index for index in range(len(columns)) if len({key[index] for key in found}) > 1]
    names = (["", *(f"{columns[index]}_{key[index]}" for index in differing)] for key in found)
    return {re.sub(r"[^\w.-]+", "_", "-".join(parts)): found[key] for parts, key in zip(names, found)}


def draw(plt, name: str, results_dir: Path, output_dir: Path) -> list[Path]:
    """The files of one figure: none if nothing was measured for it, which is said."""
    if name == KEPT:
        draw_kept(plt, output_dir / f"{KEPT}.png")
        return [output_dir / f"{KEPT}.png"]
    file_name, measures, columns, function, script = FIGURES[name]
    path = results_dir / file_name
    rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    rows = [row for row in rows if row["measure"] in measures]
    if not rows:
        print(f"{name} is left out: {path} has no rows of {measures[0]}. See scripts/{script}.py --help.", file=sys.stderr)
    paths = []
    for suffix, members in groups(rows, columns).items():
        paths.append(output_dir / f"{name}{suffix}.png")
        function(plt, paths[-1], members)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [KEPT, *FIGURES]
    parser.add_argument("--figures", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument(
        "--results-dir", type=Path, default=ROOT / "results", help="where the CSV files are (default: %(default)s)"
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "figures", help="(default: %(default)s)")
    add_block_arguments(parser)
    args = parser.parse_args()
    if args.check or args.write:
        with (args.results_dir / "benchmark.csv").open(encoding="utf-8") as file:
            check_or_write_block(args, "speed", speed_table(list(csv.DictReader(file))))
    plt = load_pyplot()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in tqdm(args.figures, desc="figures", disable=None):
        paths += draw(plt, name, args.results_dir, args.output_dir)
    if not paths:
        sys.exit(
            f"Nothing in {args.results_dir} to draw. Measure first: scripts/evaluate.py --csv {args.results_dir}/evaluate.csv"
        )
    print(json.dumps({"figures": [str(path) for path in paths], "bytes": [path.stat().st_size for path in paths]}))


if __name__ == "__main__":
    main()
