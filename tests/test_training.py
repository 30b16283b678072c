"""Laws of training with the Trainer: checkpoints, resuming, the best model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from peft_sam import PendingAdapterError, SamConfig, select_parameters
from tests.cases import bert
from tests.test_selector import arguments, text_data

BASE = bert()


def make_model(**options: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(copy.deepcopy(BASE), SamConfig(task_type="SEQ_CLS", density=0.1, **options))


def make_trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    args = arguments(
        folder,
        learning_rate=1e-2,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        logging_strategy="steps",
        logging_steps=1,
        **options,
    )
    return Trainer(model=model, args=args, train_dataset=text_data(24), eval_dataset=text_data(8, seed=1))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def values(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {n: (d.indices.clone(), d.values.detach().clone()) for n, d in model.base_model.sparse_deltas().items()}


def assert_same_deltas(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name][0], other[name][0]), name
        torch.testing.assert_close(one[name][1], other[name][1], rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], Any]:
    """A run without interruption: its folder, its loss curve, its deltas."""
    folder = tmp_path_factory.mktemp("whole")
    model = make_model()
    trainer = make_trainer(model, folder)
    select_parameters(trainer)
    trainer.train()
    return folder, losses(trainer), values(model)


@pytest.mark.parametrize("selected_before", [False, True], ids=["pending", "selected on other data"])
def test_resuming_continues_with_the_same_support_and_loss_curve(
    whole_run: Any, tmp_path: Path, selected_before: bool
) -> None:
    folder, curve, deltas = whole_run
    model = make_model()
    trainer = make_trainer(model, tmp_path)
    if selected_before:
        other = Trainer(model=model, args=arguments(tmp_path), train_dataset=text_data(5, seed=9))
        select_parameters(other)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert losses(trainer)[-3:] == curve[-3:]
    assert_same_deltas(values(model), deltas)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(
        model, tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, lr_scheduler_type="constant"
    )
    select_parameters(trainer)
    support = {name: indices for name, (indices, _) in values(model).items()}
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), best)
    assert_same_deltas(values(model), values(loaded))
    assert all(torch.equal(indices, support[name]) for name, (indices, _) in values(model).items())


def test_training_changes_only_deltas_and_the_head(whole_run: Any) -> None:
    _, curve, deltas = whole_run
    assert all(bool(v.any()) for _, v in deltas.values())
    assert len(set(curve)) > 1


def test_training_a_pending_adapter_is_refused_with_the_line_to_add(tmp_path: Path) -> None:
    with pytest.raises(PendingAdapterError, match=r"peft_sam\.select_parameters\(trainer\)"):
        make_trainer(make_model(), tmp_path).train()


def test_evaluating_a_pending_adapter_works(tmp_path: Path) -> None:
    assert make_trainer(make_model(), tmp_path).evaluate()["eval_loss"] > 0


def test_training_in_bfloat16_autocast_learns(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(model, tmp_path, bf16=True)
    selection = select_parameters(trainer)
    trainer.train()
    assert selection.k == sum(len(v) for _, v in values(model).values())
    assert all(v.dtype == torch.float32 for _, v in values(model).values())
    assert isinstance(model.get_base_model(), nn.Module)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=lambda o: next(iter(o)))
def test_an_optimizer_step_calls_as_many_kernels_for_many_layers_as_for_few(options: dict[str, bool]) -> None:
    calls = []
    for layers in (2, 9):
        base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        config = SamConfig(target_modules="all", score="random", budget="tensor", density=0.5)
        model = get_peft_model(base, config)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), **options)
        model(torch.randn(2, 8)).sum().backward()
        optimizer.step()
        with torch.profiler.profile() as profile:
            optimizer.step()
        # an operation called by another, as foreach ones do tensor by tensor on a CPU, is one kernel on a GPU; torch
        # reads its step counters, which are numbers on the CPU, one by one
        calls.append(
            sum(
                event.name.startswith("aten::")
                and event.name != "aten::item"
                and not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))
                for event in profile.events()
            )
        )
    assert calls[0] == calls[1] > 0
