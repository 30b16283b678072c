"""A SAM sparse adapter on a language model: select, train, generate, merge, unmerge.

    python examples/02_causal_lm.py

trains a small Llama-shaped byte model on the running text of Python's own documentation, then adapts it to the code
and grammar listings of the same documentation with a sparse adapter, and generates from it. Needs no hub.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from pydoc_data.topics import topics
from typing import Any

import tasks
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from peft_sam import SamConfig, select_parameters

BLOCK = 128
END = 0  # a byte that does not occur in the text


def main() -> None:
    """Train a base model, adapt it, generate."""
    args = parse_arguments()
    set_seed(args.seed)
    prose, listings = " ".join(tasks.embedded_sentences()), embedded_listings()
    print(f"{len(prose):,} bytes of running text to learn from, {len(listings):,} bytes of listings to adapt to")

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=2 * BLOCK,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=END,
        )
    )
    train, held_out = split(blocks(prose))
    base = make_trainer(model, train, held_out, args.base_steps, learning_rate=3e-3, args=args)
    base.train()
    print(f"base model: {bits(base):.2f} bits a byte on held-out text")

    train, held_out = split(blocks(listings))
    model = get_peft_model(model, SamConfig(task_type="CAUSAL_LM", density=args.density))
    trainer = make_trainer(model, train, held_out, args.steps, learning_rate=5e-3, args=args)
    before = bits(trainer)
    print(select_parameters(trainer))
    trainer.train()
    print(f"listings:   {before:.2f} bits a byte before, {bits(trainer):.2f} after training")

    prompt = "class "
    with model.disable_adapter():
        print(f"\nwithout the adapter:\n{generate(model, prompt)}")
    unmerged = generate(model, prompt)
    print(f"\nwith the adapter:\n{unmerged}")
    original = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.merge_adapter()
    same_text = generate(model, prompt) == unmerged
    model.unmerge_adapter()
    restored = all(torch.equal(p, original[name]) for name, p in model.named_parameters() if name in original)
    print(f"\nmerged model writes the same text: {same_text}; unmerging restores every bit: {restored}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--density", type=float, default=0.02, help="share of the linear weights to train")
    parser.add_argument("--base-steps", type=int, default=400, help="steps of training the base model from scratch")
    parser.add_argument("--steps", type=int, default=400, help="steps of training the adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="output/causal_lm")
    return parser.parse_args()


def embedded_listings() -> str:
    """The indented code, grammar and tables of the documentation: the blocks that are no running text."""
    found = []
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            if block.startswith("   ") and not block.rstrip().endswith("."):
                found.append(textwrap.dedent(block).rstrip())
    return "\n\n".join(found)


def blocks(text: str) -> Dataset:
    """The text as byte numbers in blocks of equal length."""
    numbers = list(text.encode("ascii", errors="ignore"))
    rows = [numbers[start : start + BLOCK] for start in range(0, len(numbers) - BLOCK, BLOCK)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def split(data: Dataset) -> tuple[Dataset, Dataset]:
    """Nine tenths to train on, one tenth held out."""
    parts = data.train_test_split(test_size=0.1, seed=0)
    return parts["train"], parts["test"]


def make_trainer(
    model: Any, train: Dataset, held_out: Dataset, steps: int, learning_rate: float, args: argparse.Namespace
) -> Trainer:
    """A Trainer for `steps` steps with a cosine schedule."""
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            per_device_train_batch_size=16,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=held_out,
    )


def bits(trainer: Trainer) -> float:
    """Cross entropy on the held-out blocks, in bits a byte."""
    return trainer.evaluate()["eval_loss"] / math.log(2)


def generate(model: Any, prompt: str) -> str:
    """The likeliest continuation, byte by byte."""
    ids = torch.tensor([list(prompt.encode())], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=120,
            do_sample=False,
            repetition_penalty=1.1,
        )
    return bytes(out[0].tolist()).decode("ascii", errors="replace")


if __name__ == "__main__":
    main()
