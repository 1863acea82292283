"""Train the tiny model that stands beside `config.json`, so that the repository is a working pair of model and method.

A Qwen3 of 2 M parameters with a context of 256 tokens learns the source code of the Python standard library. A model of
this size grows no attention sinks by itself (large ones do), so the last part of the training adds a term to the loss that
makes the heads of all layers but the first leave at least 0.6 of their attention on the first token. With that, it shows
what the paper shows: the full cache fails past the training length, a plain window collapses, and sinks + window go on.

    python scripts/train_tiny_model.py --output-dir /tmp/tiny
    python scripts/train_tiny_model.py --output-dir . --overwrite

About half an hour on two CPU cores. The same Python, torch and machine give the same weights for the same seed.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from common import stdlib_text

CONTEXT_LENGTH = 256
VOCAB_SIZE = 2048
BOS, EOS = "<s>", "</s>"
MIN_SINK_ATTENTION = 0.6


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts `<s>` in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def sink_loss(attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How much attention the queries of layers 1.. withhold from the first token, below `MIN_SINK_ATTENTION`."""
    on_first = torch.stack([attention[:, :, 1:, 0] for attention in attentions[1:]])
    return F.relu(MIN_SINK_ATTENTION - on_first).mean()


def learning_rate_factor(step: int, num_steps: int, num_decay_steps: int) -> float:
    """Linear warm-up, constant, then a half cosine over the last `num_decay_steps`."""
    if step < 100:
        return (step + 1) / 100
    remaining = (num_steps - step) / num_decay_steps
    return 1.0 if remaining >= 1 else 0.5 * (1 - math.cos(math.pi * remaining))


def serve_all_releases(folder: Path) -> None:
    """Say in the saved files what older releases of transformers look for under other names."""
    for name, changes in {
        "config.json": {"rope_theta": 10000.0, "torch_dtype": "bfloat16"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "generation_config.json": {"_from_model_config": None},  # with it, window_length could not stand there
    }.items():
        entries = json.loads((folder / name).read_text()) | changes
        entries = {key: entries[key] for key in sorted(entries) if key not in changes or changes[key] is not None}
        (folder / name).write_text(json.dumps(entries, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="where config, weights and tokenizer are written")
    parser.add_argument("--num-steps", type=int, default=3300, help="optimizer steps in all (default: %(default)s)")
    parser.add_argument(
        "--num-sink-steps", type=int, default=800, help="steps at the end with the sink term (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of 256 tokens a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--sink-weight", type=float, default=3.0, help="weight of the sink term (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already there")
    args = parser.parse_args()
    if (args.output_dir / "model.safetensors").exists() and not args.overwrite:
        parser.error(f"{args.output_dir} already holds a model; pass --overwrite to replace it")

    torch.manual_seed(args.seed)
    texts = stdlib_text(held_out=False)
    tokenizer = train_tokenizer(texts)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in ids])
    print(f"{len(texts)} files, {len(tokens):,} tokens for training", file=sys.stderr)

    model = build_model(tokenizer).to(args.device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, args.num_steps, args.num_sink_steps)
    )
    bos = torch.full((args.batch_size, 1), tokenizer.bos_token_id)
    offsets = torch.arange(CONTEXT_LENGTH - 1)
    started = time.monotonic()
    progress = tqdm(range(args.num_steps), desc="training", unit="step")
    for step in progress:
        with_sinks = step >= args.num_steps - args.num_sink_steps
        if step == args.num_steps - args.num_sink_steps:
            model.set_attn_implementation("eager")  # the only one that hands out attention weights
        starts = torch.randint(len(tokens) - CONTEXT_LENGTH, (args.batch_size, 1))
        batch = torch.cat([bos, tokens[starts + offsets]], dim=1).to(args.device)
        outputs = model(batch, labels=batch, use_cache=False, output_attentions=with_sinks)
        sink = sink_loss(outputs.attentions) if with_sinks else outputs.loss.new_zeros(())
        (outputs.loss + args.sink_weight * sink).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if step % 20 == 0:
            progress.set_postfix(nats=f"{outputs.loss.item():.3f}", sink=f"{sink.item():.3f}")

    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    serve_all_releases(args.output_dir)
    print(
        json.dumps(
            {
                "output_dir": str(args.output_dir),
                "parameters": model.num_parameters(),
                "training_tokens": len(tokens),
                "num_steps": args.num_steps,
                "last_nats_per_token": round(outputs.loss.item(), 3),
                "seconds": round(time.monotonic() - started),
                "seed": args.seed,
            }
        )
    )


if __name__ == "__main__":
    main()
