"""The second of two processes fails during the pass; both print what they got. Arguments: how; sharded or whole."""

from __future__ import annotations

import datetime
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from peft import get_peft_model
from torch import Tensor

from peft_sam import SamConfig, select_parameters
from tests.processes.launch import PATIENCE
from tests.processes.selecting import sentences, together
from tests.processes.shard import base_model

# seconds of the process group: short only where it is what ends the hang
TIMEOUT = {"hang": 8}


def main() -> None:
    failure, sharded = sys.argv[1], sys.argv[2] == "sharded"
    timeout = TIMEOUT.get(failure, PATIENCE)
    torch.set_num_threads(1)
    patience = InitProcessGroupKwargs(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
    rank = accelerator.process_index
    model: Any = get_peft_model(base_model(2 if sharded else 1), SamConfig(density=0.05))
    number = 0

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        nonlocal number
        number += 1
        value: Tensor = model(**batch).loss
        if rank == 1 and number == 3:
            if failure == "NaN":
                return value * float("nan")
            if failure == "death":
                os._exit(9)
            if failure == "hang":
                time.sleep(PATIENCE)
            raise ValueError("a broken batch")
        return value

    batches = [together(sentences(4))] * 5
    start = time.perf_counter()
    try:
        select_parameters(model, batches, loss_fn=loss, accelerator=accelerator, progress=False)
        print("selected", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    pending = all(delta.pending for layer in model.modules() for delta in deltas(layer))
    print(f"pending {pending}, training {model.training}, {time.perf_counter() - start:.1f} s", flush=True)
    os._exit(0)


def deltas(layer: Any) -> list[Any]:
    return list(layer.deltas("default").values()) if hasattr(layer, "deltas") else []


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
