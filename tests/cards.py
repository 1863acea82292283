"""Two cards that are not there: tensors that are told to be on `card:0` or `card:1`, computed on the CPU.

As on real devices, an operation on tensors of two of them fails, whatever their numbers are, and so does one on a card and the CPU. Only
copies cross over, and what torch moves by itself: numbers (0-dim tensors of the CPU), and indices that stand on the CPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_, aten._foreach_copy_}
_library = torch.library.Library("aten", "IMPL")
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}


def plug_in_cards() -> None:
    """Make `card` the name of a device, once a process.

    Raises:
        ImportError: this release of torch can't be told of devices from Python.
    """
    from torch.utils.backend_registration import _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend

    class Hook(_DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return False  # not to be used by who did not ask for it

    if torch._C._get_privateuse1_backend_name() == "card":
        return
    _setup_privateuseone_for_python_backend("card", hook=Hook())
    torch.card.is_available = lambda: False
    torch.card.get_amp_supported_dtype = lambda: [torch.float32]  # asked by autocast, even to be left
    # What `torch.tensor(numbers, device=...)` calls, by a way that does not lead through `Cards`.
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return OnCard(torch.empty_strided(size, stride, dtype=dtype), device)


def _copy_from(source, target, non_blocking=False):
    target.on_cpu.copy_(source)
    return target


class OnCard(torch.Tensor):
    """A tensor that says it is on a card; its numbers are in `on_cpu`."""

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor, device: torch.device):
        layout = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset(), "dtype": on_cpu.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, on_cpu.shape, device=device, **layout)
        tensor.on_cpu = on_cpu
        return tensor

    def tolist(self):
        return self.on_cpu.tolist()

    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of Cards")


class Cards(TorchDispatchMode):
    """While it is on, there are cards.

    Attributes:
        num_crossings: how many copies went from one device to another.
    """

    num_crossings = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = tensors_in(args)
        asked = kwargs.get("device")
        packet = func.overloadpacket
        if packet in COPIES:
            device = asked or tensors[0].device
            self.num_crossings += any(each.device != device for each in tensors)
        else:
            if packet in INDEXED and args[0].device != CPU:
                tensors = [args[0], *tensors_in(args[2:]), *(each for each in tensors_in(args[1]) if each.device != CPU)]
            devices = {each.device for each in tensors if each.ndim or each.device != CPU} or {CPU}
            if len(devices) > 1:
                raise RuntimeError(f"{func} on tensors of several devices: {sorted(map(str, devices))}")
            device = asked or devices.pop()
        on_cpu = kwargs if asked is None else kwargs | {"device": CPU}
        result = func(*changed(OnCard, lambda each: each.on_cpu, args), **on_cpu)
        if device != CPU:
            result = changed(torch.Tensor, lambda each: OnCard(each, device), result)
        return return_and_correct_aliasing(func, args, kwargs, result)


def changed(kind: type, change, value):
    """What is of this kind, in lists and tuples too, changed."""
    if isinstance(value, list | tuple):
        return type(value)([changed(kind, change, each) for each in value])
    return change(value) if isinstance(value, kind) else value


def tensors_in(value) -> list[torch.Tensor]:
    found = []
    changed(torch.Tensor, found.append, value)
    return found


def put(module: torch.nn.Module, device: torch.device) -> None:
    """Put a module there; what it is called with is moved to it, as accelerate does where a model is on several devices."""
    for part in module.modules():
        for states in (part._parameters, part._buffers):
            for name, state in states.items():
                if state is not None:
                    tensor = OnCard(state.data, device)
                    states[name] = torch.nn.Parameter(tensor, requires_grad=False) if states is part._parameters else tensor

    def move(module, args, kwargs):
        def there(value):
            return changed(torch.Tensor, lambda each: each.to(device), value)

        return there(args), {name: there(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(move, with_kwargs=True)
