"""Laws of quantised linear layers: selected, trained, saved and loaded as they are; merged into, and out again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peft_sam import SamConfig, select_parameters
from tests.layers.test_linear import adapted
from tests.shared.cases import NETS, VOCABULARY, Sequential
from tests.shared.reference import adapted_copy

# what the quantisers say of CPUs and of names that others have renamed
pytestmark = pytest.mark.filterwarnings("ignore")


class BaseQuantLinear(nn.Module):
    """A linear layer that holds its weight as gptqmodel's do: under that class name, in buffers alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight * self.scale, self.bias)


def in_groups(linear: nn.Linear, kind: str) -> nn.Module:
    """gptqmodel's layer of 4 bits with a scale and a zero for each 32 inputs."""
    pytest.importorskip("gptqmodel", reason="gptqmodel needs a newer torch than the tests' own")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    size = 32
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True}
    groups = linear.weight.detach().unflatten(1, (-1, size))
    scale = (groups.amax(-1) - groups.amin(-1)) / 15
    zero = (-groups.amin(-1) / scale).round()
    made = {"GPTQ": TorchLinear, "AWQ": AwqTorchLinear}[kind](
        bits=4, group_size=size, sym=False, desc_act=False, **sizes
    )
    made.pack(linear, scale, zero, (torch.arange(linear.in_features) // size).int())
    made.post_init()
    return made


# kind → the layer that holds a linear layer's weight in codes
LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "hqq": lambda linear: HQQLinear(
        linear, BaseQuantizeConfig(nbits=4, group_size=64), compute_dtype=torch.float32, device="cpu"
    ),
    "4 bits": lambda linear: filled(linear, bitsandbytes.nn.Linear4bit, compute_dtype=torch.float32, quant_type="nf4"),
    "8 bits": lambda linear: filled(linear, bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False),
    "buffers": BaseQuantLinear,
    "GPTQ": lambda linear: in_groups(linear, "GPTQ"),
    "AWQ": lambda linear: in_groups(linear, "AWQ"),
}


def filled(linear: nn.Linear, kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """bitsandbytes' layers quantise what they hold when they are moved."""
    packed = kind(linear.in_features, linear.out_features, **options)
    packed.load_state_dict(linear.state_dict())
    return packed.to("cpu")


def int8() -> Any:
    """torchao's way to quantise."""
    pytest.importorskip("torchao", reason="PEFT asks for a torchao that needs a newer torch")
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def quantised(kind: str, model: nn.Module) -> nn.Module:
    if kind == "torchao":
        config = int8()
        from torchao.quantization import quantize_

        quantize_(model, config)
        return model
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Linear):
            setattr(model, name, LAYERS[kind](module))
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


# kind → how far its products may be from those of its dequantised weight: the 8-bit kernel also rounds its inputs, and
# gptqmodel computes in half precision
KINDS = {"torchao": 1e-4, "hqq": 1e-4, "4 bits": 1e-4, "8 bits": 5e-2, "buffers": 1e-4, "GPTQ": 1e-2, "AWQ": 1e-2}
WRITABLE = ("torchao", "hqq", "4 bits", "8 bits")
WITHOUT_BIAS = ("hqq", "buffers", "GPTQ", "AWQ")  # their biases are no parameters


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_trains_the_deltas_of_its_dequantised_self(kind: str) -> None:
    base = quantised(kind, Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)))
    plain = dequantised(base)
    model = adapted(base)
    deltas = model.base_model.sparse_deltas()
    biases = set() if kind in WITHOUT_BIAS else {(64,), (128,)}
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_adapter_goes_through_a_file(kind: str, tmp_path: Path) -> None:
    first = Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    base, again = (quantised(kind, copy.deepcopy(first)) for _ in range(2))
    model = adapted(base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(again, tmp_path)
    x = torch.randn(3, 64)
    with torch.no_grad():  # the 4-bit kernel is another one where gradients are wanted
        assert torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize("score", ["sam", "fisher", "sam_curvature"])
@pytest.mark.parametrize("kind", KINDS)
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


def test_a_weight_attribute_of_a_packed_layer_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(quantised("hqq", Sequential(nn.Linear(64, 64)))), torch.randn(3, 64)
    expected = model(x)
    # transformers' quantiser does that
    monkeypatch.setattr(HQQLinear, "weight", property(lambda layer: torch.empty(0)), raising=False)
    assert torch.equal(model(x), expected)


# merging


def known_to_transformers(kind: str, base: Any) -> Any:
    """With what transformers leaves at a model that it has quantised by torchao: how to quantise again."""
    if kind == "torchao":
        base.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(int8()))
    return base


