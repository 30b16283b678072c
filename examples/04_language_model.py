"""A language model by TRL: select, fine-tune, measure what is learnt and what is forgotten, generate, merge and back.

    python examples/04_language_model.py

adapts SmolLM2-135M-Instruct (which lies in a wheel) to Python's own documentation with TRL's `SFTTrainer`, so it needs
no hub. "held out" is the mean loss a token on topics that are not trained on, "other" that on other English (the
licences of the installed packages), which rises where something is forgotten. Other models and data:

    python examples/04_language_model.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara    # names on the Hub

`--compare` trains a LoRA adapter of as many entries beside it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import language
import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

import peft_sam
from peft_sam import SamConfig, select_parameters

PROMPTS = ("The with statement is used to", "This licence allows you to")


@dataclass
class Result:
    """What one method came to; losses are means over tokens."""

    method: str
    trained: int
    held_out: float
    other: float
    seconds: float
    size: int


def main() -> None:
    """Train one or two adapters, print a table, generate."""
    args = parse_arguments()
    set_seed(args.seed)
    source = args.model or language.smollm2(Path(args.output))
    model, tokenizer = language.load(source)
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    entries = args.rank * sum(m.in_features + m.out_features for m in linear)
    # so many entries, and not one less by rounding
    density = args.density or (entries + 0.5) / sum(m.weight.numel() for m in linear)
    print("\nbefore:", *generated(model, tokenizer), sep="\n  ")

    trainer = make_trainer(
        model, tokenizer, SamConfig(task_type="CAUSAL_LM", density=density), args.learning_rate, args
    )
    before = losses(trainer)
    start = time.perf_counter()
    selection = select_parameters(trainer, max_batches=args.selection_batches)
    selecting = time.perf_counter() - start
    print(f"\n{selection}\n")
    selection.save(Path(args.output, "selection.safetensors"))  # select_parameters(trainer, selection=...) takes it
    results = [trained("SAM", trainer, selecting, args)]

    model = trainer.model
    print("\nafter:", *generated(model, tokenizer), sep="\n  ")
    original = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    start = time.perf_counter()
    unmerged, slow = generated(model, tokenizer), time.perf_counter() - start
    with peft_sam.merged(model):
        start = time.perf_counter()
        same, fast = generated(model, tokenizer) == unmerged, time.perf_counter() - start
    restored = all(torch.equal(p, original[name]) for name, p in model.named_parameters() if name in original)
    print(f"\nmerged, it writes the same text: {same}, in {fast:.1f} s instead of {slow:.1f}")
    print(f"afterwards every bit of the base is as before: {restored}")

    if args.compare:
        set_seed(args.seed)
        lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
        beside = make_trainer(language.load(source)[0], tokenizer, lora, args.lora_learning_rate, args)
        results.append(trained("LoRA", beside, 0.0, args))
    print(f"\n{'':<6} {'trained':>10} {'held out':>9} {'other':>7} {'seconds':>8} {'file, kB':>9}")
    print(f"{'before':<6} {'':>10} {before[0]:>9.3f} {before[1]:>7.3f}")
    for row in results:
        print(
            f"{row.method:<6} {row.trained:>10,} {row.held_out:>9.3f} {row.other:>7.3f} {row.seconds:>8.0f} "
            f"{row.size / 1000:>9,.0f}"
        )
    print(f"(of SAM's seconds {selecting:.0f} are the selection)")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a name on the Hub, or a folder; SmolLM2 by default")
    parser.add_argument("--dataset", help="a name on the Hub; Python's documentation by default")
    parser.add_argument("--rank", type=int, default=2, help="train as many entries as LoRA of this rank has")
    parser.add_argument("--density", type=float, help="train this share of the linear layers' entries instead")
    parser.add_argument("--selection-batches", type=int, default=8, help="batches that the gradient is a mean over")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a block")
    parser.add_argument("--test-blocks", type=int, default=64, help="blocks that each loss is a mean over")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--lora-learning-rate", type=float, default=6e-3)
    parser.add_argument("--compare", action="store_true", help="train LoRA beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="output/language_model")
    return parser.parse_args()


def make_trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, config: PeftConfig, learning_rate: float, args: argparse.Namespace
) -> SFTTrainer:
    """TRL's trainer, which puts the adapter in, with texts packed into blocks of equal length."""
    data = language.dataset(args.dataset)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            max_length=args.length,
            packing=True,
            packing_strategy="wrapped",
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=max(args.steps // 5, 1),
            report_to=[],
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=data["train"],
        eval_dataset={"held_out": data["test"], "other": language.other_english()},
        processing_class=tokenizer,
        peft_config=config,
    )
    for name, blocks in trainer.eval_dataset.items():
        trainer.eval_dataset[name] = blocks.shuffle(args.seed).select(range(min(args.test_blocks, len(blocks))))
    return trainer


def losses(trainer: SFTTrainer) -> tuple[float, float]:
    """Mean loss a token on held-out text and on other English."""
    found = trainer.evaluate()
    return found["eval_held_out_loss"], found["eval_other_loss"]


def trained(method: str, trainer: SFTTrainer, before: float, args: argparse.Namespace) -> Result:
    """Train, measure, and save the adapter; `before` are the seconds that went before."""
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    folder = Path(args.output, method.lower())
    trainer.model.save_pretrained(folder)
    size = (folder / "adapter_model.safetensors").stat().st_size
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return Result(method, count, *losses(trainer), before + seconds, size)


def generated(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The likeliest continuation of each prompt, on one line."""
    texts = []
    for prompt in PROMPTS:
        batch = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts.append(" ".join(tokenizer.decode(out[0], skip_special_tokens=True).split()))
    return texts


if __name__ == "__main__":
    main()
