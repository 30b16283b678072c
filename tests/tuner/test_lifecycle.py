"""Laws of an adapter's life among PEFT's ways to make, name, move and remove one."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import _get_in_out_features
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertModel, DebertaConfig, DebertaModel
from transformers.pytorch_utils import Conv1D

from peft_sam import SamConfig, select_parameters
from peft_sam.layers.found import deltas_of, sam_layers
from tests.shared.cases import MODULES, ModuleCase, bert, gpt2, names
from tests.shared.reference import adapted_copy

IDS = torch.arange(12).view(2, 6)
BATCH = {"input_ids": IDS, "labels": torch.tensor([0, 1])}


def config(**options: Any) -> SamConfig:
    return SamConfig(**{"score": "random", "density": 0.1, "init_weights": False, **options})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def devices(model: nn.Module) -> set[str]:
    return {p.device.type for name, p in model.named_parameters() if "sam_sparse_" in name}


# Made without values, filled later


@pytest.mark.parametrize("score", ["sam", "random", "magnitude"])
def test_an_adapter_made_for_low_memory_use_holds_nothing_until_a_state_dict_comes(score: str) -> None:
    base = bert()
    given = get_peft_model(copy.deepcopy(base), config())
    model = get_peft_model(copy.deepcopy(base), config(score=score), low_cpu_mem_usage=True)
    assert devices(model) == {"meta"}
    assert not model.base_model.sparse_deltas()
    assert torch.equal(logits(model), logits(base))
    set_peft_model_state_dict(model, get_peft_model_state_dict(given), low_cpu_mem_usage=True)
    assert devices(model) == {"cpu"}
    assert torch.equal(logits(model), logits(given))


def test_an_adapter_made_for_low_memory_use_can_be_selected_instead() -> None:
    model = get_peft_model(bert(), SamConfig(density=0.05), low_cpu_mem_usage=True)
    select_parameters(model, [BATCH], progress=False)
    assert devices(model) == {"cpu"}
    model.train()(**BATCH).loss.backward()
    assert all(delta.values.grad is not None for delta in model.base_model.sparse_deltas().values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("score", ["sam", "random"])
def test_an_adapter_injected_for_a_state_dict_has_its_support_and_awaits_its_values(
    low_cpu_mem_usage: bool, score: str
) -> None:
    base = bert()
    given = inject_adapter_in_model(config(target_modules="all"), copy.deepcopy(base))
    state = get_peft_model_state_dict(given, save_embedding_layers=False)
    model = copy.deepcopy(base)
    inject_adapter_in_model(
        SamConfig(score=score, target_modules="all"), model, state_dict=state, low_cpu_mem_usage=low_cpu_mem_usage
    )
    ours, theirs = deltas_of(model, "default"), deltas_of(given, "default")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(delta.indices, theirs[name].indices) for name, delta in ours.items())
    assert devices(model) == {"meta" if low_cpu_mem_usage else "cpu"}
    if not low_cpu_mem_usage:
        torch.testing.assert_close(logits(model), logits(base))
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
        assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in state.items()}
    result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert torch.equal(logits(model), logits(given))


def test_a_state_dict_goes_beyond_the_config_with_a_warning() -> None:
    base = bert()
    state = get_peft_model_state_dict(inject_adapter_in_model(config(), copy.deepcopy(base)))
    narrow = config(target_modules=["query", "key"], exclude_modules=["key"], layers_to_transform=[0])
    with pytest.warns(RuntimeWarning, match=r"additional target modules: \['bert.encoder.layer.0.attention.output"):
        model = inject_adapter_in_model(narrow, base, state_dict=state)
    assert get_peft_model_state_dict(model).keys() == state.keys()


def test_keys_of_a_compiled_model_fit_a_plain_one_and_the_other_way_round() -> None:
    base = bert()
    adapted = inject_adapter_in_model(config(), copy.deepcopy(base))
    for wrap, unwrap in ((torch.compile, lambda m: m), (lambda m: m, torch.compile)):
        state = get_peft_model_state_dict(wrap(adapted))
        model = unwrap(copy.deepcopy(base))
        inject_adapter_in_model(config(), model, state_dict=state)
        assert deltas_of(model, "default").keys() == deltas_of(adapted, "default").keys()
    compiled = get_peft_model(torch.compile(gpt2()), config())
    assert (
        compiled.base_model.sparse_deltas().keys() == get_peft_model(gpt2(), config()).base_model.sparse_deltas().keys()
    )


# Names


@pytest.mark.parametrize(
    "name", ["weight", "support", "sam_sparse_delta", "default2", "0", "query", "base_layer", "modules_to_save"]
)
def test_any_name_that_a_module_can_have_is_a_name_for_an_adapter(tmp_path: Path, name: str) -> None:
    base = bert()
    model = get_peft_model(copy.deepcopy(base), config(task_type="SEQ_CLS"), adapter_name=name)
    assert all(f".{name}." in key for key, p in model.named_parameters() if p.requires_grad)
    state = get_peft_model_state_dict(model, adapter_name=name)
    assert state.keys() == get_peft_model_state_dict(get_peft_model(bert(), config(task_type="SEQ_CLS"))).keys()
    other = get_peft_model(copy.deepcopy(base), config(task_type="SEQ_CLS", density=0.05), adapter_name="other")
    set_peft_model_state_dict(other, state, adapter_name="other")
    assert torch.equal(logits(other), logits(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / name, adapter_name=name)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["a.b", "values"])
def test_a_name_that_no_module_can_have_is_refused_as_by_peft_and_the_model_is_as_before(name: str) -> None:
    base = bert()
    before = [type(module) for module in base.modules()]
    with pytest.raises(KeyError) as expected:
        get_peft_model(bert(), LoraConfig(target_modules=["query"]), adapter_name=name)
    with pytest.raises(KeyError, match=re.escape(str(expected.value))):
        get_peft_model(base, config(), adapter_name=name)
    assert [type(module) for module in base.modules()] == before
    model = get_peft_model(base, config())
    with pytest.raises(KeyError, match=re.escape(str(expected.value))):
        model.add_adapter(name, config())
    assert set(model.peft_config) == {"default"}


def test_the_method_s_prefix_as_a_name_works_with_peft_s_warning() -> None:
    base = bert()
    with pytest.warns(UserWarning, match="'sam_sparse' should not be contained in the prefix"):
        model = get_peft_model(copy.deepcopy(base), config(), adapter_name="sam_sparse")
    again = get_peft_model(base, config(density=0.05))
    set_peft_model_state_dict(again, get_peft_model_state_dict(model, adapter_name="sam_sparse"))
    assert torch.equal(logits(again), logits(model))


def test_of_adapters_with_names_inside_each_other_only_the_chosen_one_is_saved(tmp_path: Path) -> None:
    model = get_peft_model(bert(), config())
    keys = get_peft_model_state_dict(model).keys()
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, config(density=0.02))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert get_peft_model_state_dict(model).keys() == keys
    assert torch.equal(logits(PeftModel.from_pretrained(model.unload(), tmp_path)), logits(model))


def test_modules_with_the_method_s_prefix_in_their_names_are_the_base_model_s() -> None:
    class Imposter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.sam_sparse_delta, self.sam_sparse_head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.sam_sparse_head(self.sam_sparse_delta(self.lin(x)))

    base, x = Imposter(), torch.randn(2, 5)
    one = get_peft_model(copy.deepcopy(base), config(target_modules=["lin"], density=0.5))
    assert {name.split(".")[2] for name, p in one.named_parameters() if p.requires_grad} == {"lin"}
    state = get_peft_model_state_dict(one)
    assert all(key.startswith("base_model.model.lin.") for key in state)
    every = get_peft_model(copy.deepcopy(base), config(target_modules="all", density=0.5))
    again = get_peft_model(base, config(target_modules="all", density=0.2))
    set_peft_model_state_dict(again, get_peft_model_state_dict(every))
    assert torch.equal(again(x), every(x))


# Status, and what is trained


def test_a_layer_tells_of_the_adapters_that_target_it_and_no_others() -> None:
    model = get_peft_model(bert(), config(target_modules=["query", "key"]))
    model.add_adapter("other", config(target_modules=["key", "word_embeddings"]))
    status = {layer.name.rpartition(".")[2]: layer for layer in model.get_layer_status()}
    expected = {"query": ["default"], "key": ["default", "other"], "word_embeddings": ["other"]}
    assert {name: layer.available_adapters for name, layer in status.items()} == expected
    assert {name: sorted(layer.devices) for name, layer in status.items()} == expected
    assert status["key"].requires_grad == {"default": True, "other": False}
    model.merge_adapter(["other"])
    assert {n: s.merged_adapters for n, s in ((s.name, s) for s in model.get_layer_status()) if s.merged_adapters}
    assert model.get_model_status().merged_adapters == ["other"]
    model.unmerge_adapter()  # without a warning from those that had nothing to unmerge
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []


def trained(model: nn.Module) -> set[str]:
    return {
        name.split(".sam_sparse_delta.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
    }


def test_what_requires_gradients_follows_set_adapter_and_the_switches(tmp_path: Path) -> None:
    base = bert()
    model = get_peft_model(copy.deepcopy(base), config())
    model.add_adapter("other", config())
    assert trained(model) == {"default"}
    model.set_adapter("other")
    assert trained(model) == {"other"}
    model.base_model.set_adapter(["default", "other"])
    assert trained(model) == {"default", "other"}
    model.set_adapter("default", inference_mode=True)
    assert trained(model) == set()
    model.set_requires_grad(["other"])
    assert trained(model) == {"other"}
    model.set_requires_grad("other", requires_grad=False)
    model.set_adapter("default")
    with model.disable_adapter():
        assert trained(model) == set()
    assert trained(model) == {"default"}
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=is_trainable)
        assert trained(loaded) == ({"default"} if is_trainable else set())
        loaded.load_adapter(tmp_path / "other", "second", is_trainable=is_trainable)
        assert trained(loaded) == ({"default", "second"} if is_trainable else set())


def test_loading_a_second_adapter_leaves_frozen_what_was_frozen(tmp_path: Path) -> None:
    model = get_peft_model(bert(), config())
    model.save_pretrained(tmp_path)
    first = next(iter(model.base_model.sparse_deltas().values()))
    first.values.requires_grad_(False)
    model.load_adapter(tmp_path, "other")
    assert not first.values.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == len(model.base_model.sparse_deltas()) - 1


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_layers_tell_their_features_as_peft_s_do(case: ModuleCase) -> None:
    base = case.make()
    for name, layer in sam_layers(get_peft_model(copy.deepcopy(base), config(target_modules="all"))).items():
        module = base.get_submodule(name)
        known = isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D))
        expected = _get_in_out_features(module) if known else (None, None)
        assert (layer.in_features, layer.out_features) == expected, name


def test_two_adapters_from_one_config_start_from_different_small_deltas() -> None:
    model = get_peft_model(bert(), config())
    model.add_adapter("other", config())
    one, other = (model.base_model.sparse_deltas(name) for name in ("default", "other"))
    for name, delta in one.items():
        assert torch.equal(delta.indices, other[name].indices)  # the same seed
        assert not torch.equal(delta.values, other[name].values)


# Copies, dtypes, merging and unloading


def test_torch_save_keeps_the_whole_model() -> None:
    model = get_peft_model(gpt2(), config(target_modules="all"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), logits(model))


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu").double()])
def test_moving_to_another_dtype_moves_values_and_keeps_the_support(move: Any) -> None:
    model = get_peft_model(gpt2(), config(target_modules="all"))
    before = {name: delta.indices.clone() for name, delta in model.base_model.sparse_deltas().items()}
    moved = move(model)
    dtype = next(moved.parameters()).dtype
    for name, delta in moved.base_model.sparse_deltas().items():
        assert delta.values.dtype == dtype
        assert torch.equal(delta.indices, before[name])
    unmerged = logits(moved)
    torch.testing.assert_close(logits(moved.merge_and_unload()), unmerged, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merging_a_broken_adapter_safely_leaves_the_whole_model_as_it_is(value: float) -> None:
    model = get_peft_model(bert(), config())
    list(model.base_model.sparse_deltas().values())[-1].values.data[0] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
            merge(safe_merge=True)
        assert model.state_dict().keys() == before.keys()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
        assert not any(layer.merged for layer in sam_layers(model).values())


# Modules inside modules, and other tuners


def deberta() -> DebertaModel:
    shape = {k: v for k, v in bert().config.to_dict().items() if "size" in k or "num" in k or "max" in k}
    return DebertaModel(DebertaConfig(**shape))


def test_a_second_adapter_inside_wrapped_modules_saves_and_loads(tmp_path: Path) -> None:
    base = deberta().eval()  # its attention owns biases and has linear children
    model = get_peft_model(copy.deepcopy(base), config(target_modules="all"))
    model.add_adapter("other", config(target_modules="all", seed=1))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "other")
    model.set_adapter("other")
    model.eval()
    expected = model(input_ids=IDS).last_hidden_state
    assert torch.equal(loaded(input_ids=IDS).last_hidden_state, expected)
    loaded.load_adapter(tmp_path, "third")
    loaded.set_adapter("third")
    model.set_adapter("default")
    assert torch.equal(loaded(input_ids=IDS).last_hidden_state, model(input_ids=IDS).last_hidden_state)


def test_a_mixed_model_loads_sparse_adapters_and_takes_out_those_that_do_not_fit(tmp_path: Path) -> None:
    base = bert()
    model = get_peft_model(copy.deepcopy(base), config())
    model.save_pretrained(tmp_path / "fits")
    get_peft_model(BertModel(base.config), config(density=0.3)).save_pretrained(tmp_path / "other")
    mixed = PeftMixedModel.from_pretrained(copy.deepcopy(base), tmp_path / "fits")
    assert torch.equal(logits(mixed), logits(model))
    mixed.load_adapter(tmp_path / "fits", "again")
    mixed.set_adapter("again")
    assert torch.equal(logits(mixed), logits(model))
    keys = mixed.state_dict().keys()
    with pytest.raises(ValueError, match="which the base model does not have"):
        mixed.load_adapter(tmp_path / "other", "third")
    assert mixed.state_dict().keys() == keys
    assert set(mixed.peft_config) == {"default", "again"}


def test_a_file_that_is_refused_leaves_no_layer_behind(tmp_path: Path) -> None:
    base = gpt2().eval()
    wide = config(task_type="CAUSAL_LM", target_modules=["wte", "c_attn", "c_proj"])
    saved = get_peft_model(copy.deepcopy(base), wide)
    saved.save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: t[:-1].clone() for key, t in load_file(file).items()}, file)
    model: Any = get_peft_model(copy.deepcopy(base), config(task_type="CAUSAL_LM", target_modules=["c_attn"]))
    keys, expected = model.state_dict().keys(), logits(model)
    with pytest.raises(ValueError, match="or the file is damaged"):
        model.load_adapter(tmp_path, "other")
    assert model.state_dict().keys() == keys
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("order", [("s1", "low", "s2"), ("s1", "s2", "low"), ("low", "s1", "s2")])
def test_sparse_adapters_around_and_inside_lora_are_each_one_layer(order: tuple[str, ...], tmp_path: Path) -> None:
    base = bert().eval()
    sparse = {"s1": config(seed=1, target_modules=["query"]), "s2": config(seed=2, target_modules=["query", "value"])}
    lora = LoraConfig(target_modules=["query"], init_lora_weights=False, r=2)
    model: Any = get_peft_model(copy.deepcopy(base), {"low": lora, **sparse}[order[0]], order[0], mixed=True)
    for name in order[1:]:
        model.add_adapter(name, {"low": lora, **sparse}[name])
    for name, of in sparse.items():
        alone = get_peft_model(copy.deepcopy(base), of)
        with torch.no_grad():
            for key, delta in deltas_of(alone, "default").items():
                here = deltas_of(model, name)[key]
                assert torch.equal(here.indices, delta.indices)
                here.values.copy_(delta.values)
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(alone))
    alone.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    torch.testing.assert_close(logits(model), logits(alone))


class Stack(nn.Module):
    """Layers under a name of its own, as an older architecture had them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Inside(nn.Module):
    """The same layers one level down, as a newer architecture has them."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.body = stack

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_an_adapter_follows_its_base_model_to_new_names(tmp_path: Path) -> None:
    stack, x = Stack(), torch.randn(2, 5)
    old = get_peft_model(copy.deepcopy(stack), config(density=0.5))
    old.save_pretrained(tmp_path)
    new = PeftModel.from_pretrained(Inside(copy.deepcopy(stack)), tmp_path, key_mapping={"^layers": "body.layers"})
    assert torch.equal(new(x), old(x))
    before, after = (model.peft_config["default"].selection for model in (old, new))
    assert after["counts"] == {f"body.{name}": number for name, number in before["counts"].items()}
    assert after["score"] == before["score"] == "random"
    new.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(Inside(stack), tmp_path / "new")
    assert torch.equal(again(x), old(x))


def test_transformers_own_methods_switch_and_delete_adapters() -> None:
    base = bert().eval()
    model = copy.deepcopy(base)
    model.add_adapter(config(), "one")
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):  # PEFT's, at every second one
        model.add_adapter(config(target_modules="all", seed=1), "two")
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        alone[name] = logits(model)
    model.set_adapter(["one", "two"])
    together = logits(model)
    assert not any(torch.equal(together, other) for other in alone.values())
    model.delete_adapter("one")
    assert torch.equal(logits(model), alone["two"])
    model.delete_adapter("two")
    assert torch.equal(logits(model), logits(base))


TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's


@TIED
@pytest.mark.parametrize("fails", [False, True])
def test_a_second_adapter_trains_the_head_densely_that_follows_the_embedding_of_the_first(fails: bool) -> None:
    model: Any = get_peft_model(gpt2().eval(), config(task_type="CAUSAL_LM", target_modules="all"))
    expected = logits(model)
    second = {"target_modules": ["nothing"] if fails else ["c_attn"], "modules_to_save": ["lm_head"], "seed": 1}
    if fails:
        with pytest.raises(ValueError, match="nothing"):
            model.add_adapter("second", config(**second))
    else:
        model.add_adapter("second", config(**second))
        assert torch.equal(logits(model), expected)
        model.set_adapter("second")
        assert not torch.equal(logits(model), expected)
        model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)


@TIED
def test_a_tied_head_that_is_trained_densely_leaves_the_embedding_its_delta(tmp_path: Path) -> None:
    base = gpt2().eval()
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["wte"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(copy.deepcopy(base), config(**options)).eval()
    nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    expected = logits(model)
    dense = adapted_copy(base, model.base_model.sparse_deltas())
    dense.lm_head = copy.deepcopy(model.get_base_model().lm_head.modules_to_save["default"])
    torch.testing.assert_close(expected, logits(dense))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), expected)
    with pytest.warns(UserWarning, match="Input and output embeddings are no longer tied"):
        torch.testing.assert_close(logits(loaded.merge_and_unload()), expected)


@TIED
@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted:UserWarning")  # PEFT
@pytest.mark.parametrize("first", ["one", "two"])
def test_when_the_active_adapter_is_deleted_the_next_one_reaches_both_sides_of_a_tie(first: str) -> None:
    both = {"one": config(task_type="CAUSAL_LM", target_modules=["c_attn"]), "two": config(target_modules=["wte"])}
    model: Any = get_peft_model(gpt2().eval(), both[first], adapter_name=first)
    other = "two" if first == "one" else "one"
    model.add_adapter(other, both[other])
    model.set_adapter("two")
    expected = logits(model)
    model.set_adapter("one")
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert torch.equal(logits(model), expected)


@TIED
def test_a_saved_config_that_fits_no_module_leaves_no_layer_in_a_tied_base() -> None:
    base = gpt2().eval()
    saved = get_peft_model(copy.deepcopy(base), config(task_type="CAUSAL_LM", target_modules=["wte"]))
    other = copy.deepcopy(saved.peft_config["default"])
    other.target_modules = {"nothing"}
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match="nothing"):
        get_peft_model(base, other)
    assert [type(module) for module in base.modules()] == kinds
