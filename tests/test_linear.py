"""Laws of linear layers whose weight cannot be read: packed, on disk, or in pieces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from peft_sam import SamConfig, SamLayer, accumulate, select_parameters
from peft_sam.gradients import Loss
from peft_sam.linear_calls import LinearCall
from tests.cases import Sequential, bert
from tests.reference import adapted_copy

CONFIG: dict[str, Any] = {"score": "random", "density": 0.2, "init_weights": False}


def adapted(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(base, SamConfig(target_modules="all-linear", **CONFIG, **options))


def with_hidden_weight(model: Any) -> Any:
    """A copy whose linear weights are of a tensor class that nobody knows."""

    class Hidden(Tensor):
        pass

    hidden = copy.deepcopy(model)
    for layer in hidden.modules():
        if isinstance(layer, SamLayer):
            base: Any = layer.base_layer
            base.weight = nn.Parameter(base.weight.detach().as_subclass(Hidden), requires_grad=False)
    return hidden


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 400, 8)])
def test_a_hidden_weight_gives_the_outputs_and_gradients_of_a_plain_one(shape: tuple[int, ...]) -> None:
    model = adapted(Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double())
    hidden = with_hidden_weight(model)
    x, direction = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 4, dtype=torch.float64)
    gradients = []
    for of in (model, hidden):
        mine = x.clone().requires_grad_()
        y = of(mine)
        y.backward(direction)
        gradients.append(
            [y.as_subclass(Tensor), mine.grad, *(d.values.grad for d in of.base_model.sparse_deltas().values())]
        )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_offloaded_model_computes_trains_and_stays_offloaded(where: str, tmp_path: Path) -> None:
    plain = bert().eval()
    base = copy.deepcopy(plain)
    if where == "memory":
        cpu_offload(base, execution_device="cpu")
    else:
        disk_offload(base, str(tmp_path), execution_device="cpu")
    ids, results = torch.randint(0, 50, (2, 6)), []
    for of in (plain, base):
        torch.manual_seed(1)  # the same deltas
        model = adapted(of)
        logits = model(input_ids=ids).logits
        logits.sum().backward()
        deltas = model.base_model.sparse_deltas()
        results.append((logits, {name: delta.values.grad for name, delta in deltas.items()}))
    torch.testing.assert_close(*results)
    assert all(p.is_meta for n, p in model.named_parameters() if n.endswith("base_layer.weight"))


def quantised(kind: str, model: nn.Module) -> nn.Module:
    if kind == "torchao":
        quantize_(model, Int8WeightOnlyConfig())
        return model
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Linear) and kind == "hqq":
            config = BaseQuantizeConfig(nbits=4, group_size=64)
            setattr(model, name, HQQLinear(module, config, compute_dtype=torch.float32, device="cpu"))
        elif isinstance(module, nn.Linear):
            sizes = module.in_features, module.out_features
            packed = (
                bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                if kind == "4 bits"
                else bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            )
            packed.load_state_dict(module.state_dict())
            setattr(model, name, packed.to("cpu"))
    return model.requires_grad_(False)


def dequantised(model: nn.Module) -> nn.Module:
    """The plain model that a quantised one stands for, by asking each layer for its outputs."""
    plain = Sequential()
    for module in model:  # type: ignore[union-attr]
        if hasattr(module, "in_features"):
            linear = nn.Linear(module.in_features, module.out_features)
            zero = module(torch.zeros(1, module.in_features))
            linear.bias.data = zero[0].detach().clone()
            linear.weight.data = (module(torch.eye(module.in_features)) - zero).detach().t().contiguous()
            if "bias" not in dict(module.named_parameters()):  # no candidate there, so none here
                bias = linear.bias.detach()
                del linear.bias
                linear.register_buffer("bias", bias)
            module = linear
        plain.append(module)
    return plain


# outer quantisation of the 8-bit kernel also rounds its inputs
KINDS = {"torchao": 1e-4, "hqq": 1e-4, "4 bits": 1e-4, "8 bits": 5e-2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_trains_the_deltas_of_its_dequantised_self(kind: str) -> None:
    base = quantised(kind, Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)))
    plain = dequantised(base)
    model = adapted(base)
    deltas = model.base_model.sparse_deltas()
    biases = set() if kind == "hqq" else {(64,), (128,)}  # there they are no parameters
    assert {delta.shape for delta in deltas.values()} == {(128, 64), (64, 128), *biases}
    assert {name.rpartition(".")[2] for name in deltas} <= {"weight", "bias"}
    dense = adapted_copy(plain, deltas)
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), dense(x), atol=KINDS[kind], rtol=KINDS[kind])
    model(x).square().mean().backward()
    dense(x).square().mean().backward()
    parameters = dict(dense.named_parameters())
    for name, delta in deltas.items():
        expected = parameters[name].grad.flatten()[delta.indices]
        torch.testing.assert_close(delta.values.grad, expected, atol=KINDS[kind] / 10, rtol=KINDS[kind])


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_adapter_goes_through_a_file_and_refuses_to_merge(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    base, again = (quantised("4 bits", copy.deepcopy(first)) for _ in range(2))
    model = adapted(base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(again, tmp_path)
    x = torch.randn(3, 64)
    with torch.no_grad():  # the 4-bit kernel is another one where gradients are wanted
        assert torch.equal(loaded(x), model.eval()(x))
    with pytest.raises(ValueError, match=r"'weight' of shape \(128, 64\) is quantised or offloaded"):
        model.merge_adapter()


def test_a_score_that_reads_hidden_weights_says_what_to_do() -> None:
    class Hidden(Tensor):
        pass

    base = Sequential(nn.Linear(8, 4))
    base[0].weight = nn.Parameter(base[0].weight.detach().as_subclass(Hidden), requires_grad=False)
    with pytest.raises(ValueError, match=r"'magnitude' reads the weights, but 0\.weight is quantised or offloaded"):
        get_peft_model(base, SamConfig(target_modules="all", score="magnitude", density=0.2))


def test_a_printed_layer_shows_how_its_products_are_computed() -> None:
    model = adapted(Sequential(nn.Linear(64, 64)))
    assert "default: sampled" in repr(model) or "default: submatrix" in repr(model)


# selecting


@pytest.mark.parametrize("score", ["sam", "fisher", "sam_curvature"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_layer_is_selected_by_the_gradient_of_its_dequantised_self(kind: str, score: str) -> None:
    base = quantised(kind, Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)))
    config = SamConfig(target_modules="all-linear", score=score, density=0.02)
    batches = [torch.randn(5, 64), torch.randn(3, 64)]
    found = [
        select_parameters(
            get_peft_model(of, config), batches, loss_fn=lambda m, x: m(x).square().mean(), count_fn=len, progress=False
        )
        for of in (dequantised(base), base)
    ]
    assert found[1].threshold == pytest.approx(found[0].threshold, rel=10 * KINDS[kind])
    plain, packed = ({(n, i) for n, of in s.indices.items() for i in of.tolist()} for s in found)
    # entries near the threshold may change places
    assert len(plain & packed) >= (0.98 if KINDS[kind] < 1e-2 else 0.8) * len(plain)


@pytest.mark.parametrize("how", ["offloaded", "checkpointed", "checkpointed, reentrant"])
def test_where_the_weights_are_does_not_change_the_selection(how: str) -> None:
    def select(base: Any) -> Any:
        model = get_peft_model(base, SamConfig(task_type="SEQ_CLS", density=0.05))
        return select_parameters(model, [classification(3), classification(4)], progress=False)

    def classification(n: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(n)
        return {"input_ids": torch.randint(1, 50, (n, 6), generator=generator), "labels": torch.arange(n) % 2}

    base = bert()
    expected = select(copy.deepcopy(base))
    if how == "offloaded":
        cpu_offload(base.bert.encoder, execution_device="cpu")
    else:
        base.activation_checkpointing_enable({"use_reentrant": "reentrant" in how})
    got = select(base)
    assert got.threshold == pytest.approx(expected.threshold, rel=1e-5)
    assert all(torch.equal(got.indices[name], expected.indices[name]) for name in expected.indices)


def test_a_layer_that_runs_twice_in_a_batch_adds_up_its_gradients_before_they_are_squared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x).tanh())

    model, x = Twice(), torch.randn(4, 6)
    parameters = {f"linear.{name}": p for name, p in model.linear.named_parameters()}
    calls = {name: LinearCall(model.linear, name.removeprefix("linear.")) for name in parameters}
    found = [
        accumulate(
            model,
            parameters,
            [x],
            lambda x: Loss(model(x).square().mean(), 1),
            statistics=["gradient", "squared_gradient"],
            hidden=hidden,
            progress=False,
        ).tensors
        for hidden in ({}, calls)
    ]
    torch.testing.assert_close(*found)
