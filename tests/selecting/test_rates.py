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

from peft_sam import RateWarning, SamConfig, select_parameters
from peft_sam.selecting.rates import FAR, HIGH, LOW, warn_of_rate
from tests.shared.cases import llama


def trainer_with(rate: float, optim: str = "adamw_torch", optimizer: Any = None, **args: Any) -> Any:
    return SimpleNamespace(args=SimpleNamespace(learning_rate=rate, optim=optim, **args), optimizer=optimizer)


FAR_OFF = [
    (0.07, 5e-5, "learning_rate=5e-05 is far from .*: 0.00071 to 0.0043 for entries that have 7.00% of the gradient"),
    (0.07, 1e-1, "learning_rate=0.1 is far"),
    (0.005, 2e-4, ": 0.01 to 0.06 for entries that have 0.50% of the gradient"),
    (1.0, 1e-2, ": 5e-05 to 0.0003 for entries that have 100.00% of the gradient"),
]


@pytest.mark.parametrize(("share", "rate", "message"), FAR_OFF)
def test_the_default_of_the_trainer_and_the_habit_of_lora_are_far(share: float, rate: float, message: str) -> None:
    with pytest.warns(RateWarning, match=message) as caught:
        warn_of_rate(trainer_with(rate), share)
    assert "\n" not in str(caught[0].message)


NEAR = [
    *(
        (trainer_with(rate / share), share)
        for share in (1.0, 0.1, 0.003)
        for rate in (LOW / FAR, LOW, HIGH, HIGH * FAR)
    ),
    (trainer_with(5e-5), 0.0),  # a selection of an earlier version
    (trainer_with(5e-5, optim="sgd"), 0.01),
    (trainer_with(5e-5, optimizer=object()), 0.01),
    (trainer_with(1e-6, beta=0.0), 0.01),
]


@pytest.mark.parametrize(("trainer", "share"), NEAR)
def test_nothing_is_said_of_near_rates_and_of_what_nothing_is_known(trainer: Any, share: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_rate(trainer, share)


def test_a_selection_says_it_once_and_trains_all_the_same(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": torch.randint(1, 40, (8, 6)).tolist()}).map(
        lambda row: {"labels": row["input_ids"]}
    )
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(get_peft_model(llama(), SamConfig(task_type="CAUSAL_LM")), args, train_dataset=rows)
    with pytest.warns(RateWarning) as caught:
        select_parameters(trainer)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    trainer.train()
