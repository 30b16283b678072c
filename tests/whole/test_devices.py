"""Laws of a model on a GPU, seen on a pretended one: nothing is mixed, and a step does not wait for the device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sam import SamConfig, select_parameters
from tests.layers.test_base import adapt, assert_same_bits, base_bits, make_input
from tests.shared.cases import MODULES, NETS, ModuleCase, NetCase, names
from tests.shared.pretended import pretended_gpu


def step(model: Any, x: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN:UserWarning")  # nn.LSTM's
@pytest.mark.parametrize("case", MODULES, ids=names)
def test_a_module_computes_there_what_it_does_here_and_only_its_first_step_waits(case: ModuleCase) -> None:
    model, _ = adapt(case)
    before, x = base_bits(model), make_input(case, torch.float64)
    y, gradients = model(x), step(model, x)
    with pretended_gpu() as gpu:
        model, x = model.to("cuda"), x.to("cuda")
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        first, there = model(x), step(model, x)
        gpu.waits.clear()
        step(model, x)
        model.merge_adapter()
        merged = model(x)
        model.unmerge_adapter()
        assert gpu.waits == []
        found = [tensor.cpu() for tensor in (first, merged)]
        there, after = ({n: t.cpu() for n, t in of.items()} for of in (there, base_bits(model)))
    for one in found:
        torch.testing.assert_close(one, y)
    torch.testing.assert_close(there, gradients)
    assert_same_bits(before, after)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT's
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("case", [case for case in NETS if "Mixtral" not in case.name], ids=names)  # `NOT_PRETENDED`
def test_a_net_is_selected_trained_saved_and_loaded_there(case: NetCase, tmp_path: Path) -> None:
    base, batches = case.make().eval(), [case.batch(2), case.batch(3)]
    again = copy.deepcopy(base)
    config = SamConfig(task_type=case.task_type, density=0.1, **case.options)
    here = select_parameters(get_peft_model(copy.deepcopy(base), copy.deepcopy(config)), batches, progress=False)
    with pretended_gpu() as gpu:
        model: Any = get_peft_model(base.to("cuda"), config)
        selection = select_parameters(model, batches, progress=False)
        batch = {
            key: value.to("cuda") if isinstance(value, torch.Tensor) else value for key, value in batches[0].items()
        }
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            gpu.waits.clear()
            model(**batch).loss.backward()
        waits = list(gpu.waits)
        optimizer.step()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(again.to("cuda"), tmp_path).eval()
        outputs = [of(**batch).logits.cpu() for of in (model.eval(), loaded)]
    assert waits == []
    assert selection.counts == here.counts
    assert all(torch.equal(indices, here.indices[name]) for name, indices in selection.indices.items())
    torch.testing.assert_close(*outputs)
