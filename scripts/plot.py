"""Figures of what was measured: reads CSV files, measures nothing.

Every point is a row of the file, a median, in a band from quartile to quartile. Rows of different models, devices, batches and so on
go to a figure each; where a row was measured more than once, the last one counts.

    python scripts/benchmark.py --measure decode stream --csv results/benchmark.csv
    python scripts/plot.py
    python scripts/plot.py --figures time_by_window --results-dir results --output-dir figures
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from common import ROOT

from figures import FULL_COLOR, RECENT, SINK, load_pyplot, print_paths, save

Row = dict[str, str]

# Method -> color, line and label. Colors stay apart for the color-blind; methods of a kind share one, and a label stands at each line.
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
    "bytes to move": (GRAY, DASHED, "limit: bytes to move"),
    "operations": (GRAY, DOTTED, "limit: operations"),
}
CONDITIONS = ("model", "device_name", "dtype", "num_threads", "batch_size")
LABEL_HEIGHT = 13.0  # points from one label to the next
LOG_FROM = 8  # the least ratio of largest to smallest time for which a logarithmic axis is drawn


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
    """A label right of the end of each line: at its height, or as near as the others allow."""
    from matplotlib.patheffects import withStroke

    points = axes.figure.dpi / 72
    ends = sorted(ends, key=lambda end: end[1])
    heights = [axes.transData.transform(end[:2])[1] / points for end in ends]
    for (x, y, label, color), height, free in zip(ends, heights, apart(heights, LABEL_HEIGHT)):
        axes.annotate(
            label, (x, y), xytext=(7, free - height), textcoords="offset points", color=color, size=10, va="center", weight="bold",
            path_effects=[withStroke(linewidth=4, foreground="white")],
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


# Name -> the file that it needs, which of its measurements, what else one figure has in common, and the function that draws them.
FIGURES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], Callable]] = {
    "time_by_position": ("benchmark.csv", ("stream",), ("window_length",), draw_time_by_position),
    "memory_by_position": ("benchmark.csv", ("stream",), ("window_length",), draw_memory_by_position),
    "time_by_window": ("benchmark.csv", ("decode", "limit"), (), draw_time_by_window),
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
    file_name, measures, columns, function = FIGURES[name]
    path = results_dir / file_name
    rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    rows = [row for row in rows if row["measure"] in measures]
    if not rows:
        print(f"{name} is left out: {path} has no rows of {measures[0]}. See scripts/benchmark.py --help.", file=sys.stderr)
    paths = []
    for suffix, members in groups(rows, CONDITIONS + columns).items():
        paths.append(output_dir / f"{name}{suffix}.png")
        function(plt, paths[-1], members)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=[*FIGURES], help="(default: all)")
    parser.add_argument(
        "--results-dir", type=Path, default=ROOT / "results", help="where the CSV files are (default: %(default)s)"
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "figures", help="(default: %(default)s)")
    args = parser.parse_args()
    plt = load_pyplot("scripts/plot.py")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    paths = [path for name in args.figures for path in draw(plt, name, args.results_dir, args.output_dir)]
    if not paths:
        sys.exit(
            f"Nothing in {args.results_dir} to draw. Measure first: scripts/benchmark.py --csv {args.results_dir}/benchmark.csv"
        )
    print_paths(paths)


if __name__ == "__main__":
    main()
