"""Layers that have a recurrent or convolutional state, alone or beside keys and values. The states are those of transformers."""

import contextlib

import torch
from transformers import DynamicCache
from transformers.utils import is_torchdynamo_compiling

from .layers import SinkLayer, selected
from .plan import Pass
from .probe import ModelTraits
from .releases import LinearAttentionLayer, has_previous_state, named_states, restore_recurrent


class RecurrentLayer(LinearAttentionLayer):
    """A layer with a state, as transformers made it for the model. If it has keys and values too, they stand in the stream."""

    is_croppable = False

    def __init__(self, own: LinearAttentionLayer, is_sliding: bool):
        vars(self).update(vars(own) | {"is_sliding": is_sliding})

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Make room for a state in which it can be changed in any mode. (A graph that is being captured can't leave its mode.)"""
        with contextlib.nullcontext() if is_torchdynamo_compiling() else torch.inference_mode(False):
            super().lazy_initialization(*args, **kwargs)


def layers_of_model(config, sink_layers: dict[int, SinkLayer]) -> list:
    """One layer for each layer of the model: ours for keys and values, and those of transformers for everything else."""
    layers = DynamicCache(config=config).layers
    for index, own in enumerate(layers):
        layer = sink_layers.get(index)
        if isinstance(own, LinearAttentionLayer):
            layers[index] = RecurrentLayer(own, is_sliding=layer is not None and layer.is_sliding)
        elif layer is not None:
            layers[index] = layer
    return layers


class RecurrentStates:
    """The states of all layers of a cache.

    Attributes:
        layers: the layers that have a state, by their numbers.
        idle: by the name of a state, rows that bring nothing but padding in the last pass, and what they had before. A recurrent
            layer goes on over padding as if it were text, so that this has to be put back.
    """

    def __init__(self, layers: list):
        self.layers = {index: layer for index, layer in enumerate(layers) if isinstance(layer, LinearAttentionLayer)}
        self.idle: dict[str, tuple[list[int], torch.Tensor]] = {}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All states, by names such as `layers.3.recurrent.conv_states.0`. Rows are dimension 0."""
        named = {f"layers.{index}.recurrent": named_states(layer) for index, layer in self.layers.items()}
        return {f"{layer}.{name}": state for layer, states in named.items() for name, state in states.items()}

    def allocate(self, traits: ModelTraits, batch_size: int) -> None:
        """For static mode: all states at once, as zeros; in place if there are as many rows."""
        has_room = {len(state) for state in self.tensors.values()} == {batch_size}
        for index, layer in self.layers.items():
            LinearAttentionLayer.reset(layer)
            if not has_room:
                states = traits.recurrent_states[index]
                states = {name: state.new_zeros(batch_size, *state.shape[1:]) for name, state in states.items()}
                restore_recurrent(layer, states, [False] * len(has_previous_state(layer)))

    def begin(self, current: Pass) -> None:
        """Keep the states of idle rows."""
        num_new = current.num_new * (current.batch_size // len(current.num_new))
        rows = [row for row, new in enumerate(num_new) if new == 0]
        states = self.tensors if rows and any(current.num_seen) else {}
        self.idle = {name: (rows, state[rows]) for name, state in states.items()}

    def settle(self) -> None:
        """After a pass: put back the states of idle rows. What is held has no history, or a graph would grow with the text."""
        states = self.tensors
        for state in states.values():
            if state.requires_grad:
                state.detach_()
        for name, (rows, idle) in self.idle.items():
            states[name][rows] = idle
        self.idle = {}

    def select_rows(self, index: torch.Tensor) -> None:
        """Row i becomes a copy of row `index[i]`; in the same memory if there are as many rows as before."""
        for layer in self.layers.values():
            states = named_states(layer).values()
            if any(len(state) != len(index) for state in states):
                LinearAttentionLayer.reorder_cache(layer, index)
                continue
            for state in states:
                selected(state, index.to(state.device))
