"""Laws of what is prepared before the selection: it trains what one prepared after it trains, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, Trainer, TrainerCallback

from peft_sam import PendingAdapterError, SamConfig, select_parameters
from tests.selecting.test_select import arguments, text_data
from tests.shared.cases import NETS, bert

STEPS, BATCH = 3, NETS[0].batch(4)


def pending(**options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(bert().eval(), SamConfig(task_type="SEQ_CLS", density=0.05, **options))


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def values(model: Any) -> dict[str, Tensor]:
    return {name: delta.values.detach() for name, delta in model.base_model.sparse_deltas().items()}


def by_layer(model: Any) -> list[dict[str, Any]]:
    """Parameter groups with rates of their own, as people write for layers and heads."""
    every = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p], "lr": 0.01 * (1 + len(name) % 3)} for name, p in every]


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda m: AdamW(trained(m), lr=0.01),
    "AdamW over everything": lambda m: AdamW(m.parameters(), lr=0.01),
    "AdamW, fused": lambda m: AdamW(trained(m), lr=0.01, fused=True),
    "AdamW, foreach": lambda m: AdamW(trained(m), lr=0.01, foreach=True),
    "Adam, amsgrad": lambda m: Adam(trained(m), lr=0.01, amsgrad=True),
    "SGD with momentum": lambda m: SGD(trained(m), lr=0.1, momentum=0.9),
    "RMSprop": lambda m: RMSprop(trained(m), lr=0.01),
    "Adafactor": lambda m: Adafactor(trained(m), lr=0.01, relative_step=False),
    "AdamW, a group for each": lambda m: AdamW(by_layer(m)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_made_before_trains_as_one_made_after(make: Callable[[Any], Any]) -> None:
    found = []
    for first in (True, False):
        model = pending()
        optimizer = make(model) if first else None
        schedule = LambdaLR(optimizer, lambda step: 0.9**step) if optimizer else None
        select_parameters(model, [BATCH], progress=False)
        optimizer = optimizer or make(model)
        schedule = schedule or LambdaLR(optimizer, lambda step: 0.9**step)
        for _ in range(STEPS):
            model(**BATCH).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        found.append(values(model))
        assert all(bool(one.any()) for one in found[-1].values())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_values_are_the_same_parameter_from_the_pending_state_on_and_empty_ones_leave() -> None:
    model = pending()
    before = {name: p for name, p in model.named_parameters() if name.endswith(".values")}
    select_parameters(model, [BATCH], progress=False)
    after = {name: p for name, p in model.named_parameters() if name.endswith(".values")}
    assert after
    assert all(before[name] is p and len(p) for name, p in after.items())
    assert after.keys() == {name for name in before if after.get(name) is not None}


class SelectFirst(TrainerCallback):
    """Selects when training begins: after the Trainer made the optimizer and prepared the model."""

    trainer: Trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        select_parameters(self.trainer)


def by_itself(model: Any, args: Any, data: Any) -> Trainer:
    trainer = Trainer(model, args, train_dataset=data)
    select_parameters(trainer)
    return trainer


def with_an_optimizer(model: Any, args: Any, data: Any) -> Trainer:
    optimizer = AdamW(trained(model), lr=args.learning_rate)
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    select_parameters(trainer)
    return trainer


def with_an_optimizer_and_a_schedule(model: Any, args: Any, data: Any) -> Trainer:
    optimizer = AdamW(trained(model), lr=args.learning_rate)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / args.max_steps)
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, schedule))
    select_parameters(trainer)
    return trainer


def with_a_class(model: Any, args: Any, data: Any) -> Trainer:
    kind = (AdamW, {"lr": args.learning_rate, "weight_decay": 0.0})
    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=kind)
    select_parameters(trainer)
    return trainer


def with_one_that_it_made(model: Any, args: Any, data: Any) -> Trainer:
    trainer = Trainer(model, args, train_dataset=data)
    trainer.create_optimizer_and_scheduler(args.max_steps)
    select_parameters(trainer)
    return trainer


def in_a_callback(model: Any, args: Any, data: Any) -> Trainer:
    callback = SelectFirst()
    callback.trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
    return callback.trainer


TRAINERS = [with_an_optimizer, with_an_optimizer_and_a_schedule, with_a_class, with_one_that_it_made, in_a_callback]


@pytest.mark.parametrize("way", TRAINERS)
def test_a_trainer_s_optimizer_made_before_trains_as_one_made_after(tmp_path: Path, way: Any) -> None:
    found = []
    for make in (by_itself, way):
        args = arguments(tmp_path, max_steps=STEPS, learning_rate=0.01, weight_decay=0.0, optim="adamw_torch")
        trainer = make(pending(), args, text_data())
        trainer.train()
        found.append(values(trainer.model))
        assert any(bool(one.any()) for one in found[-1].values())
    torch.testing.assert_close(*found)


def test_a_second_training_goes_on_with_the_values_of_the_first(tmp_path: Path) -> None:
    trainer = by_itself(pending(), arguments(tmp_path, max_steps=2, learning_rate=0.01), text_data())
    found = []
    for _ in range(2):
        trainer.train()
        found.append({name: one.clone() for name, one in values(trainer.model).items()})
    assert any(not torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_an_accelerator_that_prepared_model_and_optimizer_before_trains_them() -> None:
    accelerator, model = Accelerator(cpu=True), pending()
    model, optimizer = accelerator.prepare(model, AdamW(trained(model), lr=0.01))
    select_parameters(model, [BATCH], accelerator=accelerator, progress=False)
    accelerator.backward(model(**BATCH).loss)
    optimizer.step()
    assert all(bool(one.any()) for one in values(model).values())


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def given_to_ddp(model: Any) -> Any:
    return DistributedDataParallel(model)


def given_to_deepspeed(model: Any) -> None:
    # as its ZeRO optimizers mark what they train, and pass over values without entries
    next(p for n, p in model.named_parameters() if p.requires_grad and "sam_sparse_" not in n).param_idx_in_group = 0


def given_to_fsdp2(model: Any) -> Any:
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return AdamW(trained(model))


@pytest.mark.parametrize("take", [given_to_ddp, given_to_deepspeed, given_to_fsdp2])
@pytest.mark.parametrize("score", ["sam", "movement"])
@pytest.mark.usefixtures("alone")
def test_a_model_whose_new_entries_nobody_would_train_is_refused_with_the_line_to_move(take: Any, score: str) -> None:
    model = pending(score=score)
    kept = take(model)  # or it would be gone before the selection
    with pytest.raises(ValueError, match=r"before its parameters are selected(.|\n)*select_parameters\(trainer\)"):
        select_parameters(model, [BATCH], max_batches=1, progress=False)
    del kept
    with pytest.raises(PendingAdapterError):
        model.train()(**BATCH)


@pytest.mark.usefixtures("alone")
def test_a_sharded_model_without_an_optimizer_is_selected_for() -> None:
    model = pending()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert select_parameters(model, [BATCH], progress=False).k


def of_the_base(model: Any) -> Any:
    return AdamW([p for n, p in model.named_parameters() if "sam_sparse_" not in n])


def of_values_with_entries(model: Any) -> Any:
    return AdamW([p for p in trained(model) if p.numel()])


def with_state_of_its_own(model: Any) -> Any:
    return Adagrad(trained(model))


@pytest.mark.parametrize("make", [of_the_base, of_values_with_entries, with_state_of_its_own])
def test_an_optimizer_that_would_not_train_the_values_is_refused(tmp_path: Path, make: Any) -> None:
    model = pending()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=text_data(), optimizers=(make(model), None))
    with pytest.raises(ValueError, match="Move the line up"):
        select_parameters(trainer)


def test_the_optimizer_of_another_model_is_no_matter() -> None:
    accelerator, model = Accelerator(cpu=True), pending()
    other: Any = SimpleNamespace(param_groups=[{"params": list(nn.Linear(2, 2).parameters())}], state={})
    accelerator._optimizers.append(other)
    assert select_parameters(model, [BATCH], accelerator=accelerator, progress=False).k
