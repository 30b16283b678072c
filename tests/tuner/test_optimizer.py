"""Laws of the optimizer at the learning rate of full fine-tuning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer

from peft_sam import PendingAdapterError, SamConfig, create_sam_optimizer, select_parameters
from peft_sam.layers.found import pairs_of
from tests.selecting.test_select import arguments, text_data
from tests.shared.cases import bert

BASE = bert()
LR = 1e-3


def make(**options: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(copy.deepcopy(BASE), SamConfig(**{"task_type": "SEQ_CLS", "density": 0.1, **options}))


def batches() -> list[dict[str, torch.Tensor]]:
    rows = text_data(24).with_format("torch")
    return [rows[at : at + 4] for at in range(0, 24, 4)]


def rates(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Parameter → its learning rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("score", ["sam", "sam_curvature", "fisher", "random", "magnitude"])
def test_values_take_the_rate_over_their_share_and_the_head_takes_it_itself(score: str) -> None:
    model = make(score=score)
    if model.active_peft_config.needs_data:
        select_parameters(model, batches(), progress=False)
    share = model.active_peft_config.selection["share"]
    found = rates(model, create_sam_optimizer(model, torch.optim.AdamW, lr=LR))
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"sam_sparse_" in name for name in found} == {True, False}
    assert all(rate == (LR / share if "sam_sparse_" in name else LR) for name, rate in found.items())
    found = rates(model, create_sam_optimizer(model, torch.optim.AdamW, lr=LR, head_lr=2 * LR))
    assert all(rate == (LR / share if "sam_sparse_" in name else 2 * LR) for name, rate in found.items())


def test_adapters_beside_each_other_have_their_own_rates_and_change_the_loss_as_much_as_one() -> None:
    model = make(task_type=None)
    select_parameters(model, batches(), progress=False)
    model.add_adapter("drawn", SamConfig(density=0.02, score="random"))
    model.base_model.set_adapter(["default", "drawn"])
    found = rates(model, create_sam_optimizer(model, torch.optim.AdamW, lr=LR))
    shares = {name: config.selection["share"] for name, config in model.peft_config.items()}
    assert shares["default"] > 2 * shares["drawn"]
    for name, share in shares.items():
        assert {rate for key, rate in found.items() if f"sam_sparse_delta.{name}." in key} == {LR / (2 * share)}
    model.base_model.set_adapter("drawn")
    found = rates(model, create_sam_optimizer(model, torch.optim.AdamW, lr=LR))
    assert set(found.values()) == {LR / shares["drawn"]}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_trains_as_values_over_the_share_would_be_trained_at_the_rate(decay: float) -> None:
    """Δ = s·v, with s = 1 / share and v at the rate itself, ε and decay in v's units."""
    one = make(task_type=None).eval()  # without dropout
    select_parameters(one, batches(), progress=False)
    other, share = copy.deepcopy(one), one.active_peft_config.selection["share"]
    optimizer = create_sam_optimizer(one, torch.optim.AdamW, lr=LR, eps=1e-6, weight_decay=decay)
    deltas = [delta.values for delta in other.base_model.sparse_deltas().values()]
    scaled = [nn.Parameter(values.detach() * share) for values in deltas]
    reference = torch.optim.AdamW(scaled, lr=LR, eps=1e-6 / share, weight_decay=decay / share)
    for batch in batches()[:3]:
        for model, steps in ((one, optimizer), (other, reference)):
            for parameter in model.parameters():
                parameter.grad = None
            model(**batch).loss.backward()
            if steps is reference:
                for v, values in zip(scaled, deltas, strict=True):
                    v.grad = None if values.grad is None else values.grad / share
            steps.step()
        with torch.no_grad():
            for v, values in zip(scaled, deltas, strict=True):
                values.copy_(v / share)
    for values, delta in zip(deltas, one.base_model.sparse_deltas().values(), strict=True):
        torch.testing.assert_close(delta.values, values, rtol=1e-3, atol=1e-6)
    assert any(bool(values.any()) for values in deltas)


def test_parts_of_a_model_with_adapters_of_the_same_name_have_rates_of_their_own() -> None:
    whole = nn.ModuleList([make(task_type=None, score="random", density=density) for density in (0.5, 0.01)])
    groups = create_sam_optimizer(whole, torch.optim.AdamW, lr=LR).param_groups
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    assert sizes[0] > 40 * sizes[1]
    assert [group["lr"] for group in groups] == pytest.approx([LR / 2 / 0.5, LR / 2 / 0.01], rel=0.05)


def test_an_adapter_that_takes_another_support_forgets_its_share() -> None:
    one, other = make(task_type=None, score="random"), make(task_type=None, score="random", density=0.02)
    other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="does not say which share"):
        create_sam_optimizer(other, torch.optim.AdamW, lr=LR)


def trained(folder: Path, resume: str | None = None, **options: Any) -> Any:
    model = make(**options)
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
    trainer = Trainer(model=model, args=args, train_dataset=text_data(24))
    select_parameters(trainer)
    trainer.optimizer = create_sam_optimizer(model, torch.optim.AdamW, lr=LR)
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("options", [{}, {"r": 2, "lora_dropout": 0.1}], ids=["deltas", "with pairs"])
def test_a_trainer_trains_with_it_and_resumes_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", **options)
    again = trained(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-3"), **options)
    deltas = again.base_model.sparse_deltas()
    assert any(bool(delta.values.any()) for delta in deltas.values())
    for name, delta in whole.base_model.sparse_deltas().items():
        assert torch.equal(delta.values, deltas[name].values)
    pairs = pairs_of(again, "default")
    assert bool(pairs) == ("r" in options)
    for name, pair in pairs_of(whole, "default").items():
        assert bool(pair.lora_B.any())
        assert torch.equal(pair.lora_A, pairs[name].lora_A)
        assert torch.equal(pair.lora_B, pairs[name].lora_B)


def made_of_others() -> Any:
    model = make(score="random")
    model.add_adapter("other", SamConfig(task_type="SEQ_CLS", density=0.1, score="random", seed=1))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    return model


def frozen() -> Any:
    return make(score="random").requires_grad_(False)


WRONG: list[tuple[Any, Any, type[Exception], str]] = [
    (make, LR, PendingAdapterError, "cannot be given an optimizer: no parameters are selected"),
    (frozen, LR, ValueError, "no SAM adapter of this PeftModelForSequenceClassification is trained"),
    (lambda: BASE, LR, ValueError, "no SAM adapter of this BertForSequenceClassification is trained"),
    (made_of_others, LR, ValueError, "adapter 'sum' does not say which share"),
    (lambda: make(score="random"), 0.0, ValueError, "^lr must be a positive number, .* got 0.0"),
    (lambda: make(score="random"), float("inf"), ValueError, "lr must be a positive number, .* got inf"),
    (lambda: make(score="random"), "1e-4", ValueError, "lr must be a positive number, .* got '1e-4'"),
]


@pytest.mark.parametrize(("build", "lr", "error", "says"), WRONG)
def test_what_it_cannot_serve_is_said(build: Any, lr: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        create_sam_optimizer(build(), torch.optim.AdamW, lr=lr)