@pytest.mark.parametrize("inferred", [False, True], ids=["fresh", "after inference"])
@pytest.mark.parametrize("kind", WRITABLE)
def test_merging_writes_the_codes_of_the_sum_and_unmerging_the_original_ones(kind: str, inferred: bool) -> None:
    plain: Any = Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 128)).requires_grad_(False)
    base = known_to_transformers(kind, quantised(kind, plain))
    plain = copy.deepcopy(base)
    for i in (0, 2):
        linear = nn.Linear(plain[i].in_features, plain[i].out_features)
        linear.weight.data, linear.bias.data = dequantize_module_weight(plain[i]).detach().clone(), plain[i].bias.data
        plain[i] = linear
    model = adapted(base)
    expected = quantised(kind, adapted_copy(plain, model.base_model.sparse_deltas())).eval()
    model.eval()
    x = torch.randn(5, 128, requires_grad=not inferred)
    with torch.set_grad_enabled(not inferred):
        before = model(x)
        with pytest.warns(UserWarning, match="rounds it to the quantiser's codes"):
            model.merge_adapter(safe_merge=True)
        merged = model(x)
        if inferred and kind == "4 bits":
            # without gradients bitsandbytes' CPU kernel rearranges 4-bit weights and rounds their scales, so that a sum
            # between two codes may take the other one
            assert (merged - expected(x)).norm() < (merged - before).norm() / 4
        else:
            torch.testing.assert_close(merged, expected(x), rtol=0, atol=0)
        assert not torch.allclose(merged, before, rtol=1e-3, atol=1e-3)
        model.unmerge_adapter()
        assert torch.equal(model(x), before)
        with model.disable_adapter():
            plain_output = model(x)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), plain_output)
        model.merge_adapter()
        assert torch.equal(model.merge_and_unload()(x), merged)


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_broken_adapter_is_not_merged_into_a_quantised_model(kind: str) -> None:
    model = adapted(known_to_transformers(kind, quantised(kind, Sequential(nn.Linear(64, 64))))).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = model(x)
        delta = model.base_model.sparse_deltas()["0.weight"]
        kept, delta.values.data = delta.values.data, torch.full_like(delta.values, torch.nan)
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        delta.values.data = kept
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("torchao", r"quantised \(torchao, without the config of its quantisation\)"),
        ("buffers", "quantised or offloaded"),
        ("GPTQ", r"quantised \(gptq\)"),
    ],
)
def test_a_weight_that_cannot_be_written_back_is_not_merged_into(kind: str, what: str) -> None:
    model = adapted(quantised(kind, Sequential(nn.Linear(64, 128))))
    with pytest.raises(ValueError, match=rf"'weight' of shape \(128, 64\) is {what} in a way"):
        model.merge_adapter()


# name of PEFT's backend → the config that transformers quantises by
CONFIGS: dict[str, Callable[[], Any]] = {
    "bnb 8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bnb 4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao": lambda: TorchAoConfig(int8()),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_that_transformers_quantises_goes_the_whole_way(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)

    def load() -> Any:
        options = {"quantization_config": CONFIGS[kind](), "device_map": "cpu", "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(tmp_path, **options)

    base = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    model: Any = get_peft_model(base, SamConfig(task_type="CAUSAL_LM", density=0.05))
    assert model.get_model_status().quantization_backend == kind
    assert f"quantization_backend='{kind}'" in repr(model)
    batch = NETS[4].batch(2)
    select_parameters(model, [batch], progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            return of(**batch).logits

    trained = logits(model)
    # bitsandbytes (0.50) mistakes the order of 4-bit scales when it saves what its CPU kernel has used: `model` is not
    # run any more after this
    model.save_pretrained(tmp_path / "adapter")
    loaded: Any = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), trained)
    loaded.merge_adapter()
    merged = logits(loaded)
    torch.testing.assert_close(merged, trained, rtol=0.2, atol=0.2)
    loaded.unmerge_adapter()
    assert torch.equal(logits(loaded), trained)
    assert torch.equal(logits(loaded.merge_and_unload()), merged)
