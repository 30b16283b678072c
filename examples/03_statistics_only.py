"""The choosing half alone: gradient statistics of any model, as masks for PEFT's own sparse tuners.

    python examples/03_statistics_only.py

No SAM adapter here. `accumulate` runs over the data, `choose` picks entries, and the masks go into stock PEFT: SHiRA
takes a mask function, Super-Tuning a saved adapter with other positions in it. Each is trained beside its own rule
(random entries; the largest weights), on sentences from Python's own documentation.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import tasks
import torch
from peft import PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_sam import Loss, accumulate, choose

HEAD = "classifier"


def main() -> None:
    """Statistics, masks, four trainings."""
    args = parse_arguments()
    name = tasks.default_model_path()
    tokenizer = AutoTokenizer.from_pretrained(name)
    task = tasks.tokenise(tasks.embedded_task(seed=args.seed), tokenizer, 64)
    if args.examples:
        task = replace(task, train=task.train.select(range(min(args.examples, len(task.train)))))
    collator = DataCollatorWithPadding(tokenizer)

    def base_model() -> Any:
        set_seed(args.seed)
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)

    # 1. the gradient of the mean loss, for any nn.Module, batches and loss
    model = base_model()
    weights = {f"{module}.weight": m.weight for module, m in linear_layers(model).items()}
    loader = DataLoader(task.train, batch_size=16, collate_fn=collator)  # type: ignore[arg-type]
    found = accumulate(
        model, weights, loader, lambda batch: Loss(model(**batch).loss, len(batch["labels"])), total=len(loader)
    )
    print(f"{found.samples:,.0f} examples in {found.seconds:.0f} s")

    # 2. as many entries of each layer as the tuner would take, those with the largest gradient
    gradient = found.tensors["gradient"]
    per_layer = choose(weights, score="sam", density=args.density, budget="tensor", statistics={"gradient": gradient})
    print(per_layer)

    # 3. into stock PEFT
    tuners = {
        "SHiRA, random": lambda: shira(base_model(), args.rank, {}),
        "SHiRA, gradient": lambda: shira(base_model(), args.rank, gradient),
        "Super-Tuning, magnitude": lambda: supertuning(base_model(), args.density),
        "Super-Tuning, gradient": lambda: with_positions(
            supertuning(base_model(), args.density), base_model(), per_layer.indices, Path(args.output)
        ),
    }
    rows = []
    for method, make in tuners.items():
        tuned = make()
        trained = sum(p.numel() for n, p in tuned.named_parameters() if p.requires_grad and HEAD not in n)
        trainer = Trainer(
            model=tuned,
            args=TrainingArguments(
                output_dir=args.output,
                learning_rate=args.learning_rate,
                max_steps=args.steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=64,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                seed=args.seed,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=task.train,
            eval_dataset=task.validation,
            data_collator=collator,
            compute_metrics=lambda found: task.metric(found.predictions, found.label_ids),
        )
        trainer.train()
        rows.append(f"{method:<26}{trained:>10,}{trainer.evaluate()['eval_accuracy']:>10.3f}")
    print("\n".join([f"\n{'':<26}{'trained':>10}{'accuracy':>10}", *rows]))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers but the head."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != HEAD}


def shira(model: Any, rank: int, gradient: dict[str, Tensor]) -> Any:
    """SHiRA with its random masks, or with masks of the largest gradients of each layer."""
    config = ShiraConfig(task_type="SEQ_CLS", r=rank, target_modules=list(linear_layers(model)), random_seed=0)
    if gradient:
        names = {id(layer): f"{name}.weight" for name, layer in linear_layers(model).items()}

        def mask(layer: nn.Linear, r: int, **_: Any) -> Tensor:
            of_layer = gradient[names[id(layer)]].abs().flatten()
            mask = torch.zeros_like(layer.weight).flatten()
            mask[of_layer.topk(r * (layer.in_features + layer.out_features)).indices] = 1
            return mask.view_as(layer.weight)

        config.mask_fn = mask
    return get_peft_model(model, config)


def supertuning(model: Any, density: float) -> Any:
    """Super-Tuning on the largest weights."""
    config = SupertuningConfig(task_type="SEQ_CLS", sparsity=1 - density, target_modules=list(linear_layers(model)))
    return get_peft_model(model, config)


def with_positions(tuned: Any, base: Any, indices: dict[str, Tensor], output: Path) -> Any:
    """The Super-Tuning adapter with other positions: saved, changed in its file, and loaded by PEFT."""
    folder = output / "supertuning"
    tuned.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for key in [key for key in state if "supertuning_indices" in key]:
        name = key.removeprefix("base_model.model.").partition(".supertuning_indices")[0]
        positions = indices[f"{name}.weight"]
        if len(positions) != len(state[key]):
            raise ValueError(f"{name}: {len(positions)} positions for {len(state[key])} places")
        state[key] = positions.to(state[key].dtype)
    save_file(state, file, metadata={"format": "pt"})
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--density", type=float, default=0.005, help="share of each layer for Super-Tuning")
    parser.add_argument("--rank", type=int, default=1, help="SHiRA trains rank * (inputs + outputs) entries a layer")
    parser.add_argument("--examples", type=int, help="use only so many training examples")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="output/statistics", help="folder for the changed adapter")
    return parser.parse_args()


if __name__ == "__main__":
    main()
