"""Memory for the keys and values that a long pass hands out, which its layers use in turn."""

import math
import weakref

import numpy
import torch
from transformers.utils import is_torchdynamo_compiling


class Workspace:
    """Blocks of memory on a CPU, where new memory for each layer would cost page faults: a tenth of the time of a long pass.

    The storage of a tensor keeps the `memoryview` alive that it was made from. A layer takes a block only if the `memoryview` of
    the layer before is gone: if a model keeps a tensor, its block is not written again.
    """

    def __init__(self):
        self.blocks: list[list] = []  # of bytes, each with a weak reference to its last `memoryview`

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
        block = next((block for block in self.blocks if len(block[0]) == num_bytes and block[1]() is None), None)
        if block is None:
            block = [numpy.empty(num_bytes, numpy.uint8), None]  # not a bytearray, which would be filled with zeros first
            self.blocks.append(block)
        memory = memoryview(block[0])
        block[1] = weakref.ref(memory)
        return memory
