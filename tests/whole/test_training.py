"""Laws of training with the Trainer: checkpoints, resuming, the best model."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from peft_sam import PendingAdapterError, SamConfig, select_parameters
from tests.selecting.test_select import arguments, text_data
from tests.shared.cases import bert
from tests.shared.versions import activation_checkpointing, compiles

BASE = bert()
SCALED = SamConfig(target_modules="all", density=0.3, budget="tensor", score="random", init_weights=False)


def make_model(**options: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(copy.deepcopy(BASE), SamConfig(task_type="SEQ_CLS", density=0.1, **options))


def make_trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    args = arguments(
        folder,
        learning_rate=1e-2,
        **{
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_strategy": "steps",
            "logging_steps": 1,
            **options,
        },
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
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), best)
    assert_same_deltas(values(model), values(loaded))
    assert all(torch.equal(indices, support[name]) for name, (indices, _) in values(model).items())


def test_a_reloaded_support_keeps_what_is_known_of_its_selection(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3)
    select_parameters(trainer)
    before = copy.deepcopy(model.peft_config["default"].selection)
    trainer.train()
    assert model.peft_config["default"].selection == before
    assert before["score"] == "sam"
    assert before["share"] > 0


def test_resuming_takes_the_newest_checkpoint_when_told_no_path(whole_run: Any, tmp_path: Path) -> None:
    folder, curve, deltas = whole_run
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    model = make_model()
    trainer = make_trainer(model, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer)[-3:] == curve[-3:]
    assert_same_deltas(values(model), deltas)


def test_a_checkpoint_of_the_model_alone_is_resumed_with_its_deltas(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(model, tmp_path, save_only_model=True)
    select_parameters(trainer)
    trainer.train()
    assert not (tmp_path / "checkpoint-6" / "optimizer.pt").exists()
    again = make_model()
    make_trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))  # no step is left
    assert_same_deltas(values(again), values(model))


# name → options of the Trainer that change how a model is run, trained or saved
OPTIONS: dict[str, dict[str, Any]] = {
    "saving by epochs": {"save_strategy": "epoch", "max_steps": -1},
    "saving the best": {
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "a limit of checkpoints": {"save_total_limit": 1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "a batch size found by trial": {"auto_find_batch_size": True},
    "noise in the embeddings": {"neftune_noise_alpha": 5.0},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "evaluation in bfloat16": {"bf16_full_eval": True, "eval_strategy": "steps", "eval_steps": 3},
    "Adafactor": {"optim": "adafactor"},
    "fused AdamW": {"optim": "adamw_torch_fused"},
    "AdamW of 8 bits": {"optim": "adamw_bnb_8bit"},
    "workers": {"dataloader_num_workers": 1},
}


def assert_only_deltas_and_the_head_are_trained(folder: Path, **options: Any) -> None:
    """And that the last checkpoint holds the values that were trained."""
    model = make_model()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = make_trainer(model, folder, **options)
    selection = select_parameters(trainer)
    trainer.train()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], kept) for name, kept in base.items())
    assert all(bool(tensor.any()) for _, tensor in values(model).values())
    assert {name: len(indices) for name, (indices, _) in values(model).items()} == selection.counts
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert_same_deltas(values(PeftModel.from_pretrained(copy.deepcopy(BASE), last)), values(model))


@pytest.mark.parametrize("option", OPTIONS)
def test_with_any_option_of_the_trainer_only_deltas_and_the_head_are_trained(option: str, tmp_path: Path) -> None:
    if "bnb" in OPTIONS[option].get("optim", ""):
        pytest.importorskip("bitsandbytes")
    assert_only_deltas_and_the_head_are_trained(tmp_path, **OPTIONS[option])


@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_trainer_compiles_the_model(tmp_path: Path) -> None:
    assert_only_deltas_and_the_head_are_trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_trainer_s_gradient_checkpointing_changes_no_loss(whole_run: Any, tmp_path: Path, reentrant: bool) -> None:
    _, curve, _ = whole_run
    trainer = make_trainer(make_model(), tmp_path, **activation_checkpointing(reentrant))
    select_parameters(trainer)
    trainer.train()
    assert losses(trainer) == pytest.approx(curve, rel=1e-5)


def test_a_scaler_of_the_loss_changes_no_gradient_and_skips_what_is_infinite() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), SCALED)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    scaler, x = torch.amp.GradScaler("cpu", init_scale=2.0**14), torch.randn(5, 8)

    def step(x: Tensor, scale: bool) -> list[Tensor]:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).square().mean()
        (scaler.scale(loss) if scale else loss).backward()
        if scale:
            scaler.unscale_(optimizer)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, scaled = step(x, scale=False), step(x, scale=True)
    assert len(scaled) == 4
    torch.testing.assert_close(scaled, plain, rtol=2e-3, atol=1e-5)  # of float16
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    before = copy.deepcopy(model.state_dict())
    step(x * torch.inf, scale=True)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert scaler.get_scale() == 2.0**13


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
