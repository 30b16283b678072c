"""Laws of state dicts: an adapter has one layout, wherever it comes from, and a checkpoint brings its support along."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_sam import SamConfig, Selection, select_parameters
from peft_sam.layers.found import deltas_of
from tests.shared.cases import NETS, NetCase, bert, names
from tests.shared.versions import takes_adapters

PREFIX = "base_model.model."


def trained(base: nn.Module, case: NetCase = NETS[0], **options: Any) -> Any:
    """A model with a selected adapter that is not zero."""
    model = pending(base, case, **options)
    if "score" not in options:
        select_parameters(model, [case.batch(3)], progress=False)
    return disturbed(model)


def pending(base: nn.Module, case: NetCase = NETS[0], **options: Any) -> Any:
    config = SamConfig(task_type=case.task_type, **{"density": 0.05, **case.options, **options})
    return get_peft_model(copy.deepcopy(base), config)


def disturbed(model: Any) -> Any:
    with torch.no_grad():
        for delta in deltas_of(model, "default").values():
            delta.values.add_(torch.randn_like(delta.values) * 0.1)
    return model.eval()


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}


def old(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict as versions before had it, with the positions."""
    deltas, found = deltas_of(model, "default"), dict(state)
    for key in state:
        if key.endswith(".support"):
            name = key.removeprefix(PREFIX).removesuffix(".support").replace(".sam_sparse_delta.default", "")
            found[key.removesuffix("support") + "indices"] = deltas[name.replace(".base_layer", "")].indices
            del found[key]
    return found


@takes_adapters
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", NETS, ids=names)
def test_a_loaded_adapter_has_the_keys_shapes_and_tensors_of_the_trained_one(
    tmp_path: Path, case: NetCase, low_cpu_mem_usage: bool
) -> None:
    base = case.make()
    model = trained(base, case)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    by_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    by_transformers: Any = copy.deepcopy(base)
    by_transformers.load_adapter(str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    state = model.state_dict()
    assert shapes(by_peft.state_dict()) == shapes(state)
    assert {PREFIX + key: shape for key, shape in shapes(by_transformers.state_dict()).items()} == shapes(state)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = load_file(tmp_path / "adapter_model.safetensors")
    others = get_peft_model_state_dict(by_peft, save_embedding_layers=False), file
    sparse = {key.replace("sam_sparse_delta.default.", "sam_sparse_delta.") for key in state if "sam_sparse_" in key}
    assert sparse == {key for key in own if "sam_sparse_" in key}
    for other in others:
        assert own.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in own.items())


@pytest.mark.parametrize("kind", [lambda state, _: state, old], ids=["of today", "of versions before"])
@pytest.mark.parametrize("into", ["pending", "selected otherwise", "copied", "pickled"])
@pytest.mark.parametrize("case", NETS, ids=names)
def test_a_state_dict_brings_its_support_into_whatever_adapter_is_there(
    case: NetCase, into: str, kind: Callable[[Any, Any], Any]
) -> None:
    base = case.make()
    model = trained(base, case)
    options = {"density": 0.2, "score": "random"} if into == "selected otherwise" else {}
    other = pending(base, case, **options)
    other = {"copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}.get(into, lambda m: m)(other)
    assert str(other.load_state_dict(kind(model.state_dict(), model))) == "<All keys matched successfully>"
    batch = case.batch(2)
    assert torch.equal(other.eval()(**batch).loss, model(**batch).loss)
    assert shapes(other.state_dict()) == shapes(model.state_dict())
    assert other.peft_config["default"].counts == model.peft_config["default"].counts
    other.merge_adapter()
    other.unmerge_adapter()
    assert all(
        torch.equal(other.base_model.model.state_dict()[key], t)
        for key, t in model.base_model.model.state_dict().items()
    )


def test_tensors_of_the_same_size_are_filled_in_place() -> None:
    base = bert()
    model, other = (trained(base, score="random", budget="tensor", seed=seed) for seed in (0, 1))
    before = dict(deltas_of(other, "default"))
    other.load_state_dict(model.state_dict())
    assert all(deltas_of(other, "default")[name] is delta for name, delta in before.items())


def test_a_part_of_the_state_changes_a_selected_adapter_s_part_and_a_base_s_state_leaves_it_pending() -> None:
    base = bert()
    model, other = trained(base), trained(base, score="random", density=0.05)
    key, values = next((key, t) for key, t in other.state_dict().items() if key.endswith(".values"))
    rest = {k: t.clone() for k, t in other.state_dict().items() if k != key}
    other.load_state_dict({key: values * 2}, strict=False)
    assert all(torch.equal(other.state_dict()[k], t) for k, t in rest.items())
    fresh = pending(base)
    fresh.load_state_dict({k: t for k, t in model.state_dict().items() if "sam_sparse_" not in k}, strict=False)
    assert not fresh.base_model.sparse_deltas()
    select_parameters(fresh, [NETS[0].batch(3)], progress=False)


def test_a_part_with_another_support_leaves_the_modules_that_it_does_not_name() -> None:
    base = bert()
    model, other = (trained(base, score="random", density=density) for density in (0.05, 0.1))
    name = next(iter(deltas_of(other, "default")))
    inside = name.removesuffix("weight")
    part = {key: t for key, t in other.state_dict().items() if inside in key}
    before = {n: (d.indices.clone(), d.values.clone()) for n, d in deltas_of(model, "default").items()}
    model.load_state_dict(part, strict=False)
    after = deltas_of(model, "default")
    assert after.keys() == before.keys()
    assert torch.equal(after[name].indices, deltas_of(other, "default")[name].indices)
    for n, (indices, values) in before.items():
        if not n.startswith(name.removesuffix("weight")):
            assert torch.equal(after[n].indices, indices)
            assert torch.equal(after[n].values, values)
    assert model.peft_config["default"].counts == {n: len(d.values) for n, d in after.items()}


def test_the_deltas_alone_are_a_whole_adapter() -> None:
    base = bert()
    model, other = (trained(base, score="random", density=density) for density in (0.3, 0.002))
    assert len(deltas_of(other, "default")) < len(deltas_of(model, "default"))
    model.load_state_dict({key: t for key, t in other.state_dict().items() if "sam_sparse_" in key}, strict=False)
    assert shapes(model.state_dict()) == shapes(other.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state, key: state.update({key: state[key].flip(0)[:-1]}), "must have .* bytes for"),
        (lambda state, key: state.pop(key), "expected support"),
        (lambda state, key: state.update({key.replace("weight", "nothing"): state[key]}), "does not have"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Callable[[Any, str], Any], message: str) -> None:
    base = bert()
    state = trained(base).state_dict()
    damage(state, next(key for key in state if key.endswith("weight.support")))
    for other in (pending(base), pending(base, score="random", density=0.1)):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in before.items())


