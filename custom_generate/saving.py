"""A cache on disk: a safetensors file of its tensors, with its numbers as JSON in the metadata. Nothing of it is executed."""

import json
import os
import threading
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .layers import Ring
from .quantized import Quantization
from .releases import has_previous_state, restore_recurrent, unwrapped
from .stream import KINDS, Stream

SAVED_FORMAT = 2
# Settings of a config that do not change what a model computes, or that are compared otherwise.
NOT_SETTINGS = frozenset(
    "dtype torch_dtype transformers_version attn_implementation use_cache output_attentions output_hidden_states return_dict "
    "bos_token_id eos_token_id pad_token_id".split()
)


def save_cache(cache, path: str | os.PathLike) -> None:
    """`SinkCache.save`: to a file beside it first, so that there is never half of one. What was recorded is left out."""
    cache.require_model()
    if cache.stream.current is not None or cache.is_interrupted:
        raise ValueError(
            "Can't save in the middle of a pass: it has not been through all layers. Save after the model's forward pass. If it "
            "was interrupted, run it again first, model(**cache.prepare(...)), or save a copy that was made before."
        )
    cache.settle()
    stream, recurrent, model = cache.stream, cache.recurrent, cache.model_ref()
    if model is None:
        raise ValueError("Can't save a cache whose model is gone: the file has to say which model can go on from it.")
    if os.path.isdir(path):
        raise IsADirectoryError(f"Can't save to {os.fspath(path)}: it is a folder. Name a file in it.")
    beside = Path(f"{os.fsdecode(path)}.{os.getpid()}-{threading.get_ident()}.tmp")
    if not beside.parent.is_dir():
        raise FileNotFoundError(f"Can't save to {os.fspath(path)}: there is no folder {beside.parent}. Make it first.")
    for sinks in stream.groups:
        sinks.move([0])  # to where they came
    has_tokens = any(stream.num_seen)
    tensors = rotations_of(stream) | (views_of(stream) | recurrent.tensors if has_tokens else {})
    numbers = {"format": SAVED_FORMAT, "model": settings_of(model), "arguments": cache.arguments}
    numbers |= {"batch_size": stream.batch_size if has_tokens else -1, "num_seen": stream.num_seen, "base": stream.base}
    numbers |= {"knows_ids": stream.knows_ids, "unseen_token_ids": cache.unseen_token_ids}
    numbers["has_previous_state"] = {str(index): has_previous_state(layer) for index, layer in recurrent.layers.items()}
    try:
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(tensors, beside, {"sink_cache": json.dumps(numbers)})
        with open(beside, "r+b") as file:  # Windows flushes no file that is open for reading only
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_cache(cls, path: str | os.PathLike, model: torch.nn.Module, expected: dict):
    saved = SavedFile(path)
    arguments, here, there = saved.number("arguments", dict), settings_of(unwrapped(model)), saved.number("model", dict)
    for name, value in expected.items():
        value = vars(Quantization.of(value)) if name == "quantized" and value is not None else value
        if value is not None and value != arguments.get(name):
            raise saved.refusal(f"{name} is {arguments.get(name)} in the file, and {value} was asked for")
    for name in here.keys() & there.keys():
        if here[name] != there[name]:
            sides = f"{name} is {there[name]!r:.80} in the file, and {here[name]!r:.80} here"
            raise saved.refusal(f"it was made for another model: {sides}. Load the model for which it was saved")
    try:
        cache = cls.from_model(model, **arguments)
    except TypeError as error:
        raise saved.refusal(f"it was changed since it was written ({error})") from error
    saved.fill(cache)
    return cache


