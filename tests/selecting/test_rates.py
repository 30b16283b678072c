"""Laws of the word on learning rates."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_sam import RateWarning, SamConfig, create_sam_optimizer, select_parameters
from peft_sam.selecting.rates import FAR, HIGH, LOW, RateCheck
from tests.shared.cases import llama


def begin(rate: float, share: float, optimizer: Any = torch.optim.AdamW, **args: Any) -> None:
    """A training begins at a rate, with a warm-up and a head beside the values."""
    head, values = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    made = optimizer([{"params": [head], "lr": 1.0}, {"params": [values], "lr": rate}])
    torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.0)
    RateCheck([values], share).on_train_begin(SimpleNamespace(**args), None, None, optimizer=made)


FAR_OFF = [
    (0.07, 5e-5, "rate 5e-05 is far from .*: 0.00071 to 0.0043 for entries that have 7.00% of the gradient"),
    (0.07, 1e-1, "rate 0.1 is far"),
    (0.005, 2e-4, ": 0.01 to 0.06 for entries that have 0.50% of the gradient"),
    (1.0, 1e-2, ": 5e-05 to 0.0003 for entries that have 100.00% of the gradient"),
]


@pytest.mark.parametrize(("share", "rate", "message"), FAR_OFF)
def test_the_default_of_the_trainer_and_the_habit_of_lora_are_far(share: float, rate: float, message: str) -> None:
    with pytest.warns(RateWarning, match=message) as caught:
        begin(rate, share)
    assert "\n" not in str(caught[0].message)


NEAR: list[tuple[float, float, dict[str, Any]]] = [
    *((rate / share, share, {}) for share in (1.0, 0.1) for rate in (1.01 * LOW / FAR, LOW, HIGH, 0.99 * HIGH * FAR)),
    (5e-5, 0.0, {}),  # a selection of an earlier version
    (5e-5, 0.01, {"optimizer": torch.optim.SGD}),
    (1e-6, 0.01, {"beta": 0.0}),
]


@pytest.mark.parametrize(("rate", "share", "options"), NEAR)
def test_nothing_is_said_of_near_rates_and_of_what_nothing_is_known(
    rate: float, share: float, options: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(rate, share, **options)


def trainer(folder: Path) -> Trainer:
    rows = Dataset.from_dict({"input_ids": torch.randint(1, 40, (8, 6)).tolist()}).map(
        lambda row: {"labels": row["input_ids"]}
    )
    args = TrainingArguments(str(folder), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, warmup_steps=1)
    return Trainer(get_peft_model(llama(), SamConfig(task_type="CAUSAL_LM")), args, train_dataset=rows)


def test_a_trainer_that_selected_says_it_when_training_begins_and_trains_all_the_same(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    select_parameters(made)
    with pytest.warns(RateWarning, match="the learning rate 5e-05 is far") as caught:
        made.train()
    assert sum(issubclass(warning.category, RateWarning) for warning in caught) == 1
    assert made.state.global_step == 1


def test_an_optimizer_made_for_the_share_is_near(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    select_parameters(made)
    made.optimizer = create_sam_optimizer(made.model, torch.optim.AdamW, lr=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RateWarning)
        made.train()
