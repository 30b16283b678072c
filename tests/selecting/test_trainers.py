"""Laws of Trainers that prepare inputs and losses in ways of their own: selecting does so too, and leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from peft_sam import SamConfig, select_parameters
from tests.selecting.test_select import arguments
from tests.shared.cases import VOCABULARY, llama
from tests.whole.test_libraries import tokenizer


class MakesLabels(Trainer):
    """The labels come with the preparation of the inputs."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "labels": inputs["input_ids"].clone()}


class Generates(Trainer):
    """The inputs are others each time, and a buffer holds them for some steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buffered: Any = None
        self.seen, self.history = 0, {"losses": list[float]()}
        self.total, self.kinds = torch.zeros(()), set[float]()

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        ids = torch.randint(3, VOCABULARY, inputs["input_ids"].shape)
        self.seen += len(ids)
        self.buffered = {**inputs, "labels": ids}
        return dict(self.buffered)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        self.history["losses"].append(float(found.detach()))
        self.total += found.detach()
        self.kinds.add(float(found.detach()))
        self.state.log_history.append({"loss": float(found.detach())})
        self.state.num_input_tokens_seen += 5
        return found


IDS = torch.randint(3, VOCABULARY, (13, 6))


def trainer_of(kind: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(llama(), SamConfig(task_type="CAUSAL_LM", density=0.05, **options))
    return kind(model, arguments(folder, max_steps=2), train_dataset=Dataset.from_dict({"input_ids": IDS.tolist()}))


@pytest.mark.parametrize("score", ["sam", "fisher", "movement"])
def test_inputs_are_prepared_as_in_training(tmp_path: Path, score: str) -> None:
    trainer = trainer_of(MakesLabels, tmp_path, score=score)
    selection = select_parameters(trainer)
    assert selection.samples == (13 * 5 if score != "movement" else selection.samples)
    assert selection.unit == "tokens"
    trainer.train()
    assert any(bool(delta.values.any()) for delta in trainer.model.base_model.sparse_deltas().values())


def traces(trainer: Any) -> dict[str, Any]:
    names = (
        "buffered",
        "seen",
        "history",
        "total",
        "kinds",
        "_metrics",
        "_logs",
        "_step",
        "_buffered_inputs",
        "_total_train_tokens",
    )
    found = {name: copy.deepcopy(getattr(trainer, name)) for name in names if hasattr(trainer, name)}
    return {**found, "all": sorted(vars(trainer)), "state": copy.deepcopy(vars(trainer.state))}


def test_what_a_trainer_writes_down_on_the_way_is_as_before(tmp_path: Path) -> None:
    trainer = trainer_of(Generates, tmp_path)
    before, state = traces(trainer), torch.get_rng_state()
    held = trainer.history, trainer.total, trainer.kinds, trainer.state.log_history
    select_parameters(trainer)
    assert traces(trainer) == before
    after = trainer.history, trainer.total, trainer.kinds, trainer.state.log_history
    assert all(one is other for one, other in zip(held, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trainer_that_makes_its_model_anew_when_it_trains_is_refused(tmp_path: Path) -> None:
    def make() -> Any:
        return get_peft_model(llama(), SamConfig(task_type="CAUSAL_LM", density=0.05))

    rows = Dataset.from_dict({"input_ids": IDS.tolist()})
    trainer = MakesLabels(model_init=make, args=arguments(tmp_path), train_dataset=rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"calls it again when it trains.* select inside model_init"):
        select_parameters(trainer)


@pytest.mark.parametrize("value", [None, 0.5])
def test_a_trainer_s_loss_that_is_no_tensor_is_refused(tmp_path: Path, value: Any) -> None:
    trainer = trainer_of(MakesLabels, tmp_path)
    trainer.compute_loss = lambda *_, **__: value
    with pytest.raises(ValueError, match="compute_loss must return the mean loss of the batch as a tensor; got"):
        select_parameters(trainer)


def test_several_passes_generate_the_same(tmp_path: Path) -> None:
    one, other = (select_parameters(trainer_of(Generates, tmp_path), memory_budget=of) for of in (None, 4000))
    assert all(torch.equal(one.indices[name], other.indices[name]) for name in one.indices)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) + 0.1 * (sum(map(ord, text)) % 7) for text in completions]


REINFORCED = {
    "GRPO": (GRPOTrainer, GRPOConfig, {}),
    "GRPO with several steps a generation": (GRPOTrainer, GRPOConfig, {"steps_per_generation": 4}),
    "GRPO with a reference": (GRPOTrainer, GRPOConfig, {"beta": 0.1}),
    "RLOO": (RLOOTrainer, RLOOConfig, {}),
}


@pytest.mark.filterwarnings("ignore")  # of TRL, about its own experiments
@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize(("kind", "config", "options"), REINFORCED.values(), ids=REINFORCED)
def test_reinforcement_selects_and_then_trains(
    tmp_path: Path, kind: Any, config: Any, options: dict[str, Any], train_mode: bool
) -> None:
    model = get_peft_model(llama(), SamConfig(task_type="CAUSAL_LM", density=0.05))
    shape = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6, "max_steps": 2}
    off = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    prompts = Dataset.from_dict({"prompt": ["a b", "b c", "c d", "d e"] * 2})
    args = config(str(tmp_path), learning_rate=0.01, **shape, **off, **options)
    trainer = kind(model, reward_funcs=reward, args=args, train_dataset=prompts, processing_class=tokenizer())
    before = traces(trainer)
    assert select_parameters(trainer, max_batches=2, train_mode=train_mode).k
    assert str(traces(trainer)) == str(before)
    trainer.train()
    values: list[Tensor] = [delta.values for delta in model.base_model.sparse_deltas().values()]
    assert any(bool(one.any()) for one in values)
