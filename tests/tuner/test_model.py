"""Laws of the tuner among PEFT's ways to use one."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
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
from torch import Tensor, nn

from peft_sam import PendingAdapterError, SamConfig, select_parameters
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import deltas_of
from tests.shared.cases import NETS, NetCase, bert, gpt2, names, vit
from tests.shared.reference import adapted_copy
from tests.shared.versions import checkpoint_activations, takes_adapters


def config(**options: Any) -> SamConfig:
    return SamConfig(**{"density": 0.1, "score": "random", "init_weights": False, **options})


def two_adapters() -> tuple[Any, nn.Module]:
    base = bert()
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, config(), adapter_name="one")
    model.add_adapter("two", config(seed=1, density=0.2))
    return model.eval(), untouched.eval()


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


BATCH = NETS[0].batch(3)


@pytest.mark.parametrize("case", NETS, ids=names)
def test_deltas_are_named_as_in_the_unwrapped_model_and_explain_the_output(case: NetCase) -> None:
    base = case.make().eval()
    untouched = copy.deepcopy(base)
    batch = case.batch(2)
    model = get_peft_model(base, config(task_type=case.task_type, **case.options)).eval()
    deltas = model.base_model.sparse_deltas()
    shapes = {name: p.shape for name, p in untouched.named_parameters()}
    for name, delta in deltas.items():
        assert delta.shape == shapes[name]
        assert delta.indices.ndim == 1
        assert len(delta.indices) == len(delta.values) > 0
        assert bool((delta.indices.diff() > 0).all())
    torch.testing.assert_close(logits(model, batch), logits(adapted_copy(untouched, deltas), batch))
    assert not torch.allclose(logits(model, batch), logits(untouched, batch))


def test_the_active_adapter_is_the_one_that_was_set() -> None:
    model, base = two_adapters()
    expected = {
        name: logits(adapted_copy(base, model.base_model.sparse_deltas(name)), BATCH) for name in ("one", "two")
    }
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, BATCH), expected[name])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(f".{name}." in n for n in trained)


def test_several_active_adapters_add_up() -> None:
    model, base = two_adapters()
    dense = adapted_copy(base, model.base_model.sparse_deltas("one"))
    dense = adapted_copy(dense, model.base_model.sparse_deltas("two"))
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(logits(model, BATCH), logits(dense, BATCH))
    model.merge_adapter()
    torch.testing.assert_close(logits(model, BATCH), logits(dense, BATCH))
    merged = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
    for name, parameter in dense.named_parameters():
        assert torch.equal(merged[name], parameter), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_between_merged_adapters_leaves_no_trace(dtype: torch.dtype) -> None:
    model, base = two_adapters()
    model, base = model.to(dtype), base.to(dtype)
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        model.merge_adapter()
        model.unmerge_adapter()
    model.base_model.set_adapter(["one", "two"])
    model.merge_adapter()
    model.unmerge_adapter()
    bare = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(p, bare[n]) for n, p in base.named_parameters())


def test_a_deleted_adapter_is_gone_and_the_others_work() -> None:
    model, base = two_adapters()
    expected = logits(adapted_copy(base, model.base_model.sparse_deltas("two")), BATCH)
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    assert not any(".one." in name for name in model.state_dict())
    model.set_adapter("two")
    torch.testing.assert_close(logits(model, BATCH), expected)
    with pytest.raises(ValueError, match="no adapter 'one'"):
        model.base_model.sparse_deltas("one")


def test_a_second_adapter_may_have_other_targets_and_wait_for_its_selection() -> None:
    model, _ = two_adapters()
    before = logits(model, BATCH)
    model.add_adapter("three", SamConfig(density=0.1, target_modules=["word_embeddings", "query"]))
    torch.testing.assert_close(logits(model, BATCH), before, rtol=0, atol=0)
    selection = select_parameters(model, [BATCH], adapter_name="three", progress=False)
    assert "bert.embeddings.word_embeddings.weight" in selection.shapes
    model.set_adapter("three")
    assert model.base_model.sparse_deltas("three")
    model.train()(**BATCH).loss.backward()


def test_a_second_adapter_reaches_nested_targets_too() -> None:
    options = {"target_modules": "all"}
    model = get_peft_model(vit(), config(**options))
    model.add_adapter("two", config(**options))
    one, two = (set(deltas_of(model, name)) for name in ("default", "two"))
    assert one == two


def test_a_failing_second_adapter_leaves_the_first_alone() -> None:
    model, _ = two_adapters()
    before, keys = logits(model, BATCH), set(model.state_dict())
    with pytest.raises(ValueError, match="less than one entry"):
        model.add_adapter("three", config(density=1e-9))
    assert set(model.peft_config) == {"one", "two"}
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(logits(model, BATCH), before, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model, batch = get_peft_model(gpt2(), config(task_type="CAUSAL_LM")).train(), NETS[2].batch(2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.enable_input_require_grads()
    checkpoint_activations(model, reentrant)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copied_model_computes_the_same_and_is_independent(again: Callable[[Any], Any]) -> None:
    model = get_peft_model(gpt2(), config(target_modules="all")).eval()
    batch = NETS[2].batch(2)
    before = logits(model, batch)
    other = again(model)
    torch.testing.assert_close(logits(other, batch), before, rtol=0, atol=0)
    for delta in other.base_model.sparse_deltas().values():
        delta.values.data += 1
    assert not torch.allclose(logits(other, batch), before)
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=0)


def test_a_tied_weight_has_one_delta_that_all_its_uses_see() -> None:
    base = gpt2().eval()
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, config(target_modules=["wte"], density=0.5)).eval()
    deltas = model.base_model.sparse_deltas()
    assert set(deltas) == {"transformer.wte.weight"}
    dense = adapted_copy(untouched, deltas)
    assert dense.lm_head.weight is dense.transformer.wte.weight
    batch = NETS[2].batch(2)
    torch.testing.assert_close(logits(model, batch), logits(dense, batch))
    model(**batch).loss.backward()
    dense(**batch).loss.backward()
    delta = deltas["transformer.wte.weight"]
    torch.testing.assert_close(delta.values.grad, dense.transformer.wte.weight.grad.flatten()[delta.indices])
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), logits(dense, batch))
    model.unmerge_adapter()
    assert sum("sam_sparse_" in name for name in get_peft_model_state_dict(model)) == 2


def test_generate_agrees_with_the_merged_model_with_and_without_cache() -> None:
    model = get_peft_model(gpt2(), config(task_type="CAUSAL_LM", density=0.3)).eval()
    prompt = {"input_ids": torch.randint(1, 50, (2, 4)), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = [model.generate(**prompt, **options, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*found)
    assert torch.equal(model.merge_and_unload().generate(**prompt, **options), found[0])


def test_functional_call_with_other_values_computes_with_them() -> None:
    model = get_peft_model(bert(), config()).eval()
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if "sam_sparse_" in n}
    out = torch.func.functional_call(model, zeros, kwargs=BATCH).logits
    with model.disable_adapter():
        torch.testing.assert_close(out, model(**BATCH).logits)


# Other doors of PEFT and transformers


def test_injection_without_a_peft_model_selects_trains_and_reports_state() -> None:
    base = bert()
    untouched = copy.deepcopy(base)
    inject_adapter_in_model(SamConfig(density=0.1), base)
    with pytest.raises(PendingAdapterError):
        base.train()(**BATCH)
    select_parameters(base, [BATCH], progress=False)
    base.train()(**BATCH).loss.backward()
    with torch.no_grad():
        for delta in deltas_of(base, "default").values():
            delta.values -= delta.values.grad
    state = get_peft_model_state_dict(base)
    other = inject_adapter_in_model(SamConfig(density=0.1), untouched, state_dict=state)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(other.eval(), BATCH), logits(base.eval(), BATCH), rtol=0, atol=0)


@takes_adapters
def test_transformers_own_adapter_methods_work(tmp_path: Any) -> None:
    base = bert()
    plain, fresh = copy.deepcopy(base), copy.deepcopy(base)
    base.add_adapter(SamConfig(density=0.1))
    select_parameters(base, [BATCH], progress=False)
    with torch.no_grad():
        for delta in deltas_of(base, "default").values():
            delta.values.normal_()
    base.save_pretrained(tmp_path)
    expected = logits(base.eval(), BATCH)
    fresh.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(fresh.eval(), BATCH), expected, rtol=0, atol=0)
    fresh.disable_adapters()
    torch.testing.assert_close(logits(fresh, BATCH), logits(plain.eval(), BATCH), rtol=0, atol=0)
    fresh.enable_adapters()
    torch.testing.assert_close(logits(fresh, BATCH), expected, rtol=0, atol=0)


@pytest.mark.parametrize("sam_first", [True, False])
@pytest.mark.parametrize("lora_targets", [["query"], ["key"]], ids=["the same module", "another module"])
def test_a_mixed_model_adds_sam_and_lora(sam_first: bool, lora_targets: list[str]) -> None:
    base = bert().eval()
    untouched = copy.deepcopy(base)
    sam = config(target_modules=["query"], density=0.3)
    lora = LoraConfig(target_modules=lora_targets, init_lora_weights=False)
    order = [("few", sam), ("low", lora)] if sam_first else [("low", lora), ("few", sam)]
    model = get_peft_model(base, order[0][1], adapter_name=order[0][0], mixed=True)
    assert isinstance(model, PeftMixedModel)
    model.add_adapter(*order[1])
    model.set_adapter(["few", "low"])
    model.eval()
    deltas = deltas_of(model.base_model.model, "few")
    assert deltas
    only_lora = get_peft_model(adapted_copy(untouched, deltas), lora, adapter_name="low").eval()
    state = {n.replace(".base_layer.", "."): t for n, t in model.state_dict().items() if "lora_" in n}
    for name, tensor in only_lora.state_dict().items():
        if "lora_" in name:
            tensor.copy_(state[name])
    torch.testing.assert_close(logits(model, BATCH), logits(only_lora, BATCH))


def test_peft_s_status_reports_describe_the_adapter() -> None:
    model = get_peft_model(bert(), config())
    status = model.get_model_status()
    assert status.adapter_model_type == "SamModel"
    assert status.peft_types == {"default": "SAM_SPARSE"}
    assert status.trainable_params == sum(len(d.values) for d in model.base_model.sparse_deltas().values())
    assert status.num_adapter_layers == sum(isinstance(m, SamLayer) for m in model.modules())
    assert {layer.active_adapters[0] for layer in model.get_layer_status()} == {"default"}


def test_sequence_classification_trains_the_head_densely() -> None:
    model = get_peft_model(bert(), config(task_type="SEQ_CLS"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "sam_sparse_" not in n}
    assert {n.rpartition("modules_to_save.")[2] for n in trained} == {"default.weight", "default.bias"}


def test_moving_the_model_moves_the_adapter_and_keeps_it_right() -> None:
    model = get_peft_model(bert(), config()).eval()
    before = logits(model, BATCH)
    torch.testing.assert_close(logits(model.double(), BATCH), before.double(), rtol=1e-4, atol=1e-5)
    assert all(d.indices.dtype == torch.int64 for d in model.base_model.sparse_deltas().values())
    with warnings.catch_warnings():
        torch.testing.assert_close(logits(model.to(torch.bfloat16), BATCH).float(), before, rtol=0.1, atol=0.1)


def test_one_config_makes_many_adapters() -> None:
    shared = SamConfig(density=0.1)
    before = copy.deepcopy(shared)
    for _ in range(2):
        model = get_peft_model(bert(), shared)
        select_parameters(model, [BATCH], progress=False)
    model.add_adapter("two", shared)
    select_parameters(model, [BATCH], adapter_name="two", progress=False)
    shared.base_model_name_or_path = before.base_model_name_or_path
    assert shared == before


def test_the_first_adapter_of_a_wrapped_model_is_a_peft_model() -> None:
    model = get_peft_model(bert(), config())
    assert isinstance(model, PeftModel)
    assert "SAM_SPARSE" in repr(model.peft_config["default"])


def test_a_tied_embedding_that_only_follows_is_printed_and_told_of() -> None:
    model: Any = get_peft_model(gpt2(), SamConfig(score="random", density=0.1, target_modules=["lm_head"]))
    ids = torch.randint(1, 40, (2, 7))
    assert "TiedEmbedding" in repr(model)
    assert model.get_model_status().enabled is True
    with model.disable_adapter():
        model(input_ids=ids)
