"""Selects with however many processes launched this script; the first writes the selection to the given file."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from torch.utils.data import DataLoader

from peft_sam import SamConfig, select_parameters
from tests.cases import VOCABULARY, bert


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(bert(), SamConfig(task_type="SEQ_CLS", density=0.05))
    ids = torch.randint(1, VOCABULARY, (24, 7))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] > VOCABULARY // 2).long().tolist()})
    loader = DataLoader(data.with_format("torch"), batch_size=12 // accelerator.num_processes)
    selection = select_parameters(model, loader, accelerator=accelerator, progress=False)
    if accelerator.is_main_process:
        selection.save(sys.argv[1])
    accelerator.end_training()


if __name__ == "__main__":
    main()
