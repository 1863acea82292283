"""A model in two processes gives what it gives in one: with its layers split over both, and with a text of its own in each."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from transformers import AutoModelForCausalLM

from checks import WINDOW, assert_same, feed, left_padded, random_ids
from custom_generate.generate import SinkCache, generate
from families import build_model
from oracle import oracle_logits

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")


def in_two_processes(function, folder, *args) -> None:
    """Runs `function(rank, folder, *args)` in each; fails if it does in one."""
    torch.multiprocessing.spawn(_start, args=(function, folder, args), nprocs=2)


def _start(rank, function, folder, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting_point", rank=rank, world_size=2)
    function(rank, folder, *args)
    dist.destroy_process_group()


def split_over_both(rank, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto", attn_implementation="sdpa")
    rows = [random_ids(80, seed=1), random_ids(67, seed=2)]
    ids, mask = left_padded(rows)
    whole = build_model("llama", "sdpa")
    cache = SinkCache.from_model(model, **WINDOW)
    logits = feed(model, cache, ids, [5, 30] + [1] * 20 + [11, 14], mask)
    num_heads = whole.config.num_key_value_heads
    assert cache.layers[0].keys.shape[1] == num_heads // 2, "keys of all heads: nothing was split"
    for row, row_ids in enumerate(rows):
        assert_same(logits[row : row + 1, -row_ids.shape[1] :], oracle_logits(whole, row_ids, **WINDOW))
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, **WINDOW}
    assert generate(ids, model=model, **options).equal(generate(ids, model=whole, **options))


def test_layers_that_are_split_over_processes(tmp_path):
    """`tp_plan="auto"`: each process has a part of the heads, and so of the keys."""
    pytest.importorskip("accelerate")
    build_model("llama").save_pretrained(tmp_path / "model")
    in_two_processes(split_over_both, tmp_path)


def with_a_text_of_its_own(rank, folder):
    ids = random_ids([60, 20][rank], seed=rank)

    def talk(model, **options):
        """A text, its continuation by the cache, and beams of it: the first process writes less at first, then more."""
        cache = SinkCache(**WINDOW)
        options |= {"model": model, "do_sample": False, "prefill_chunk_size": 16}
        text = generate(ids, past_key_values=cache, max_new_tokens=[2, 20][rank], **options)
        text = generate(text, past_key_values=cache, max_new_tokens=[20, 2][rank], **options)
        return text, generate(text, num_beams=2, max_new_tokens=[6, 2][rank], **WINDOW, **options), cache

    model = build_model("llama", "sdpa")
    *expected, expected_cache = talk(model)
    kinds = ["whole"]
    if hasattr(torch.distributed.fsdp, "fully_shard"):  # since torch 2.6
        kinds.append("sharded")
    for kind in kinds:
        if kind == "sharded":
            mesh = dist.init_device_mesh("cpu", (2,))
            for part in (*model.model.layers, model):
                torch.distributed.fsdp.fully_shard(part, mesh=mesh)
        *texts, cache = talk(model, synced_gpus=True)
        for text, expected_text in zip(texts, expected):
            assert text.equal(expected_text), kind
        assert cache.num_tokens_seen == expected_cache.num_tokens_seen == texts[0].shape[1] - 1
        assert cache.unseen_token_ids == expected_cache.unseen_token_ids
        for layer, expected_layer in zip(cache.layers, expected_cache.layers):
            torch.testing.assert_close(layer.keys, expected_layer.keys)


def test_a_process_that_has_done_keeps_step(tmp_path):
    """Where weights are sharded (here by FSDP2), no process can run the model alone: neither while it reads a longer prompt than the
    other does, nor when it writes more."""
    in_two_processes(with_a_text_of_its_own, tmp_path)
