"""Reusable buffers for the keys and values that a long pass hands out: its layers use them in turn."""

import math
import weakref

import numpy
import torch
from transformers.utils import is_torchdynamo_compiling


class Workspace:
    """Buffers on a CPU, where new memory for each layer would cost page faults: a tenth of the time of a long pass.

    The storage of a tensor keeps the `memoryview` alive that it was made from. A layer takes a buffer only if the `memoryview` of
    the layer before is gone: if a model keeps a tensor, its buffer is not written again.
    """

    def __init__(self):
        self.buffers: list[list] = []  # of bytes, each with a weak reference to its last `memoryview`

    def cat(self, tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
        """As `torch.cat`."""
        first = tensors[0]
        shape = list(first.shape)
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        num_bytes = math.prod(shape) * first.itemsize
        if num_bytes == 0 or first.device.type != "cpu" or is_torchdynamo_compiling():
            return torch.cat(tensors, dim)
        return torch.cat(tensors, dim, out=torch.frombuffer(self._take(num_bytes), dtype=first.dtype).view(shape))

    def _take(self, num_bytes: int) -> memoryview:
        buffer = next((buffer for buffer in self.buffers if len(buffer[0]) == num_bytes and buffer[1]() is None), None)
        if buffer is None:
            buffer = [numpy.empty(num_bytes, numpy.uint8), lambda: None]  # a bytearray would be filled with zeros first
            self.buffers.append(buffer)
        memory = memoryview(buffer[0])
        buffer[1] = weakref.ref(memory)
        return memory
