"""A compiled forward pass: the same logits, and no new graph at each token."""

import torch
from torch._dynamo.utils import counters

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, assert_same, random_ids
from custom_generate.generate import generate
from families import build_model
from oracle import oracle_logits


def test_a_compiled_forward_follows_the_rules_in_few_graphs():
    """Filling, over the edge and far past it, with turned-back positions on the way. The code is captured, not translated: what a
    backend makes of it is torch's business."""
    model = build_model("llama", "sdpa", num_hidden_layers=2)
    compiled = build_model("llama", "sdpa", num_hidden_layers=2)
    torch._dynamo.reset()
    counters.clear()
    compiled.forward = torch.compile(compiled.forward, backend="eager", dynamic=True)
    outputs = generate(
        random_ids(5),
        model=compiled,
        window_length=WINDOW_LENGTH,
        num_sink_tokens=NUM_SINK_TOKENS,
        max_new_tokens=5 * WINDOW_LENGTH,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = oracle_logits(model, outputs.sequences[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)
    assert_same(torch.stack(outputs.logits, dim=1), expected[:, 4:])
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 6
