"""A cache on disk: a safetensors file with its tensors and, in the metadata, its numbers as JSON. Nothing of a file is
executed."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .quantization import Quantization
from .recurrent import RecurrentStates
from .releases import has_previous_state, num_states, restore_recurrent
from .stream import KINDS, Stream

SAVED_FORMAT = 2
# Settings of a config that do not change what a model computes, or that are compared otherwise.
NOT_SETTINGS = frozenset(
    "dtype torch_dtype transformers_version attn_implementation use_cache output_attentions output_hidden_states return_dict "
    "bos_token_id eos_token_id pad_token_id".split()
)


@dataclass
class Saved:
    """What stands in a file."""

    tensors: dict[str, torch.Tensor]
    numbers: dict
    path: str | os.PathLike = ""

    @classmethod
    def of(cls, stream: Stream, recurrent: RecurrentStates, **numbers) -> "Saved":
        """Everything that a cache needs to go on in another process. What was recorded for a roll-back is left out."""
        for sinks in stream.groups:
            sinks.move([0])  # to where they came
        tensors = {name: view.contiguous() for name, view in views_of(stream).items()} | recurrent.tensors
        for index, layer in stream.layers.items():
            tensors |= {f"layers.{index}.{kind}.rotation": ring.rotation.as_tensor() for kind, ring in zip(KINDS, layer.rings)}
        flags = {str(index): has_previous_state(layer) for index, layer in recurrent.layers.items()}
        numbers |= {"batch_size": stream.batch_size, "num_seen": stream.num_seen, "base": stream.base}
        return cls(tensors, numbers | {"knows_ids": stream.knows_ids, "has_previous_state": flags, "format": SAVED_FORMAT})

    def write(self, path: str | os.PathLike) -> None:
        """In a file beside it first, so that there is never half of a file under this name."""
        beside = Path(f"{os.fspath(path)}.{os.getpid()}-{threading.get_ident()}.tmp")
        if os.path.isdir(path):
            raise IsADirectoryError(f"Can't save to {os.fspath(path)}: it is a folder. Name a file in it.")
        if not beside.parent.is_dir():
            raise FileNotFoundError(f"Can't save to {os.fspath(path)}: there is no folder {beside.parent}. Make it first.")
        try:
            tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}  # some share memory
            save_file(tensors, beside, {"sink_cache": json.dumps(self.numbers)})
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Saved":
        saved = cls({}, {}, path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no file {os.fspath(path)!r} to load a SinkCache from.")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = (file.metadata() or {}).get("sink_cache")
                saved.tensors = {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:
            raise saved.refusal(f"it was cut off, or it is no safetensors file ({error})") from error
        if metadata is None:
            raise saved.refusal("it is a safetensors file that SinkCache.save has not written, such as the weights of a model")
        if metadata[:1] != "{":  # format 1 begins with a checksum
            raise saved.refusal('it has format 1. Load it with the version of sink_cache that wrote it, revision="v1"')
        try:
            saved.numbers = json.loads(metadata)
        except ValueError as error:
            raise saved.refusal(f"it was changed: what it says is no JSON ({error})") from error
        if saved.number("format") != SAVED_FORMAT:
            raise saved.refusal(
                f"it has format {saved.number('format')}, and this code reads format {SAVED_FORMAT}. Update sink_cache"
            )
        return saved

    def number(self, name: str):
        if name not in self.numbers:
            raise self.misfit(f"it does not say {name}")
        return self.numbers[name]

    def check_made_for(self, model: torch.nn.Module, expected: dict) -> None:
        """Refuse a cache of another kind than `expected`, or for a model with other settings."""
        for name, value in expected.items():
            value = vars(Quantization.of(value)) if name == "quantized" and value is not None else value
            there = self.number("arguments").get(name)
            if value is not None and value != there:
                raise self.refusal(f"{name} is {there} in the file, and {value} was asked for")
        here, there = settings_of(model), self.number("model")
        for name in here.keys() & there.keys():
            if here[name] != there[name]:
                sides = f"{name} is {there[name]!r:.80} in the file, and {here[name]!r:.80} here"
                raise self.refusal(f"it was made for another model: {sides}. Load the model for which it was saved")

    def restore(self, stream: Stream, recurrent: RecurrentStates) -> list[int] | None:
        """Fill a new stream. Returns the last token returned for each row."""
        batch_size, num_seen, base = self.number("batch_size"), self.number("num_seen"), self.number("base")
        if batch_size == -1:
            return None
        unseen = self.number("unseen_token_ids")
        if not all(are_counts(numbers, batch_size) for numbers in (num_seen, base, unseen or [0])) or len(num_seen) != len(base):
            counts = f"{num_seen!r:.50} tokens, counted from {base!r:.50}"
            raise self.misfit(f"{batch_size!r:.50} rows that have seen {counts}, can't be")
        self._restore_recurrent(recurrent, batch_size, stream.ids.slots.device)
        self._check_rotations(stream)
        for name, tensor in self.tensors.items():  # before any memory is allocated
            if tensor.shape[:1] != (batch_size,):
                raise self.misfit(f"{name} is {list(tensor.shape)} in the file, and has {batch_size} rows here")
        num_held = min(max(num_seen), stream.ids.window.length)
        if num_held > sum(tensor.numel() for tensor in self.tensors.values()):
            raise self.misfit(f"{num_held} tokens are said to be held, and it has not so many numbers")
        with torch.inference_mode(False):
            stream.allocate(batch_size)
            stream.num_seen, stream.base, stream.knows_ids = num_seen, base, bool(self.number("knows_ids"))
            views = views_of(stream)
            for name, view in views.items():
                view.copy_(self._take(name, view))
            for sinks in stream.groups:
                sinks.are_new = True
        if self.tensors:
            raise self.misfit(f"it has {min(self.tensors)}, and this model has nothing of that kind")
        return unseen

    def _restore_recurrent(self, recurrent: RecurrentStates, batch_size: int, device: torch.device) -> None:
        """States, whose shapes only the model knows."""
        flags = self.number("has_previous_state")
        for index, layer in recurrent.layers.items():
            prefix, flag = f"layers.{index}.recurrent.", flags.get(str(index))
            kinds = ("conv_states", "recurrent_states")
            expected = {f"{prefix}{kind}.{key}" for kind in kinds for key in range(num_states(layer))}
            states = {name.removeprefix(prefix): self.tensors.pop(name) for name in expected & self.tensors.keys()}
            if not isinstance(flag, list) or len(flag) != num_states(layer):
                raise self.misfit(f"layer {index} has {flag!r:.50} states in the file, and {num_states(layer)} in this model")
            for name, state in states.items():
                if state.shape[:1] != (batch_size,):
                    raise self.misfit(f"{prefix}{name} is {list(state.shape)} in the file, and has {batch_size} rows here")
            restore_recurrent(layer, {name: state.to(device) for name, state in states.items()}, flag)

    def _check_rotations(self, stream: Stream) -> None:
        for index, layer in stream.layers.items():
            for kind, ring in zip(KINDS, layer.rings):
                name, here = f"layers.{index}.{kind}.rotation", ring.rotation.as_tensor().cpu()
                there = self._take(name, here)
                if not torch.allclose(here, there, rtol=1e-4, atol=0):  # another machine may round frequencies differently
                    dim = int((here - there).abs().amax(0).argmax())
                    raise self.misfit(
                        f"{name} turns dimension {dim} with {there[1, dim]:.0f} by {there[0, dim]:.6g} a position in the file, "
                        f"and with {here[1, dim]:.0f} by {here[0, dim]:.6g} in this model"
                    )

    def _take(self, name: str, like: torch.Tensor) -> torch.Tensor:
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise self.misfit(f"it has no {name}, which this model needs")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise self.misfit(
                f"{name} is {tensor.dtype} {list(tensor.shape)} in the file, and {like.dtype} {list(like.shape)} here"
            )
        return tensor

    def misfit(self, reason: str) -> ValueError:
        return self.refusal(f"it was changed after it was saved, or made for another model: {reason}")

    def refusal(self, reason: str) -> ValueError:
        return ValueError(f"Can't load {os.fspath(self.path)!r} as a SinkCache: {reason}.")


def save_cache(cache, path: str | os.PathLike) -> None:
    """`SinkCache.save`."""
    cache.require_model()
    cache.stream.settle()
    if cache.stream.current is not None or cache.is_interrupted:
        raise ValueError(
            "Can't save in the middle of a pass: it has not been through all layers. Save after the model's forward pass. If it "
            "was interrupted, run it again first, model(**cache.prepare(...)), or save a copy that was made before."
        )
    cache.settle()
    if cache.model() is None:
        raise ValueError("Can't save a cache whose model is gone: the file has to say which model can go on from it.")
    numbers = {"model": settings_of(cache.model()), "arguments": cache.arguments, "unseen_token_ids": cache.unseen_token_ids}
    Saved.of(cache.stream, cache.recurrent, **numbers).write(path)


def load_cache(cls, path: str | os.PathLike, model: torch.nn.Module, expected: dict):
    """`SinkCache.load`."""
    saved = Saved.read(path)
    saved.check_made_for(model, expected)
    try:
        cache = cls.from_model(model, **saved.number("arguments"))
    except TypeError as error:
        raise saved.refusal(f"it was changed since it was written ({error})") from error
    cache.unseen_token_ids = saved.restore(cache.stream, cache.recurrent)
    cache.layers_reached = set(cache.traits.noted_layers)
    return cache


def views_of(stream: Stream) -> dict[str, torch.Tensor]:
    """All that the tokens seen have left in the rings, by name."""
    if stream.batch_size == -1:
        return {}
    rings = {f"layers.{index}.{kind}": ring for index, layer in stream.layers.items() for kind, ring in zip(KINDS, layer.rings)}
    rings |= {"ids": stream.ids} if stream.knows_ids else {}
    num_tokens = max(stream.num_seen)
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
