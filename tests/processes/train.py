"""What training does in the processes that launched this, by FSDP2, DDP and the Trainer; the first writes it down."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from peft_sam import SamConfig, select_parameters
from peft_sam.layers.found import pairs_of
from tests.processes.selecting import sentences, together
from tests.shared.cases import VOCABULARY, bert


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(bert().eval(), SamConfig(task_type="SEQ_CLS", density=0.1, target_modules="all", **options))


def gradients(model: Any) -> dict[str, Tensor]:
    found: dict[str, Any] = {name: delta.values.grad for name, delta in model.base_model.sparse_deltas().items()}
    for module, pair in pairs_of(model, "default").items():
        found |= {f"{module}.{name}": factor.grad for name, factor in pair.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}


def by_shards(number: int) -> dict[str, Tensor]:
    """Gradients of a model that FSDP2 shards; each process has all samples."""
    model = adapted(score="random", init_weights=False, r=2)
    if number > 1:
        mesh = init_device_mesh("cpu", (number,))
        for layer in model.get_base_model().bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model(**batch()).loss.backward()
    return gradients(model)


def by_copies(rank: int, number: int) -> dict[str, Tensor]:
    """Gradients by DistributedDataParallel, each process with samples of its own."""
    model = adapted(score="random", init_weights=False, r=2)
    run = DistributedDataParallel(model) if number > 1 else model
    run(**{key: tensor[rank::number] for key, tensor in batch().items()}).loss.backward()
    return gradients(model)


def by_trainer(folder: str, number: int) -> dict[str, Tensor]:
    """Values after some steps of the Trainer, which selected them."""
    model = adapted()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=4 // number,
        max_steps=3,
        learning_rate=0.5,
        optim="sgd",
        # the Trainer multiplies the loss by the processes, for models that divide by the count that it hands them: BERT
        # takes the count and does not
        average_tokens_across_devices=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=sentences(12), data_collator=together)  # type: ignore[arg-type]
    select_parameters(trainer)
    trainer.train()
    return {name: delta.values.detach() for name, delta in model.base_model.sparse_deltas().items()}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    file, rank, number = sys.argv[1], dist.get_rank(), dist.get_world_size()
    found = {
        "FSDP2": by_shards(number),
        "DDP": by_copies(rank, number),
        "Trainer": by_trainer(f"{file}-trainer", number),
    }
    if rank == 0:
        torch.save(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
