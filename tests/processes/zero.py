"""Selects, trains and saves with DeepSpeed's ZeRO-3 over the processes that launched this; one: without DeepSpeed.

Each process writes its selection to the given folder, the first one the adapter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from peft import get_peft_model
from torch.utils.data import DataLoader

from peft_sam import SamConfig, select_parameters
from tests.processes.selecting import sentences, together
from tests.processes.shard import BATCH, STEPS
from tests.shared.cases import bert


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    PartialState(cpu=True, backend="gloo")  # also where torch knows MPI
    accelerator = Accelerator(cpu=True)
    rank, number = accelerator.process_index, accelerator.num_processes
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": BATCH // number,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "zero_allow_untested_optimizer": True,
        }
    )
    # sums by shared memory, which take a minute to compile; without them gloo sums
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if number > 1:
        # Accelerate gives models to DeepSpeed on accelerators only, by code that runs on CPUs too
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.DEEPSPEED
        accelerator.state.deepspeed_plugins = {"default": plugin}
        plugin.select(_from_accelerator_state=True)
        accelerator.deepspeed_engine_wrapped = None
    torch.manual_seed(0)
    model: Any = get_peft_model(bert(), SamConfig(task_type="SEQ_CLS", density=0.05, r=2))
    loader = DataLoader(sentences(23), batch_size=3, collate_fn=together)  # type: ignore[arg-type]
    selection = select_parameters(model, loader, accelerator=accelerator, progress=False)
    selection.save(folder / f"zero-{rank}.safetensors")
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.eval()
    rows, own = sentences(STEPS * BATCH), BATCH // number
    for step in range(STEPS):
        start = step * BATCH + rank * own
        accelerator.backward(model(**together(rows[start : start + own])).loss)
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    if rank == 0:
        accelerator.unwrap_model(model).save_pretrained(folder / "zero", state_dict=state)
    accelerator.wait_for_everyone()
    os._exit(0)  # some of DeepSpeed's threads are still there, and would end the process with an error


if __name__ == "__main__":
    main()
