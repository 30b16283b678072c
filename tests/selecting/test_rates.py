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
from peft_sam.selecting.rates import KNOWN, warn_of_rate
from tests.shared.cases import llama


def trainer_with(rate: float, optim: str = "adamw_torch", optimizer: Any = None, **args: Any) -> Any:
    return SimpleNamespace(args=SimpleNamespace(learning_rate=rate, optim=optim, **args), optimizer=optimizer)


FAR = [
    ("sam", 0.005, 5e-5, "learning_rate=5e-05 is far from .*: 0.001 to 0.003 with score 'sam' at a density of 0.005"),
    ("sam", 0.005, 2e-4, "learning_rate=0.0002 is far"),
    ("sam", 0.005, 3e-2, "learning_rate=0.03 is far"),
    ("sam", 0.1, 3e-3, ": 0.0003 with score 'sam' at a density of 0.1"),
    ("movement", 0.005, 2e-4, ": 0.003 with score 'movement'"),
    ("random", 0.005, 2e-4, ": 0.003 to 0.03 with score 'random'"),
]


@pytest.mark.parametrize(("score", "density", "rate", "message"), FAR)
def test_the_default_of_the_trainer_and_the_habit_of_lora_are_far(
    score: str, density: float, rate: float, message: str
) -> None:
    with pytest.warns(RateWarning, match=message) as caught:
        warn_of_rate(trainer_with(rate), score, density)
    assert "\n" not in str(caught[0].message)


NEAR = [
    *((trainer_with(rate), score, most) for score, rows in KNOWN.items() for most, *rates in rows for rate in rates),
    (trainer_with(3e-4), "sam", 0.005),
    (trainer_with(2e-4), "sam", 0.1),
    (trainer_with(5e-5), "sam", 0.5),
    (trainer_with(5e-5), "magnitude", 0.005),
    (trainer_with(5e-5, optim="sgd"), "sam", 0.005),
    (trainer_with(5e-5, optimizer=object()), "sam", 0.005),
    (trainer_with(1e-6, beta=0.0), "sam", 0.005),
]


@pytest.mark.parametrize(("trainer", "score", "density"), NEAR)
def test_nothing_is_said_of_near_rates_and_of_what_nothing_is_known(trainer: Any, score: str, density: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_rate(trainer, score, density)


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
