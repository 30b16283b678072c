"""Laws of buffers that training moves: the adapter does not hold them, and saving says so."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from peft_sam import MovedBuffersWarning, SamConfig

X = torch.randn(16, 4)
NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "1"),
    "a BatchNorm below": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), nn.Linear(4, 2)),
        "1.0",
    ),
    "spectral norm": (lambda: nn.Sequential(nn.Linear(4, 4), spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)), "1"),
}
every_net = pytest.mark.parametrize(("make", "place"), NETS.values(), ids=NETS)


def adapted(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(base, SamConfig(target_modules=["0"], score="random", density=0.5, **options))


def train(model: Any, prepare: Callable[[Any], Any] = lambda model: None) -> None:
    model.train()
    prepare(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


@every_net
def test_saving_says_that_training_moved_buffers_and_names_the_module(tmp_path: Path, make: Any, place: str) -> None:
    base = make()
    model = adapted(copy.deepcopy(base))
    train(model)
    with pytest.warns(MovedBuffersWarning, match=rf"such as '{place}\..*modules_to_save"):
        model.save_pretrained(tmp_path)
    assert not torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path)), outputs(model))


@every_net
def test_modules_that_stay_in_eval_mode_move_nothing(tmp_path: Path, make: Any, place: str) -> None:
    base = make()
    model = adapted(copy.deepcopy(base))
    train(model, lambda model: model.get_base_model().get_submodule(place).eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path)), outputs(model))


def test_an_adapter_that_holds_the_module_says_nothing(tmp_path: Path) -> None:
    base = NETS["BatchNorm"][0]()
    model = adapted(copy.deepcopy(base), modules_to_save=["1"])
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path)), outputs(model))


@pytest.mark.parametrize("change", [
    lambda model: model.to(torch.bfloat16),
    lambda model: model.to(torch.float64),
    copy.deepcopy,
    lambda model: model.eval(),
], ids=["bfloat16", "float64", "copied", "in eval mode"])  # fmt: skip
def test_what_moves_no_buffer_says_nothing(tmp_path: Path, change: Any) -> None:
    model = change(adapted(NETS["BatchNorm"][0]()))
    model.eval()(X.to(next(model.parameters()).dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def test_every_adapter_of_a_base_that_was_moved_says_so_also_of_a_copy(tmp_path: Path) -> None:
    model = adapted(NETS["BatchNorm"][0]())
    train(model)
    model.add_adapter("second", SamConfig(target_modules=["2"], score="random", density=0.5))
    for one in (model, copy.deepcopy(model)):
        with pytest.warns(MovedBuffersWarning, match="about '1'"):
            one.save_pretrained(tmp_path, selected_adapters=["second"])


def test_a_base_that_is_adapted_anew_starts_anew(tmp_path: Path) -> None:
    model = adapted(NETS["BatchNorm"][0]())
    train(model)
    adapted(model.unload()).save_pretrained(tmp_path)
