"""Laws of PEFT's `convert_to_lora` on sparse adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_sam import SamConfig
from tests.shared.cases import Sequential


class Unbiased(Conv1D):
    """One whose bias no delta changes, since it is no parameter."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(outputs, inputs)
        bias = self.bias.data
        del self.bias
        self.register_buffer("bias", bias)


BASES = {
    "linear": lambda: Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 9, bias=False)),
    "Conv1D": lambda: Sequential(Unbiased(12, 8), nn.Tanh(), nn.Linear(12, 9, bias=False)),
}
WEIGHTS: dict[str, Any] = {"target_modules": ["0", "2"]}


def adapted(base: nn.Module, **options: Any) -> Any:
    config = SamConfig(**{**WEIGHTS, "score": "random", "density": 0.2, "init_weights": False, **options})
    return get_peft_model(copy.deepcopy(base), config).eval()


def as_lora(model: Any, base: nn.Module, rank: float) -> tuple[Any, dict[str, Tensor]]:
    config, state = convert_to_lora(model, rank=rank)
    made: Any = get_peft_model(copy.deepcopy(base), config)
    result = set_peft_model_state_dict(made, state)
    assert not result.unexpected_keys
    return made.eval(), state


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("base", BASES)
def test_at_full_rank_the_lora_adapter_computes_the_same(base: str) -> None:
    plain, x = BASES[base](), torch.randn(3, 8)
    model = adapted(plain)
    made, _ = as_lora(model, plain, 8)
    assert not torch.allclose(model(x), plain.eval()(x))
    torch.testing.assert_close(made.base_model.model[0](x), model.base_model.model[0](x))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_rank_by_energy_keeps_that_share_of_each_delta(share: float) -> None:
    plain = BASES["linear"]()
    model = adapted(plain)
    made, _ = as_lora(model, plain, share)
    for place in (0, 2):
        whole = model.base_model.model[place].get_delta_weight("default").detach()
        kept = made.base_model.model[place].get_delta_weight("default").detach()
        assert share - 1e-4 <= float(kept.square().sum() / whole.square().sum()) <= 1 + 1e-4


def test_an_adapter_saved_as_lora_needs_peft_alone_to_load(tmp_path: Path) -> None:
    plain, x = BASES["linear"](), torch.randn(3, 8)
    model = adapted(plain)
    save_as_lora(tmp_path, model, rank=8)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(loaded.base_model.model[0](x), model.base_model.model[0](x))


def test_the_dense_weight_change_is_at_the_adapter_s_scale_and_zero_while_pending() -> None:
    model = adapted(BASES["linear"]())
    layer = model.base_model.model[0]
    delta = model.base_model.sparse_deltas()["0.weight"]
    expected = torch.zeros(12 * 8).index_copy(0, delta.indices, delta.values.detach()).view(12, 8)
    assert torch.equal(layer.get_delta_weight("default"), expected)
    layer.set_scale("default", 2.0)
    assert torch.equal(layer.get_delta_weight("default"), expected * 2)
    pending = adapted(BASES["linear"](), score="sam").base_model.model[0]
    assert pending.supports_lora_conversion("default")
    assert not pending.get_delta_weight("default").any()


def test_biases_and_other_modules_than_linear_ones_are_refused() -> None:
    base = Sequential(nn.Linear(8, 8))
    refused = pytest.raises(TypeError, match="do not support LoRA conversion")
    with pytest.warns(UserWarning, match=r"changes biases.*export_adapter"), refused:
        convert_to_lora(adapted(base, target_modules=["0"], density=1.0), rank=8)
    norm = Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    refused = pytest.raises(TypeError, match="do not support LoRA conversion")
    with pytest.warns(UserWarning, match="changes biases"), refused:
        convert_to_lora(adapted(norm, target_modules="all", density=1.0), rank=8)
