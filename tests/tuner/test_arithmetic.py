"""Laws of combining adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.merge_utils import magnitude_prune, ties
from torch import Tensor, nn

from peft_sam import SamConfig, select_parameters
from peft_sam.layers.found import sam_layers
from peft_sam.tuner import arithmetic
from tests.shared.cases import bert

BASE = bert()
Dense = dict[str, Tensor]


def two_adapters() -> Any:
    options: dict[str, Any] = {"score": "random", "init_weights": False}
    model = get_peft_model(copy.deepcopy(BASE), SamConfig(density=0.1, **options), adapter_name="first")
    model.add_adapter("second", SamConfig(density=0.05, seed=3, target_modules=["query", "dense"], **options))
    return model


def dense(model: Any, adapter: str) -> Dense:
    found = {}
    for name, delta in model.base_model.sparse_deltas(adapter).items():
        flat = torch.zeros(delta.shape.numel()).index_copy(0, delta.indices, delta.values.detach())
        found[name] = flat.view(delta.shape)
    return found


def support(model: Any, adapter: str) -> dict[str, set[int]]:
    return {name: set(d.indices.tolist()) for name, d in model.base_model.sparse_deltas(adapter).items()}


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.3], [2.0, 0.0]])
def test_a_weighted_sum_of_adapters_is_the_sum_of_their_dense_deltas_on_the_union(weights: list[float]) -> None:
    model = two_adapters()
    model.add_weighted_adapter(["first", "second"], weights, "third")
    a, b, c = (dense(model, name) for name in ("first", "second", "third"))
    assert c.keys() == a.keys() | b.keys()
    for name in c:
        zero = torch.zeros(c[name].shape)
        torch.testing.assert_close(c[name], weights[0] * a.get(name, zero) + weights[1] * b.get(name, zero))
        both = [support(model, adapter).get(name, set()) for adapter in ("first", "second")]
        assert support(model, "third")[name] == both[0] | both[1]


def test_a_combined_adapter_runs_saves_and_loads(tmp_path: Path) -> None:
    model = two_adapters().eval()
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    active = list(model.base_model.active_adapters)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "third")
    assert list(model.base_model.active_adapters) == active
    model.base_model.set_adapter(["first", "second"])
    together = model(**batch).logits
    model.set_adapter("third")
    torch.testing.assert_close(model(**batch).logits, together)
    model.save_pretrained(tmp_path, selected_adapters=["third"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "third").eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


IDS = torch.arange(12).view(2, 6)


def logits(model: Any, adapter: str) -> Tensor:
    model.set_adapter(adapter)
    return model(input_ids=IDS).logits


def test_an_adapter_scaled_by_one_half_changes_each_entry_half_as_much() -> None:
    model = two_adapters().eval()
    model.add_weighted_adapter(["first"], [0.5], "scaled")
    assert support(model, "scaled") == support(model, "first")
    for name, delta in dense(model, "first").items():
        assert torch.equal(dense(model, "scaled")[name], delta / 2)
    model.add_weighted_adapter(["scaled"], [2], "again")
    assert torch.equal(logits(model, "again"), logits(model, "first"))


@pytest.mark.parametrize("r", [None, 2])
def test_a_sum_has_each_adapter_at_its_scale(r: int | None) -> None:
    options: dict[str, Any] = {"score": "random", "density": 0.1, "init_weights": False, "r": r}
    model = get_peft_model(copy.deepcopy(BASE), SamConfig(**options), adapter_name="first").eval()
    model.add_adapter("second", SamConfig(seed=1, **options))
    for layer in sam_layers(model).values():
        layer.set_scale("first", 0.5)
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    model.base_model.set_adapter(["first", "second"])
    expected = model(**batch).logits
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "third")
    model.set_adapter("third")
    torch.testing.assert_close(model(**batch).logits, expected)


def test_a_sum_of_adapters_of_some_layers_is_saved_and_loaded(tmp_path: Path) -> None:
    options: dict[str, Any] = {"score": "random", "density": 0.1, "init_weights": False, "target_modules": ["query"]}
    some = SamConfig(layers_to_transform=[0], layers_pattern="layer", **options)
    model = get_peft_model(copy.deepcopy(BASE), some, adapter_name="first").eval()
    model.add_weighted_adapter(["first"], [2.0], "third")
    model.set_adapter("third")
    model.save_pretrained(tmp_path)
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "third")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_head_that_one_trains_densely_and_another_targets_is_not_combined() -> None:
    dense_too: dict[str, Any] = {"modules_to_save": ["classifier"], "score": "random", "density": 0.1}
    model = get_peft_model(copy.deepcopy(BASE), SamConfig(**dense_too), adapter_name="first")
    options: dict[str, Any] = {"score": "random", "density": 0.1, "init_weights": False}
    model.add_adapter("second", SamConfig(target_modules=["classifier"], **options))
    keys = model.state_dict().keys()
    message = "has 'classifier' in modules_to_save, and another adapter targets it"
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "third")
    with pytest.raises(ValueError, match=message):
        model.add_adapter("third", SamConfig(**dense_too))
    assert model.state_dict().keys() == keys
    assert set(model.peft_config) == {"first", "second"}


def test_a_head_is_trained_densely_again_when_those_that_targeted_it_are_gone() -> None:
    options: dict[str, Any] = {"score": "random", "density": 0.1}
    dense_too = SamConfig(modules_to_save=["classifier"], **options)
    model = get_peft_model(copy.deepcopy(BASE), dense_too, adapter_name="first")
    model.add_adapter("second", SamConfig(target_modules=["classifier"], **options))
    model.delete_adapter("second")
    model.add_adapter("third", dense_too)
    assert set(model.get_base_model().classifier.modules_to_save) == {"first", "third"}


def test_a_sum_that_fails_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    model = two_adapters()
    keys = model.state_dict().keys()
    monkeypatch.setattr(arithmetic, "combine_heads", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "third")
    assert model.state_dict().keys() == keys
    assert set(model.peft_config) == {"first", "second"}


def test_an_adapter_minus_itself_is_the_base_model() -> None:
    model = two_adapters().eval()
    model.add_weighted_adapter(["first", "first"], [1.0, -1.0], "nothing")
    assert torch.equal(logits(model, "nothing"), BASE.eval()(input_ids=IDS).logits)


def test_subtracting_what_was_added_gives_the_adapter_back() -> None:
    model = two_adapters().eval()
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["sum", "second"], [1, -1], "back")
    torch.testing.assert_close(logits(model, "back"), logits(model, "first"))


@pytest.mark.parametrize("combination", ["linear", "ties"])
@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
def test_heads_are_combined_by_what_each_adapter_changed(combination: str, tmp_path: Path) -> None:
    config = SamConfig(density=0.1, score="random", init_weights=False, task_type="SEQ_CLS")
    model: Any = get_peft_model(copy.deepcopy(BASE), config, adapter_name="first").eval()
    model.add_adapter("second", SamConfig(density=0.05, seed=3, score="random", init_weights=False))
    head = model.base_model.model.classifier
    head.modules_to_save["first"].weight.data.add_(1)
    start = head.original_module.weight
    model.add_weighted_adapter(["second", "first"], [1.0, 0.5], "third", combination, density=1.0)
    half = start + (head.modules_to_save["first"].weight - start) / 2
    torch.testing.assert_close(head.modules_to_save["third"].weight.data, half.data)
    assert head.active_adapters == ["first"]
    model.add_weighted_adapter(["first"], [1], "same")
    assert torch.equal(logits(model, "same"), logits(model, "first"))
    model.add_weighted_adapter(["first", "first"], [1, -1], "nothing")
    assert torch.equal(logits(model, "nothing"), BASE.eval()(input_ids=IDS).logits)
    expected = logits(model, "third")
    model.save_pretrained(tmp_path, selected_adapters=["third"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "third").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(("combination", "oracle"), [("ties", ties), ("magnitude_prune", magnitude_prune)])
def test_peft_s_combinations_see_the_union_of_the_supports(combination: str, oracle: Any) -> None:
    model = two_adapters()
    model.add_weighted_adapter(["first", "second"], [1.0, 0.5], "third", combination, density=0.5)
    a, b, c = (dense(model, name) for name in ("first", "second", "third"))
    for name, found in c.items():
        union = torch.tensor(
            sorted(support(model, "first").get(name, set()) | support(model, "second").get(name, set()))
        )
        zero = torch.zeros(found.shape)
        both = [of.get(name, zero).flatten()[union] for of in (a, b)]
        torch.testing.assert_close(found.flatten()[union], oracle(both, torch.tensor([1.0, 0.5]), 0.5))


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
def test_dropping_at_random_keeps_the_support_and_about_so_many_values(combination: str) -> None:
    torch.manual_seed(0)
    model = two_adapters()
    model.add_weighted_adapter(["first"], [1.0], "third", combination, density=0.5)
    assert support(model, "third") == support(model, "first")
    values = torch.cat([delta.values for delta in model.base_model.sparse_deltas("third").values()])
    assert float((values != 0).float().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["first", "x"], [1.0, 1.0], "third"), r"no adapter 'x'; there are \['first', 'second'\]"),
        ((["first", "second"], [1.0], "third"), "one weight for each .* got 2 and 1"),
        (([], [], "third"), "at least one"),
        ((["first", "second"], [1.0, 1.0], "second"), "an adapter 'second' already"),
        ((["first", "second"], [1.0, 1.0], "third", "svd"), r"one of \['linear', 'ties'.*got 'svd'"),
        ((["first", "second"], [1.0, 1.0], "third", "ties"), "'ties' needs a density.* got None"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_nothing_is_added(arguments: Any, message: str) -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"first", "second"}


def test_a_pending_adapter_combines_and_merges_as_nothing_with_a_warning() -> None:
    base = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    model: Any = get_peft_model(base, SamConfig(target_modules=["0"], density=0.5), adapter_name="first")
    bits = base[0].weight.clone()
    chosen = SamConfig(target_modules=["0"], density=0.5, score="random", init_weights=False)
    with pytest.warns(UserWarning, match=r"\['first'\] are combined as nothing.*select_parameters"):
        model.add_weighted_adapter(["first"], [2.0], "third")
    assert not model.base_model.sparse_deltas("third")
    model.add_adapter("second", chosen)
    with pytest.warns(UserWarning, match=r"\['first'\] are combined as nothing"):
        model.add_weighted_adapter(["first", "second"], [1.0, 0.5], "fourth")
    second, fourth = (model.base_model.sparse_deltas(name) for name in ("second", "fourth"))
    assert all(torch.equal(fourth[name].indices, delta.indices) for name, delta in second.items())
    assert all(torch.equal(fourth[name].values, delta.values * 0.5) for name, delta in second.items())
    with pytest.warns(UserWarning, match=r"\['first'\] are merged as nothing"):
        model.merge_adapter(["first"])
    assert torch.equal(model.base_model.model[0].base_layer.weight, bits)
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"is merged: call model\.unmerge_adapter"):
        select_parameters(model, [x], loss_fn=lambda model, x: model(x).sum(), adapter_name="first", progress=False)
    model.unmerge_adapter()
    select_parameters(model, [x], loss_fn=lambda model, x: model(x).sum(), adapter_name="third", progress=False)
    assert model.base_model.sparse_deltas("third")


def test_rows_of_embeddings_cannot_be_combined() -> None:
    model = get_peft_model(bert(), SamConfig(score="random", trainable_token_indices={"word_embeddings": [1, 2]}))
    with pytest.raises(ValueError, match="trainable_token_indices, which cannot be combined"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "third")
