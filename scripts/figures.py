"""The figure of the README that needs no measurement, as a PNG file on white; scripts/plot.py draws the others.

`kept.png` shows what a small cache holds while a text goes by, as the code of the cache says.

    python scripts/figures.py
"""

import argparse
import io
import json
import sys
from pathlib import Path

import torch
from common import ROOT
from custom_generate.generate import Window

# Colors that stay apart for the color-blind, and in gray.
SINK, RECENT, EVICTED, FULL_COLOR, INK = "#D55E00", "#56B4E9", "#E9E9E9", "#444444", "#222222"
# The window of the drawing: small, so that each token can be seen.
DRAWN_WINDOW, DRAWN_SINKS, DRAWN_TOKENS = 8, 2, 16


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
    parser.add_argument("--output-dir", type=Path, default=ROOT / "figures", help="(default: %(default)s)")
    args = parser.parse_args()
    plt = load_pyplot("scripts/figures.py")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "kept.png"
    draw_kept(plt, path)
    print_paths([path])


if __name__ == "__main__":
    main()
