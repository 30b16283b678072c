"""Gradients of the deltas of a model sharded over the processes that launched this; the first writes them to a file."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peft_sam import SamConfig
from tests.cases import VOCABULARY, bert


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = get_peft_model(
        bert().eval(),
        SamConfig(task_type="SEQ_CLS", density=0.1, score="random", init_weights=False, target_modules="all"),
    )
    batch = {"input_ids": torch.randint(1, VOCABULARY, (4, 7)), "labels": torch.tensor([0, 1, 1, 0])}
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.get_base_model().bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model(**batch).loss.backward()
    found = {}
    for name, delta in model.base_model.sparse_deltas().items():
        grad = delta.values.grad
        assert grad is not None
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
