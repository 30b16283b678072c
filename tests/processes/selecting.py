"""Selects with however many processes launched this script; each writes its selections to the given folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from peft_sam import SamConfig, Selection, select_parameters
from tests.shared.cases import VOCABULARY, bert, gpt2

Rows = list[dict[str, Any]]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows one after the other, without a length."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def sentences(number: int) -> Rows:
    ids = torch.randint(1, VOCABULARY, (number, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row.tolist(), "labels": int(row[0] > VOCABULARY // 2)} for row in ids]


def texts(number: int) -> Rows:
    """Of unequal length."""
    rows = sentences(number)
    return [{"input_ids": row["input_ids"][: 3 + i % 5]} for i, row in enumerate(rows)]


def together(rows: Rows) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def padded(rows: Rows) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.where(ids > 0, -100)}


def by_loader(data: Any, batch_size: int, model: Any, collate: Any, **options: Any) -> Selection:
    accelerator = Accelerator(cpu=True, **options)
    loader = DataLoader(data, batch_size=batch_size, collate_fn=collate)
    if options:
        loader = accelerator.prepare(loader)
    return select_parameters(model, loader, accelerator=accelerator, progress=False)


def by_trainer(rows: Rows, model: Any, folder: str) -> Selection:
    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=3, use_cpu=True, report_to=[]
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=together)  # type: ignore[arg-type]
    return select_parameters(trainer, progress=False)


def classifier(**options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(bert(), SamConfig(task_type="SEQ_CLS", density=0.05, **options))


def generator() -> Any:
    torch.manual_seed(0)
    return get_peft_model(gpt2(), SamConfig(task_type="CAUSAL_LM", density=0.05))


def with_a_warm_head(rows: Rows, rows_of_a_step: int, **options: Any) -> Selection:
    """Steps of dense training see the same rows however many processes share them."""
    model = classifier(**options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(rows, batch_size=rows_of_a_step // accelerator.num_processes, collate_fn=together)  # type: ignore[arg-type]
    return select_parameters(
        model, loader, accelerator=accelerator, head_warmup_steps=3, head_warmup_lr=0.02, progress=False
    )


def alone(rows: Rows) -> Selection:
    """Without Accelerate each process brings its share."""
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    batches = [together(mine[start : start + 3]) for start in range(0, len(mine), 3)]
    return select_parameters(classifier(), batches, progress=False)


SCENARIOS: dict[str, Callable[[str], Selection]] = {
    "sizes that divide": lambda _: by_loader(sentences(24), 2, classifier(), together),
    "sizes that do not divide": lambda _: by_loader(sentences(23), 3, classifier(), together),
    "fewer batches than processes": lambda _: by_loader(sentences(5), 3, classifier(), together),
    "texts of unequal length": lambda _: by_loader(texts(17), 3, generator(), padded),
    "a prepared loader, accumulating": lambda _: by_loader(
        sentences(23), 3, classifier(), together, gradient_accumulation_steps=4
    ),
    "a stream": lambda _: by_loader(
        Stream(sentences(23)),
        3,
        classifier(),
        together,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
    ),
    "a stream that the first process reads": lambda _: by_loader(
        Stream(sentences(23)),
        3,
        classifier(),
        together,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=True),
    ),
    "a warm head": lambda _: with_a_warm_head(sentences(23), 12),
    "a warm head and movement": lambda _: with_a_warm_head(sentences(23), 12, score="movement"),
    "torch.distributed alone": lambda _: alone(sentences(23)),
    "a Trainer, accumulating": lambda folder: by_trainer(sentences(23), classifier(), folder),
}


def collectives(batches: int) -> int:
    """How many collectives a selection takes, by its number of batches."""
    number = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal number
            number += 1
            return function(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")
    kept = {name: getattr(dist, name) for name in names}
    try:
        for name, function in kept.items():
            setattr(dist, name, counted(function))
        accelerator = Accelerator(cpu=True)
        model = classifier()
        each = [together(sentences(3))] * batches
        select_parameters(model, each, accelerator=accelerator, progress=False)
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
    return number


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), Accelerator(cpu=True).process_index
    folder.mkdir(exist_ok=True)
    for name, scenario in SCENARIOS.items():
        scenario(str(folder / "trainer")).save(folder / f"{name}-{rank}.safetensors")
    (folder / f"collectives-{rank}.json").write_text(json.dumps([collectives(1), collectives(5)]))
    Accelerator().end_training()


if __name__ == "__main__":
    main()
