"""Selects, trains and saves with a model that is sharded over the processes that launched this (one: not sharded).

Each process writes its selections to the given folder, the first one the adapters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from peft_sam import Loss, SamConfig, accumulate, select_parameters
from peft_sam.choosing.shards import is_sharded
from tests.processes.selecting import sentences, together
from tests.shared.cases import bert

STEPS, BATCH = 3, 6


def train(model: Any, optimizer: Any, rank: int, number: int) -> None:
    """Some steps, each over the same sentences however many processes share them."""
    model.eval()
    rows, own = sentences(STEPS * BATCH), BATCH // number
    for step in range(STEPS):
        start = step * BATCH + rank * own
        model(**together(rows[start : start + own])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_accelerate(folder: Path, number: int) -> None:
    """Selection on the whole model, which Accelerate then shards with its optimizer."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=True,
    )
    accelerator = Accelerator(cpu=True)
    if number > 1:
        # Accelerate shards on accelerators only, by code that runs on CPUs too
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        assert accelerator.is_fsdp2
    torch.manual_seed(0)
    model: Any = get_peft_model(bert(), SamConfig(task_type="SEQ_CLS", density=0.05, r=2))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loader = DataLoader(sentences(23), batch_size=12 // number, collate_fn=together)  # type: ignore[arg-type]
    name = "accelerate"
    selection = select_parameters(
        model, loader, accelerator=accelerator, head_warmup_steps=3, head_warmup_lr=0.02, progress=False
    )
    selection.save(folder / f"{name}-{accelerator.process_index}.safetensors")
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    unsharded = [n for n, p in model.named_parameters() if not is_sharded(p)]
    assert number == 1 or not unsharded, unsharded[:8]
    train(model, optimizer, accelerator.process_index, number)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder / name, state_dict=state)


def base_model(number: int) -> Any:
    torch.manual_seed(0)
    base = bert()
    if number > 1:
        mesh = init_device_mesh("cpu", (number,))
        for layer in base.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(base, mesh=mesh)
    return base


def by_hand(folder: Path, rank: int, number: int, score: str) -> None:
    """The adapter comes to a base model that is sharded already."""
    r = 2 if score in ("fisher", "random") else None
    model: Any = get_peft_model(base_model(number), SamConfig(density=0.05, score=score, target_modules="all", r=r))
    if model.peft_config["default"].needs_data:
        # batches of one, of which the last process has one less
        batches = [together([row]) for row in sentences(23)[rank::number]]
        found = select_parameters(model, batches, progress=False)
        found.save(folder / f"{score}-{rank}.safetensors")
        if score == "sam":
            model.add_adapter("apart", SamConfig(density=0.05, target_modules="all"))
            apart = select_parameters(model, batches, adapter_name="apart", exclude=found, progress=False)
            apart.save(folder / f"sam apart-{rank}.safetensors")
            model.delete_adapter("apart")
            model.set_adapter("default")
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), rank, number)
    model.save_pretrained(folder / score, is_main_process=rank == 0)
    dist.barrier()
    loaded = PeftModel.from_pretrained(base_model(number), folder / score).eval()
    with torch.no_grad():
        logits = loaded(**together(sentences(5))).logits
    torch.save(logits, folder / f"{score}-{rank}.logits")


def hold(folder: Path, rank: int, number: int) -> None:
    """How many numbers of the statistics this process holds, of a bare model."""
    model = base_model(number)
    batch = together(sentences(4))
    found = accumulate(
        model, dict(model.named_parameters()), [batch], lambda batch: Loss(model(**batch).loss, 4), progress=False
    )
    held = sum(tensor.numel() for tensor in found.tensors["gradient"].values())
    (folder / f"held-{rank}.json").write_text(json.dumps(held))


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    dist.init_process_group("gloo")
    rank, number = dist.get_rank(), dist.get_world_size()
    for score in ("sam", "fisher", "sam_curvature", "magnitude", "random"):
        by_hand(folder, rank, number, score)
    hold(folder, rank, number)
    by_accelerate(folder, number)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