class SavedFile:
    """What stands in a file: `tensors` that nothing has taken yet, and numbers."""

    def __init__(self, path: str | os.PathLike):
        self.path = path
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no file {os.fspath(path)!r} to load a SinkCache from.")
        try:
            with safe_open(os.fsdecode(path), framework="pt", device="cpu") as file:
                metadata = (file.metadata() or {}).get("sink_cache")
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:
            raise self.refusal(f"it was cut off, or it is no safetensors file ({error})") from error
        if metadata is None:
            raise self.refusal("it is a safetensors file that SinkCache.save has not written, such as the weights of a model")
        if metadata[:1] != "{":  # format 1 begins with a checksum
            raise self.refusal('it has format 1. Load it with the version of sink_cache that wrote it, revision="v1"')
        try:
            self.numbers = json.loads(metadata)
        except ValueError as error:
            raise self.refusal(f"it was changed: what it says is no JSON ({error})") from error
        file_format = self.number("format")
        if file_format != SAVED_FORMAT:
            raise self.refusal(f"it has format {file_format}, and this code reads format {SAVED_FORMAT}. Update sink_cache")

    def number(self, name: str, kind: type = object):
        if name not in self.numbers:
            raise self.misfit(f"it does not say {name}")
        if not isinstance(self.numbers[name], kind):
            raise self.misfit(f"{name} can't be {self.numbers[name]!r:.50}")
        return self.numbers[name]

    @torch.inference_mode(False)  # what is made here may be changed in any mode
    def fill(self, cache) -> None:
        """Fill a new cache. As long as shapes are compared, it has no rows: what a file only claims to hold costs no memory."""
        stream, batch_size = cache.stream, self.number("batch_size")
        self._check_rotations(stream)
        if batch_size == -1 and not self.tensors:
            return
        num_seen, base, unseen = self.number("num_seen"), self.number("base"), self.number("unseen_token_ids")
        are_right = all(are_counts(numbers, batch_size) for numbers in (num_seen, base, [0] if unseen is None else unseen))
        if not are_right or len(num_seen) != len(base) or not any(num_seen):
            counts = f"{batch_size!r:.50} rows that have seen {num_seen!r:.50} tokens, counted from {base!r:.50}"
            raise self.misfit(f"{counts}, can't be")
        stream.num_seen, stream.base, stream.knows_ids = num_seen, base, bool(self.number("knows_ids"))
        tensors = {name: self._take(name, view, batch_size) for name, view in views_of(stream).items()}
        self._restore_recurrent(cache, batch_size)
        if self.tensors:
            raise self.misfit(f"it has {min(self.tensors)}, and this model has nothing of that kind")
        stream.allocate(batch_size)
        for name, view in views_of(stream).items():
            view.copy_(tensors[name])
        for sinks in stream.groups:
            sinks.keep()
        cache.unseen_token_ids, cache.layers_reached = unseen, set(cache.traits.noted_layers)

    def _check_rotations(self, stream: Stream) -> None:
        for name, here in rotations_of(stream).items():
            here, there = here.cpu(), self._take(name, here, len(here))
            if not torch.allclose(here, there, rtol=1e-4, atol=0):  # another machine may round frequencies differently
                dim = int((here - there).abs().amax(0).argmax())
                sides = [f"with {partner:.0f} by {frequency:.6g}" for frequency, partner in (there[:, dim], here[:, dim])]
                raise self.misfit(f"{name} turns dimension {dim} {sides[0]} a position in the file, and {sides[1]} in this model")

    def _restore_recurrent(self, cache, batch_size: int) -> None:
        for index, layer in cache.recurrent.layers.items():
            states = {
                name: self._take(f"layers.{index}.recurrent.{name}", state, batch_size).to(state.device)
                for name, state in cache.traits.recurrent_states[index].items()
            }
            flags, num_states = self.number("has_previous_state", dict).get(str(index)), len(has_previous_state(layer))
            if not isinstance(flags, list) or len(flags) != num_states:
                raise self.misfit(f"layer {index} has {flags!r:.50} states in the file, and {num_states} in this model")
            restore_recurrent(layer, states, flags)

    def _take(self, name: str, like: torch.Tensor, num_rows: int) -> torch.Tensor:
        """A tensor of that name, with so many rows, and else like this one."""
        if name not in self.tensors:
            raise self.misfit(f"it has no {name}, which this model needs")
        tensor, shape = self.tensors.pop(name), [num_rows, *like.shape[1:]]
        if [*tensor.shape] != shape or tensor.dtype != like.dtype:
            raise self.misfit(f"{name} is {tensor.dtype} {[*tensor.shape]} in the file, and {like.dtype} {shape} here")
        return tensor

    def misfit(self, reason: str) -> ValueError:
        return self.refusal(f"it was changed after it was saved, or made for another model: {reason}")

    def refusal(self, reason: str) -> ValueError:
        return ValueError(f"Can't load {os.fspath(self.path)!r} as a SinkCache: {reason}.")


def rings_of(stream: Stream) -> dict[str, Ring]:
    return {f"layers.{index}.{kind}": ring for index, layer in stream.layers.items() for kind, ring in zip(KINDS, layer.rings)}


def rotations_of(stream: Stream) -> dict[str, torch.Tensor]:
    return {f"{name}.rotation": ring.rotation.as_tensor() for name, ring in rings_of(stream).items()}


def views_of(stream: Stream) -> dict[str, torch.Tensor]:
    """All that the tokens seen have left in the rings, and the slots of all sinks, by name. Dimension 0 has the rows."""
    rings = rings_of(stream) | ({"ids": stream.ids} if stream.knows_ids else {})
    num_tokens = max(*stream.num_seen, stream.ids.window.num_sinks)
    return {f"{name}.{part}": view for name, ring in rings.items() for part, view in ring.views(num_tokens).items()}


def settings_of(model: torch.nn.Module) -> dict:
    """What tells a model from others: its dtype, and the settings of its config. Weights are not compared."""
    settings = model.config.get_text_config(decoder=True).to_dict()
    settings = {
        name: value
        for name, value in settings.items()
        if isinstance(value, bool | int | float | str) and name not in NOT_SETTINGS and not name.startswith("_")
    }
    return settings | {"dtype": str(model.dtype)}


def are_counts(numbers, num_rows) -> bool:
    """Whether this is a list of whole numbers from 0 on, one for each row or a single one."""
    is_list = isinstance(numbers, list) and type(num_rows) is int and num_rows > 0 and len(numbers) in (1, num_rows)
    return is_list and all(type(number) is int and 0 <= number < 2**62 for number in numbers)
