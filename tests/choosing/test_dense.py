"""Laws of what is trained densely before the parameters are selected: the head, and for "movement" everything."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from peft_sam import SamConfig, Selection, select_parameters
from peft_sam.choosing.movement import rehearse
from tests.selecting.test_select import arguments, supports, text_data
from tests.shared import reference
from tests.shared.cases import VOCABULARY, bert, gpt2

STEPS, LR = 7, 0.02


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def classifier(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(without_dropout(bert().to(dtype)), SamConfig(task_type="SEQ_CLS", density=0.05, **options))  # type: ignore[arg-type]


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(1, VOCABULARY, (10, 7), generator=torch.Generator().manual_seed(1))
    rows = {"input_ids": ids, "labels": (ids[:, 0] > VOCABULARY // 2).long()}
    return [{key: value[start : start + 4] for key, value in rows.items()} for start in (0, 4, 8)]


def head_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "modules_to_save" in name}


def values(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def trained_plainly(model: nn.Module) -> nn.Module:
    """The head after the obvious loop."""
    model.train()
    head = list(head_of(model).values())
    optimizer = torch.optim.AdamW(head, lr=LR, weight_decay=0.0)
    for step, batch in zip(range(STEPS), itertools.cycle(batches()), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = LR * (STEPS - step) / STEPS
        for parameter, gradient in zip(head, torch.autograd.grad(model(**batch).loss, head), strict=True):
            parameter.grad = gradient
        optimizer.step()
    model.zero_grad()
    return model


def test_the_head_is_trained_as_by_the_obvious_loop_and_then_the_pass_selects() -> None:
    model, plain = classifier(), classifier()
    for layer in plain.modules():
        layer.__dict__.update({"_selecting": True} if hasattr(layer, "_selecting") else {})
    trained_plainly(plain)
    one = select_parameters(model, batches(), head_warmup_steps=STEPS, head_warmup_lr=LR, progress=False)
    two = select_parameters(plain, batches(), progress=False)
    torch.testing.assert_close(values(head_of(model)), values(head_of(plain)))
    assert supports(one) == supports(two) != supports(select_parameters(classifier(), batches(), progress=False))
    assert (one.head_warmup_steps, two.head_warmup_steps) == (STEPS, 0)


def snapshot(model: nn.Module) -> Any:
    head = {id(p) for p in head_of(model).values()}
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in head}
    flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters() if p.numel()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return (
        rest,
        flags,
        {n: module.training for n, module in model.named_modules() if "sam_sparse_delta" not in n},
        states,
    )


def test_nothing_but_the_head_and_the_support_changes() -> None:
    model = classifier().train()
    model.base_model.model.bert.encoder.eval()
    before, weights = snapshot(model), values(head_of(model))
    select_parameters(model, batches(), head_warmup_steps=2, progress=False)
    rest, flags, modes, states = snapshot(model)
    assert all(torch.equal(rest[name], value) for name, value in before[0].items() if value.numel())
    assert before[1].items() <= flags.items()
    assert before[2].items() <= modes.items()
    assert states == before[3]
    assert all(not torch.equal(p, weights[name]) for name, p in head_of(model).items())


def interrupted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if len(batch["labels"]) == 2:
        raise KeyboardInterrupt
    return model(**batch).loss


def not_a_number(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss * (torch.nan if len(batch["labels"]) == 2 else 1.0)


def detached(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss.detach()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_warmup_steps": -1}, ValueError, "at least 0"),
        ({"head_warmup_lr": 0.0, "head_warmup_steps": 2}, ValueError, "above 0"),
        ({"dataloader": iter(batches())}, ValueError, "can be read only once"),
        ({"dataloader": []}, ValueError, "no batches for Head warm-up"),
        ({"dataloader": None}, ValueError, "needs data"),
        ({"loss_fn": interrupted}, KeyboardInterrupt, None),
        ({"loss_fn": interrupted, "head_warmup_steps": 2}, KeyboardInterrupt, None),
        ({"loss_fn": not_a_number}, FloatingPointError, "loss of step 2 of Head warm-up is nan"),
        ({"loss_fn": not_a_number, "head_warmup_steps": 2}, FloatingPointError, "loss of batch 2 is nan"),
        ({"loss_fn": detached}, ValueError, "does not depend on the trained parameters"),
        ({"selection": Selection({}, {}, "sam", "global", 0.1, 0.0)}, ValueError, "made for another base model"),
    ],
    ids=lambda value: None if not isinstance(value, dict) else " ".join(value),
)
def test_an_error_or_interruption_says_why_and_leaves_the_head_as_it_was(
    options: dict[str, Any], error: type[BaseException], message: str | None
) -> None:
    model = classifier()
    before = values(head_of(model))
    call = {"dataloader": batches(), "head_warmup_steps": 5, "progress": False, **options}
    with pytest.raises(error, match=message):
        select_parameters(model, **call)
    torch.testing.assert_close(values(head_of(model)), before, rtol=0, atol=0)
    select_parameters(model, batches(), progress=False)  # the adapter is still to be selected


def test_a_model_without_a_head_that_is_trained_is_refused() -> None:
    model = get_peft_model(gpt2(), SamConfig(task_type="CAUSAL_LM", density=0.05))
    with pytest.raises(ValueError, match="modules_to_save"):
        select_parameters(model, [], head_warmup_steps=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_half_precision_learns_by_steps_that_half_precision_would_round_away(dtype: torch.dtype) -> None:
    model, exact = classifier(dtype), classifier()
    for one in (model, exact):
        select_parameters(one, batches() * 20, head_warmup_steps=60, head_warmup_lr=1e-4, progress=False)
    moved, expected = (
        torch.cat(
            [
                (p - q).detach().float().flatten()
                for p, q in zip(head_of(m).values(), head_of(start).values(), strict=True)
            ]
        )
        for m, start in ((model, classifier(dtype)), (exact, classifier()))
    )
    assert float(torch.nn.functional.cosine_similarity(moved, expected, dim=0)) > 0.7


def test_a_trainer_warms_its_head_and_then_sees_its_data_in_the_same_order(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Watching(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            seen.append(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, *args)

    orders = []
    for steps in (0, 5):
        model = classifier()
        before = values(head_of(model))
        trainer = Watching(model=model, args=arguments(tmp_path), train_dataset=text_data())
        selection = select_parameters(trainer, head_warmup_steps=steps)
        assert selection.samples == 13
        same = all(torch.equal(p, before[name]) for name, p in head_of(model).items())
        assert same == (steps == 0)
        trainer.train()
        orders.append(copy.copy(seen))
        seen.clear()
    assert orders[0] == orders[1]


def test_a_selection_says_how_long_the_head_was_warmed_also_in_its_file(tmp_path: Path) -> None:
    model = classifier()
    selection = select_parameters(model, batches(), head_warmup_steps=3, progress=False)
    selection.save(tmp_path / "selection.safetensors")
    again = Selection.load(tmp_path / "selection.safetensors")
    assert again.head_warmup_steps == 3
    assert "after 3 steps of training the head alone" in str(again)
    model.save_pretrained(tmp_path)
    assert "after 3 steps of training the head alone" in (tmp_path / "README.md").read_text()


def moved_plainly(names: Iterable[str], steps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """How far the float32 weights move in the obvious full fine-tuning of the base model."""
    torch.manual_seed(0)
    model = without_dropout(bert()).train().to(dtype)
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    trained = [*parameters.values(), *model.classifier.parameters()]
    weights = [p.detach().clone().float() for p in trained]
    before = [weight.clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    for step, batch in zip(range(steps), itertools.cycle(batches()), strict=False):
        rising = min(step / (steps // 10), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-4 * min(rising, (steps - step) / (steps - steps // 10))
        gradients = [gradient.float() for gradient in torch.autograd.grad(model(**batch).loss, trained)]
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient / max(1.0, norm + 1e-6)
        optimizer.step()
        with torch.no_grad():
            for parameter, weight in zip(trained, weights, strict=True):
                parameter.copy_(weight)
    return {name: (w - b).abs().flatten() for name, w, b in zip(parameters, weights, before, strict=False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_movement_selects_what_a_full_fine_tuning_moves_furthest_and_undoes_that(dtype: torch.dtype) -> None:
    model = classifier(dtype, score="movement").train()
    before, head = snapshot(model), values(head_of(model))
    selection = select_parameters(model, batches(), max_batches=20, progress=False)
    assert (selection.batches, selection.samples) == (20, 68)
    moved = moved_plainly(selection.indices, 20, dtype)
    expected = reference.largest({name: value.double() for name, value in moved.items()}, selection.k)
    for name, found in supports(selection).items():
        for position in set(found) ^ set(expected[name]):  # entries whose movements agree to rounding
            assert float(moved[name][position]) == pytest.approx(selection.threshold, rel=1e-3)
    rest, flags, modes, states = snapshot(model)
    assert all(torch.equal(rest[name], value) for name, value in before[0].items() if value.numel())
    assert before[1].items() <= flags.items()
    assert (modes.items() >= before[2].items(), states) == (True, before[3])
    torch.testing.assert_close(values(head_of(model)), head, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": interrupted}, KeyboardInterrupt, None),
        ({"loss_fn": not_a_number}, FloatingPointError, "loss of step 2 of Rehearsal is nan"),
        ({"memory_budget": "1GiB"}, ValueError, "Leave memory_budget out"),
        ({"dataloader": (batch for batch in batches())}, ValueError, "has no length: pass max_batches"),
        ({"dataloader": iter(batches()), "max_batches": 2}, ValueError, "can be read only once"),
        ({"dataloader": []}, ValueError, "no batches for Rehearsal"),
    ],
    ids=lambda value: None if not isinstance(value, dict) else " ".join(value),
)
def test_a_rehearsal_that_fails_leaves_every_parameter_as_it_was(
    options: dict[str, Any], error: type[BaseException], message: str | None
) -> None:
    model = classifier(score="movement")
    before = values(dict(model.named_parameters()))
    with pytest.raises(error, match=message):
        select_parameters(model, **{"dataloader": batches(), "progress": False, **options})
    torch.testing.assert_close(values(dict(model.named_parameters())), before, rtol=0, atol=0)


def test_a_quantised_or_offloaded_candidate_is_named() -> None:
    model = classifier()
    parameters = {"a": model.base_model.model.bert.embeddings.word_embeddings.weight}
    for hidden in (nn.Parameter(torch.ones(2, dtype=torch.uint8), False), nn.Parameter(torch.ones(2, device="meta"))):
        with pytest.raises(ValueError, match=r"'b' is sharded, quantised or offloaded.*selection=\.\.\."):
            rehearse(model, {**parameters, "b": hidden}, {}, batches(), lambda _: None, steps=1)  # type: ignore[arg-type,return-value]