def test_the_state_of_a_pending_adapter_fits_a_pending_one_alone() -> None:
    base = bert()
    state = pending(base).state_dict()
    pending(base).load_state_dict(state)
    with pytest.raises(ValueError, match="'default' was pending"):
        trained(base).load_state_dict(state)


def test_unloading_leaves_no_hook_in_the_base_model() -> None:
    base = bert()
    model = get_peft_model(base, SamConfig(score="random"))
    assert base._load_state_dict_pre_hooks
    before, unloaded = set(vars(bert())), model.unload()
    assert set(vars(unloaded)) - before <= {"peft_config"}
    assert not unloaded._load_state_dict_pre_hooks


def test_accelerate_loads_a_checkpoint_into_a_pending_adapter(tmp_path: Path) -> None:
    base = bert()
    model, other = trained(base), pending(base)
    for each, action in ((model, "save_state"), (other, "load_state")):
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(each)
        getattr(accelerator, action)(str(tmp_path))
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert other.peft_config["default"].counts == model.peft_config["default"].counts


def test_accelerate_resumes_an_optimizer_that_was_made_after_the_selection(tmp_path: Path) -> None:
    base, batch = bert(), NETS[0].batch(3)

    def prepared(selection: Selection | None) -> tuple[Accelerator, Any, Any, Selection]:
        model, accelerator = pending(base), Accelerator(cpu=True)
        selection = select_parameters(model, [batch], selection=selection, progress=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        return accelerator, *accelerator.prepare(model, optimizer), selection

    def step(model: Any, optimizer: Any) -> None:
        model.eval()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator, model, optimizer, selection = prepared(None)
    step(model, optimizer)
    selection.save(tmp_path / "selection.safetensors")
    accelerator.save_state(str(tmp_path / "state"))
    again, other, its, _ = prepared(Selection.load(tmp_path / "selection.safetensors"))
    again.load_state(str(tmp_path / "state"))
    for each in ((model, optimizer), (other, its)):
        step(*each)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_an_adapter_injected_for_a_state_dict_without_values_shows_its_keys_already() -> None:
    base = bert()
    state = get_peft_model_state_dict(trained(base), save_embedding_layers=False)
    sparse = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if "sam_sparse_" in key}
    config = SamConfig(density=0.05)
    empty = inject_adapter_in_model(config, copy.deepcopy(base), state_dict=sparse, low_cpu_mem_usage=True)
    shown = get_peft_model_state_dict(empty, save_embedding_layers=False)
    assert shown.keys() == sparse.keys()
    assert all(tensor.shape == sparse[key].shape for key, tensor in shown.items())
