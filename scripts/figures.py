"""The two figures of the README, as PNG files on white.

`kept.png` shows what a small cache holds while a text goes by, as the code of the cache says. `nats.png` shows what that does to
a model; its numbers are those that scripts/evaluate.py has written.

    python scripts/evaluate.py --num-tokens 1400 --num-texts 16 --full --window-length 128 256 --num-sink-tokens 0 1 4 \\
        --csv nats.csv
    python scripts/figures.py --csv nats.csv
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

import torch
from common import ROOT
from generate import Window

# Colors that stay apart for the color-blind, and in gray.
SINK, RECENT, EVICTED, FULL_COLOR, INK = "#D55E00", "#56B4E9", "#E9E9E9", "#444444", "#222222"
# The window of the drawing: small, so that each token can be seen.
DRAWN_WINDOW, DRAWN_SINKS, DRAWN_TOKENS = 8, 2, 16
# What is compared: columns of the CSV. The tiny model was trained on texts of LEARNED_LENGTH tokens.
COMPARED_WINDOW, LEARNED_LENGTH = 128, 256
FULL, PLAIN, SINKS = "full cache", f"window {COMPARED_WINDOW}, 0 sinks", f"window {COMPARED_WINDOW}, 4 sinks"
SMOOTHED_POSITIONS = 49


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


def read_csv(path: Path) -> tuple[dict, dict[str, list[float]]]:
    """How it was measured, and the columns."""
    if not path.exists():
        sys.exit(f"{path} is missing. scripts/evaluate.py --csv {path} measures it; --help shows the command.")
    comment, *lines = path.read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines))
    missing = {FULL, PLAIN, SINKS} - rows[0].keys()
    if missing:
        sys.exit(
            f"{path} has no column {' or '.join(sorted(missing))}. --help shows the command that measures all that is drawn."
        )
    return json.loads(comment.removeprefix("#")), {name: [float(row[name]) for row in rows] for name in rows[0]}


def smooth(values: list[float]) -> list[float]:
    """The mean over neighbours, but not across the edge of the window; at ends and edge, over as many as there are."""
    smoothed = []
    for part in (values[:COMPARED_WINDOW], values[COMPARED_WINDOW:]):
        for index in range(len(part)):
            near = part[max(0, index - SMOOTHED_POSITIONS // 2) : index + SMOOTHED_POSITIONS // 2 + 1]
            smoothed.append(sum(near) / len(near))
    return smoothed


def draw_nats(plt, path: Path, about: dict, columns: dict[str, list[float]]) -> None:
    """Each curve raw, and smoothed on top of it."""
    from matplotlib.patheffects import withStroke

    position = columns["position"]
    figure, axes = plt.subplots(figsize=(8.4, 4.4))
    for name, color, label, level in (
        (FULL, FULL_COLOR, "full cache", 6.2),
        (PLAIN, RECENT, "window 128, no sinks", 4.2),
        (SINKS, SINK, "window 128, 4 sinks", 1.0),
    ):
        axes.plot(position, columns[name], color=color, alpha=0.3, linewidth=0.5)
        axes.plot(position, smooth(columns[name]), color=color, linewidth=2.4)
        outline = [withStroke(linewidth=5, foreground="white")]
        axes.text(position[-1], level, label, color=color, ha="right", size=13, weight="bold", path_effects=outline)
    for edge, label, side in (
        (COMPARED_WINDOW, "window\nis full", "right"),
        (LEARNED_LENGTH, "longer than the\ntexts it learned from", "left"),
    ):
        axes.axvline(edge, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(edge + (8 if side == "left" else -8), 7.95, label, ha=side, va="top", size=10, color=INK)
    axes.set(xlim=(0, position[-1]), ylim=(0, 8))
    axes.set_xlabel("position in the text", size=11)
    axes.set_ylabel("nats a token (less is better)", size=11)
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    note = f"{about['model']}, {about['num_texts']} held-out files, {about['dtype']}."
    note += f" Thin: each position. Thick: mean of {SMOOTHED_POSITIONS}."
    axes.text(1, -0.2, note, transform=axes.transAxes, ha="right", size=9, color="#666666")
    save(figure, path)


def load_pyplot(script: str):
    """matplotlib's pyplot, drawing to files only."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"{script} draws with matplotlib, which is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def print_paths(paths: list[Path]) -> None:
    print(json.dumps({"figures": [str(path) for path in paths], "bytes": [path.stat().st_size for path in paths]}))


def save(figure, path: Path, num_colors: int = 64) -> None:
    """As PNG with a palette, which takes a third of the bytes."""
    from PIL import Image  # matplotlib needs it, too

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    Image.open(buffer).convert("RGB").quantize(num_colors, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--csv",
        type=Path,
        default=ROOT / "results" / "nats.csv",
        help="what scripts/evaluate.py has written (default: %(default)s)",
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "figures", help="(default: %(default)s)")
    args = parser.parse_args()
    plt = load_pyplot("scripts/figures.py")
    about, columns = read_csv(args.csv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    paths = [args.output_dir / "kept.png", args.output_dir / "nats.png"]
    draw_kept(plt, paths[0])
    draw_nats(plt, paths[1], about, columns)
    print_paths(paths)


if __name__ == "__main__":
    main()
