"""Laws of model families: each is targeted, selected, trained, saved, loaded and merged like the others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_sam import SamConfig, select_parameters
from peft_sam.layers.found import pairs_of
from tests.shared.cases import FAMILIES, FamilyCase, names
from tests.shared.reference import adapted_copy


def base_bits(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "sam_sparse_" not in n}


@pytest.mark.parametrize(("targets", "r"), [(None, None), ("all", None), (None, 2)])
@pytest.mark.parametrize("case", FAMILIES, ids=names)
def test_a_family_is_selected_by_data_trained_saved_loaded_and_merged(
    tmp_path: Path, case: FamilyCase, targets: str | None, r: int | None
) -> None:
    base, batch = case.make().eval(), case.batch(3)
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, SamConfig(density=0.05, target_modules=targets, r=r)).eval()
    selection = select_parameters(model, [batch], progress=False)
    linear = {name for name, module in untouched.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    below_the_root = {name for name, _ in untouched.named_parameters() if "." in name}
    if targets is None:
        assert {name.rpartition(".")[0] for name in selection.shapes} == linear - set(case.head)
    else:
        assert set(selection.shapes) == below_the_root

    before, trained = base_bits(model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert all(torch.equal(bits, before[name]) for name, bits in base_bits(model).items())

    with torch.no_grad():
        expected = model(**batch).loss
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
        assert torch.equal(loaded(**batch).loss, expected)
        pairs = pairs_of(model, "default")
        assert bool(pairs) == (r is not None)
        dense = adapted_copy(untouched, model.base_model.sparse_deltas(), pairs)
        torch.testing.assert_close(dense(**batch).loss, expected)
        loaded.merge_adapter()
        merged = {n.replace(".base_layer", ""): p for n, p in loaded.get_base_model().named_parameters()}
        assert all(torch.equal(merged[name], parameter) for name, parameter in dense.named_parameters())
        loaded.unmerge_adapter()
        plain = {n.replace(".base_layer", ""): p for n, p in loaded.get_base_model().named_parameters()}
        assert all(torch.equal(plain[name], parameter) for name, parameter in untouched.named_parameters())
