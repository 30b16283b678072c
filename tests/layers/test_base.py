"""Laws of the layers: right for any module, and the base stays as it is."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_sam import PendingAdapterError, SamConfig
from peft_sam.layers.base import SamLayer
from tests.shared.cases import MODULES, ModuleCase, names
from tests.shared.reference import adapted_copy

pytestmark = pytest.mark.on_device

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def adapt(
    case: ModuleCase, dtype: torch.dtype = torch.float64, density: float = 0.3, **options: Any
) -> tuple[Any, nn.Module]:
    """A model with random nonzero deltas, and an untouched copy of its base."""
    base = case.make().to(dtype)
    untouched = copy.deepcopy(base)
    config = SamConfig(
        target_modules=case.target_modules, density=density, score="random", init_weights=False, **options
    )
    return get_peft_model(base, config), untouched


def make_input(case: ModuleCase, dtype: torch.dtype) -> Tensor:
    x = case.input()
    return x.to(dtype) if x.is_floating_point() else x


def base_bits(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "sam_sparse_" not in n}


def assert_same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, bits in before.items():
        assert torch.equal(bits, after[name]), name


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_forward_equals_the_dense_model_with_the_deltas_added(case: ModuleCase) -> None:
    model, base = adapt(case)
    dense = adapted_copy(base, model.base_model.sparse_deltas())
    x = make_input(case, torch.float64)
    torch.testing.assert_close(model(x), dense(x))
    assert not torch.allclose(model(x), base(x))


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_gradients_are_those_of_the_dense_parameter_at_the_support(case: ModuleCase) -> None:
    model, base = adapt(case)
    deltas = model.base_model.sparse_deltas()
    dense = adapted_copy(base, deltas)
    x = make_input(case, torch.float64)
    direction = torch.randn_like(model(x))
    (model(x) * direction).sum().backward()
    (dense(x) * direction).sum().backward()
    parameters = dict(dense.named_parameters())
    for name, delta in deltas.items():
        torch.testing.assert_close(delta.values.grad, parameters[name].grad.flatten()[delta.indices], msg=name)


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_what_a_layer_returns_may_be_changed_in_place(case: ModuleCase) -> None:
    model, base = adapt(case)
    deltas = model.base_model.sparse_deltas()
    dense, x = adapted_copy(base, deltas), make_input(case, torch.float64)
    for output in (model(x), dense(x)):
        output.relu_().square().sum().backward()
    parameters = dict(dense.named_parameters())
    for name, delta in deltas.items():
        torch.testing.assert_close(delta.values.grad, parameters[name].grad.flatten()[delta.indices], msg=name)


@pytest.mark.parametrize("case", [case for case in MODULES if case.input().is_floating_point()], ids=names)
def test_the_gradient_of_the_input_is_that_of_the_dense_model(case: ModuleCase) -> None:
    x = make_input(case, torch.float64)
    model, base = adapt(case)
    dense = adapted_copy(base, model.base_model.sparse_deltas())
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    direction = torch.randn_like(model(x))
    (model(one) * direction).sum().backward()
    (dense(other) * direction).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_the_base_keeps_its_bits_through_forward_backward_and_switching(case: ModuleCase) -> None:
    model, base = adapt(case, torch.float32)
    before = base_bits(model)
    x = make_input(case, torch.float32)
    out = model(x)
    assert_same_bits(before, base_bits(model))
    out.sum().backward()
    assert_same_bits(before, base_bits(model))
    base.requires_grad_(False)  # as in the adapted model: some modules compute differently when nothing trains
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)
        assert_same_bits(before, base_bits(model))
    for name, tensor in model.state_dict().items():
        if "sam_sparse_" not in name:
            assert torch.equal(tensor, before.get(name, tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MODULES, ids=names)
def test_merge_then_unmerge_restores_the_bits(case: ModuleCase, dtype: torch.dtype) -> None:
    model, base = adapt(case, dtype)
    before = base_bits(model)
    dense = adapted_copy(base, model.base_model.sparse_deltas())
    model.merge_adapter()
    merged = {n.replace("base_model.model.", "").replace(".base_layer", ""): b for n, b in base_bits(model).items()}
    assert_same_bits(dict(dense.named_parameters()), merged)
    model.unmerge_adapter()
    assert_same_bits(before, base_bits(model))


def test_merging_writes_the_same_bits_under_deterministic_algorithms_and_in_any_memory_format() -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    untouched = copy.deepcopy(base)
    config = SamConfig(target_modules="all", density=0.3, score="random", init_weights=False)
    model: Any = get_peft_model(base, config)
    before, expected = base_bits(model), adapted_copy(untouched, model.base_model.sparse_deltas())
    torch.use_deterministic_algorithms(True)
    try:
        model.merge_adapter()
        merged = {name.replace(".base_layer", ""): p.clone() for name, p in base_bits(model).items()}
        model.unmerge_adapter()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(merged, {f"base_model.model.{name}": p for name, p in expected.named_parameters()})
    assert_same_bits(before, base_bits(model))


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_merged_and_unmerged_forward_agree(case: ModuleCase) -> None:
    model, _ = adapt(case)
    x = make_input(case, torch.float64)
    unmerged = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), unmerged)


@pytest.mark.parametrize("case", MODULES, ids=names)
@torch.no_grad()
def test_inference_in_eval_mode_equals_the_dense_model_s(case: ModuleCase) -> None:
    model, base = adapt(case)
    dense, x = adapted_copy(base, model.base_model.sparse_deltas()).eval(), make_input(case, torch.float64)
    torch.testing.assert_close(model.eval()(x), dense(x))
    switches = {name: dict(vars(module)) for name, module in base.eval().named_modules()}
    for name, module in model.unload().named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
        assert plain == {k: v for k, v in switches[name].items() if k in plain}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # the dense model's
@pytest.mark.parametrize("targets", ["all", ["linear1"], ["self_attn"], ["norm2"]])
@torch.no_grad()
def test_torch_s_encoder_calls_its_adapted_children_whatever_is_padded(targets: Any) -> None:
    base = next(case for case in MODULES if case.name == "transformer encoder").make().eval()
    options: dict[str, Any] = {"score": "random", "density": 0.5, "init_weights": False}
    model = get_peft_model(copy.deepcopy(base), SamConfig(target_modules=targets, **options)).eval()
    dense = adapted_copy(base, model.base_model.sparse_deltas()).encoder
    x, padded = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    found = model.get_base_model().encoder(x, src_key_padding_mask=padded)
    torch.testing.assert_close(found[~padded], dense(x, src_key_padding_mask=padded)[~padded])


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_unload_gives_the_base_model_back(case: ModuleCase) -> None:
    model, base = adapt(case, torch.float32)
    model.merge_adapter()
    bare = model.unload()
    assert [type(m) for m in bare.modules()] == [type(m) for m in base.modules()]
    assert_same_bits(dict(base.named_parameters()), dict(bare.named_parameters()))


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_merge_and_unload_gives_a_plain_model_with_the_deltas_added(case: ModuleCase) -> None:
    model, base = adapt(case, torch.float32)
    dense = adapted_copy(base, model.base_model.sparse_deltas())
    bare = model.merge_and_unload(safe_merge=True)
    assert [type(m) for m in bare.modules()] == [type(m) for m in base.modules()]
    assert_same_bits(dict(dense.named_parameters()), dict(bare.named_parameters()))


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_only_adapter_tensors_carry_the_prefix_and_only_they_train(case: ModuleCase) -> None:
    model, base = adapt(case, torch.float32)
    for name, parameter in model.named_parameters():
        assert ("sam_sparse_" in name) == parameter.requires_grad, name
    stripped = {n.replace("base_model.model.", "").replace(".base_layer", "") for n in base_bits(model)}
    assert stripped == {name for name, _ in base.named_parameters()}


def test_safe_merge_of_a_broken_adapter_raises_and_writes_nothing() -> None:
    model, _ = adapt(MODULES[0], torch.float32)
    before = base_bits(model)
    list(model.base_model.sparse_deltas().values())[-1].values.data[0] = float("nan")
    layers = [m for m in model.modules() if isinstance(m, SamLayer)]
    with pytest.raises(ValueError, match="NaNs detected"):
        layers[-1].merge(safe_merge=True)
    assert_same_bits(before, base_bits(model))


def test_an_exception_inside_forward_leaves_the_base_as_it_was() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("inside")

    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), Failing()), SamConfig(target_modules="all", score="random", density=0.5)
    )
    before = base_bits(model)
    with pytest.raises(KeyError, match="inside"):
        model(torch.randn(2, 4))
    assert_same_bits(before, base_bits(model))


def test_hooks_on_the_base_layer_run() -> None:
    model, _ = adapt(MODULES[0], torch.float32)
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, SamLayer))
    plain = model(torch.ones(2, 8))
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(torch.ones(2, 8)), plain)
    assert len(seen) == 1


def test_a_tensor_that_hides_a_parameter_is_replaced_too() -> None:
    model, base = adapt(next(case for case in MODULES if case.name == "layer norm"), torch.float32)
    dense, x = adapted_copy(base, model.base_model.sparse_deltas()), torch.randn(3, 8)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__dict__["weight"] = module.weight.detach()  # as FSDP1 does while the module runs
    torch.testing.assert_close(model(x), dense(x))


def test_a_pending_adapter_infers_like_the_base_and_refuses_to_train() -> None:
    case = MODULES[0]
    base = case.make()
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, SamConfig(target_modules="all"))
    x = case.input()
    model.eval()
    torch.testing.assert_close(model(x), untouched(x), rtol=0, atol=0)
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(model(x), untouched(x), rtol=0, atol=0)
    with pytest.raises(PendingAdapterError, match=r"select_parameters\(trainer\)"):
        model(x)
    with pytest.warns(UserWarning, match="merged as nothing"):
        model.merge_adapter()
    torch.testing.assert_close(model.eval()(x), untouched(x), rtol=0, atol=0)


def test_threads_that_infer_on_one_model_get_right_answers() -> None:
    wrong = []
    for case in MODULES[:3] + MODULES[8:10]:
        model, base = adapt(case, torch.float32)
        dense = adapted_copy(base, model.base_model.sparse_deltas())
        x = make_input(case, torch.float32)
        with torch.no_grad():
            expected = dense(x)

        def run(model: Any = model, x: Tensor = x, expected: Tensor = expected) -> None:
            with torch.no_grad():
                for _ in range(20):
                    if not torch.allclose(model(x), expected, atol=1e-5):
                        wrong.append(type(model))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
def test_values_are_float32_on_a_half_precision_base_unless_asked_otherwise(base_dtype: torch.dtype) -> None:
    config = {"target_modules": "all", "score": "random", "density": 0.3}
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4)).to(base_dtype), SamConfig(**config))
    assert {d.values.dtype for d in model.base_model.sparse_deltas().values()} == {torch.float32}
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 4)).to(base_dtype), SamConfig(**config), autocast_adapter_dtype=False
    )
    assert {d.values.dtype for d in model.base_model.sparse_deltas().values()} == {base_dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", MODULES[:5] + MODULES[8:10], ids=names)
def test_a_half_precision_base_agrees_with_the_dense_model(case: ModuleCase, dtype: torch.dtype) -> None:
    model, base = adapt(case, dtype)
    deltas = model.base_model.sparse_deltas()
    dense = adapted_copy(base, deltas)
    x = make_input(case, dtype)
    one, other = model(x), dense(x)
    direction = torch.randn_like(one)
    (one * direction).sum().backward()
    (other * direction).sum().backward()
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    parameters = dict(dense.named_parameters())
    for name, delta in deltas.items():
        expected = parameters[name].grad.flatten()[delta.indices].float()
        torch.testing.assert_close(delta.values.grad, expected, rtol=5e-2, atol=5e-2, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", MODULES[:4], ids=names)
def test_autocast_agrees_with_the_dense_model_under_autocast(case: ModuleCase, dtype: torch.dtype) -> None:
    model, base = adapt(case, torch.float32)
    deltas = model.base_model.sparse_deltas()
    dense = adapted_copy(base, deltas)
    x = make_input(case, torch.float32)
    with torch.autocast(x.device.type, dtype):
        one, other = model(x), dense(x)
        direction = torch.randn_like(one)
        (one * direction).sum().backward()
        (other * direction).sum().backward()
    assert one.dtype == other.dtype == dtype
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    parameters = dict(dense.named_parameters())
    for name, delta in deltas.items():
        expected = parameters[name].grad.flatten()[delta.indices]
        torch.testing.assert_close(delta.values.grad, expected, rtol=5e-2, atol=5e-2, msg=name)
