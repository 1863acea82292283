"""Memory that the layers of a long pass use in turn: it is written again only when nothing is left of the tensor that stood there."""

import pytest
import torch

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, feed, random_ids
from custom_generate.generate import SinkCache
from custom_generate.workspace import Workspace
from families import build_model
from test_memory import reachable


def pieces(seed: int, dtype: torch.dtype = torch.float32, dim: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [[2, 3, 4], [2, 3, 4]]
    shapes[1][dim] = 5
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_torch_cat(dtype, dim):
    workspace = Workspace()
    for seed in range(3):
        tensors = pieces(seed, dtype, dim)
        cat = workspace.cat(tensors, dim)
        assert cat.is_contiguous() and torch.equal(cat, torch.cat(tensors, dim))


def test_heads_without_dimensions():
    """Of a latent attention in which nothing is rotated, keys have none."""
    tensors = [torch.zeros(2, 3, 0), torch.zeros(2, 4, 0)]
    assert Workspace().cat(tensors, 1).shape == (2, 7, 0)


def test_memory_is_taken_again_when_nothing_is_left_there():
    workspace = Workspace()
    first = workspace.cat(pieces(0), 1)
    pointer = first.data_ptr()
    del first
    second = workspace.cat(pieces(1), 1)
    assert second.data_ptr() == pointer
    del second
    assert workspace.cat(pieces(2, dim=2), 2).data_ptr() != pointer  # of another size


KEPT = {
    "tensor": lambda tensor: tensor,
    "view": lambda tensor: tensor[:, 1:].transpose(0, 1),
    "detached": torch.Tensor.detach,
    "storage": torch.Tensor.untyped_storage,
    "bytes": torch.Tensor.numpy,
    "saved for backward": lambda tensor: tensor * torch.ones(1, requires_grad=True),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_not_written_again(name):
    workspace = Workspace()
    first = workspace.cat(pieces(0), 1)
    pointer, kept = first.data_ptr(), KEPT[name](first)
    del first
    assert workspace.cat(pieces(1), 1).data_ptr() != pointer
    del kept
    assert pointer in [workspace.cat(pieces(seed), 1).data_ptr() for seed in range(2)]


def long_pass(num_parts: int, note) -> SinkCache:
    """Twelve tokens over a full window. `note` is called with the keys and with the values that each layer is handed."""
    model, stream = build_model("llama"), random_ids(WINDOW_LENGTH + 12, num_rows=2)
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    feed(model, cache, stream[:, :WINDOW_LENGTH], [WINDOW_LENGTH])

    def update(*args, **kwargs):
        both = SinkCache.update(cache, *args, **kwargs)
        for each in both:
            note(each)
        return both

    cache.update = update
    feed(model, cache, stream[:, WINDOW_LENGTH:], [(12, num_parts)])
    return cache


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_model_may_keep_what_it_is_handed(num_parts, mode):
    """As models do in which later layers attend to the keys of former layers."""
    handed_out = []
    with mode():
        cache = long_pass(num_parts, lambda each: handed_out.append((each, each.clone())))
    assert len(handed_out) == 2 * len(cache.layers) > 2
    assert all(torch.equal(each, before) for each, before in handed_out)


@pytest.mark.parametrize("num_parts", [1, 3])
def test_the_layers_of_a_long_pass_use_it_in_turn(num_parts):
    pointers = []
    with torch.no_grad():
        cache = long_pass(num_parts, lambda each: pointers.append(each.data_ptr()))
    assert len({*zip(pointers[::2], pointers[1::2])}) < len(cache.layers)
    assert not any(isinstance(each, Workspace) for each in reachable(cache.stream)), "the memory of a pass goes with the pass"


def test_a_model_with_gradients_goes_back_through_a_long_pass():
    model, stream = build_model("llama"), random_ids(WINDOW_LENGTH + 12)
    cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    model(**cache.prepare(stream[:, :WINDOW_LENGTH]))
    logits = model(**cache.prepare(stream[:, WINDOW_LENGTH:], num_parts=3)).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), model.model.layers[0].self_attn.q_proj.weight)
    assert gradient.abs().sum() > 0
