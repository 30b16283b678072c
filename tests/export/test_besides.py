"""Laws of what an adapter may have besides its entries, and no other form holds: refused in words, not lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_sam import SamConfig, WeightReceiver, WeightStream, export_adapter
from peft_sam.export.formats import FORMATS
from peft_sam.export.patch import WeightPatch
from peft_sam.layers.found import sam_layers
from tests.shared.cases import llama

WAYS = [*FORMATS, "a stream"]


def adapted(tie: bool = False, **options: Any) -> Any:
    base = llama(tie_word_embeddings=tie)
    told = {"density": 0.1, "score": "random", "init_weights": False, "target_modules": ["q_proj", "v_proj"], **options}
    return get_peft_model(base, SamConfig(**told)).eval()


def handed_on(model: Any, way: str, path: Path) -> Any:
    return WeightStream(model) if way == "a stream" else export_adapter(model, path, way)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_embeddings_that_are_trained_are_not_left_behind(way: str, tmp_path: Path) -> None:
    model = adapted(trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match=r"rows of embeddings besides \(trainable_token_indices\)"):
        handed_on(model, way, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("way", WAYS)
def test_a_scale_is_not_left_behind_and_an_adapter_of_it_is_handed_on(way: str, tmp_path: Path) -> None:
    model = adapted()
    for layer in sam_layers(model).values():
        layer.set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"has a scale \(0.5\), which is not part of it: set it to 1"):
        handed_on(model, way, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for layer in sam_layers(model).values():
        layer.set_scale("default", 1)
    handed_on(model, way, tmp_path / "out")


@pytest.mark.parametrize("way", ["checkpoint_patch", "a stream"])
@pytest.mark.parametrize("heads", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_trained_copy_of_a_tied_weight_is_not_sent_to_a_base_that_ties_it(
    way: str, heads: list[str], tmp_path: Path
) -> None:
    model = adapted(tie=True, modules_to_save=heads)
    with pytest.raises(ValueError, match=r"is tied, and adapter 'default' has trained a copy"):
        handed_on(model, way, tmp_path / "out")
    handed_on(adapted(modules_to_save=heads), way, tmp_path / "other")


def test_several_patches_of_one_tensor_are_refused_before_anything_is_written() -> None:
    base = llama()
    receiver = WeightReceiver(base)
    before = copy.deepcopy(base.state_dict())
    name, shape = "lm_head.weight", tuple(base.lm_head.weight.shape)
    patches = [WeightPatch(name, shape, torch.float32, torch.ones(2), torch.tensor(at)) for at in ([0, 1], [5, 9])]
    with pytest.raises(ValueError, match=r"several patches of lm_head\.weight"):
        receiver.apply(patches)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
