"""The table *Model compatibility* of the README: a verdict for every type in transformers' causal-LM mapping, found by running it.

Each type is built small, with random weights (`tests/zoo.py`), and shown to the cache: it is refused with a reason, or accepted with
the way in which it moves its keys. That what is accepted is exact is what `tests/test_zoo.py` proves, type by type.

    python scripts/compatibility.py --check      exits with 1 if the table in the README is not what is found
    python scripts/compatibility.py --write      puts what is found into the README
"""

import argparse
import json
import sys
import warnings

import torch
import transformers
from common import ROOT, add_block_arguments, check_or_write_block
from custom_generate.generate import Rotation, SinkCache
from tqdm import tqdm

sys.path.insert(0, str(ROOT / "tests"))

from zoo import LEFT_OUT, ZOO_TYPES, build_zoo_model  # noqa: E402

WINDOW_LENGTH, NUM_SINK_TOKENS = 16, 4


def describe_rotation(rotation: Rotation) -> str:
    """In a few words: which pairs turn, how many of the dimensions, which way."""
    turning = rotation.frequency.nonzero().flatten()
    if not len(turning):
        return "none"
    distance = int((rotation.partner - torch.arange(len(rotation.partner)))[turning[0]].abs())
    words = ["interleaved pairs" if distance == 1 and len(turning) > 2 else "halves"]
    if rotation.frequency[turning[0]] > 0:
        words.append("the other way")
    if len(turning) < len(rotation.frequency):
        words.append("a part of the dimensions")
    return ", ".join(words)


def describe(traits) -> str:
    """How the keys of a model move, and what else its layers do."""
    layers = [layer for layer in traits.layers if layer is not None]
    if traits.is_ordered:
        return "not at all (biases by the order of keys)"
    kinds = {describe_rotation(next((r for r in layer.rotations if not r.is_identity), layer.rotations[0])) for layer in layers}
    words = sorted(kinds - {"none"})
    if "none" in kinds:
        words.append("layers without positions")
    if any(not layer.rotations[1].is_identity for layer in layers):
        words.append("in a latent cache")
    if any(layer.native_window is not None for layer in layers):
        words.append("sliding windows")
    if traits.is_chunked:
        words.append("chunks")
    if traits.is_indexed:
        words.append("indexers")
    if len({rotation.fingerprint for layer in layers for rotation in layer.rotations if not rotation.is_identity}) > 1:
        words.append("several tables")
    if traits.is_recurrent:
        words.append("recurrent states")
    elif None in traits.layers:
        words.append("shared keys")
    return "; ".join(words)


def reason_of(message: str) -> str:
    """The part of a refusal that says why, without the name of the class and what varies from run to run."""
    for pattern, reason in [
        ("no known rotation", "absolute or learned positions, or a rotation of its own"),
        ("is an encoder-decoder", "encoder-decoder"),
        ("do not put their keys", "no cache of keys and values"),
        ("split into passes", "logits depend on how a text is split into passes (transformers' Mamba 1)"),
        ("where a text stands", "scores depend on the position itself"),
        ("order in which keys", "recurrent states and scores by the order of keys"),
        ("another kind of state", "a kind of cache layer that can't be bounded"),
        ("a first look", "own cache class, or inputs of its own"),
        ("different lengths", "layers with different windows share one mask"),
    ]:
        if pattern in message:
            return reason
    return message


def verdicts() -> list[dict]:
    """One entry for each type: `type`, `verdict` (exact, refused, left out), `keys` or `reason`."""
    found = []
    for model_type in tqdm(ZOO_TYPES, unit="type", file=sys.stderr):
        if model_type in LEFT_OUT:
            found.append({"type": model_type, "verdict": "left out", "reason": LEFT_OUT[model_type]})
            continue
        try:
            traits = SinkCache.from_model(build_zoo_model(model_type), WINDOW_LENGTH, NUM_SINK_TOKENS)._traits
            found.append({"type": model_type, "verdict": "exact", "keys": describe(traits)})
        except ValueError as error:
            found.append({"type": model_type, "verdict": "refused", "reason": reason_of(str(error))})
    return found


def table(found: list[dict]) -> str:
    """Markdown: the exact types by how their keys move, the others by reason."""
    num_exact = sum(entry["verdict"] == "exact" for entry in found)
    lines = [
        f"{num_exact} of {len(found)} types in the causal-LM mapping of transformers {transformers.__version__} are exact.",
        "",
    ]
    for verdict, key, head in (
        ("exact", "keys", "how keys move"),
        ("refused", "reason", "reason"),
        ("left out", "reason", "reason"),
    ):
        groups: dict[str, list[str]] = {}
        for entry in found:
            if entry["verdict"] == verdict:
                groups.setdefault(entry[key], []).append(entry["type"])
        lines += [f"| {verdict}: {head} | types |", "|---|---|"]
        lines += [
            f"| {name} | {', '.join(sorted(types))} |" for name, types in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))
        ]
        lines.append("")
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_block_arguments(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    found = verdicts()
    new = table(found)
    check_or_write_block(args, "compatibility", new)
    print(new)
    counts = {verdict: sum(entry["verdict"] == verdict for entry in found) for verdict in ("exact", "refused", "left out")}
    print(json.dumps({"transformers": transformers.__version__, **counts}))


if __name__ == "__main__":
    main()
