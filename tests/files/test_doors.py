"""Laws of every way to load an adapter: a renamed base is followed or refused, no file costs what it only claims."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, logging

from peft_sam import SamConfig
from peft_sam.layers.found import deltas_of
from tests.files.test_checkpoint import FILE, rows
from tests.files.test_untrusted import CODED_DAMAGES, assert_untouched, bits, damage_coded
from tests.shared.cases import Sequential, bert, llama

RANDOM: dict[str, Any] = {"score": "random", "init_weights": False, "density": 0.2}
IDS = torch.arange(1, 13).view(2, 6)
# PEFT, and transformers
DOORS = ("from_pretrained", "load_adapter", "auto class", "transformers")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()


def saved(folder: Path, **options: Any) -> Any:
    """A base on disk and an adapter of it; the adapted model."""
    llama().save_pretrained(folder / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), SamConfig(**RANDOM, **options))
    model.save_pretrained(folder / "adapter")
    return model.eval()


def load(folder: Path, door: str, **options: Any) -> Any:
    bare = LlamaForCausalLM.from_pretrained(folder / "base")
    path = str(folder / "adapter")
    if door == "from_pretrained":
        return PeftModel.from_pretrained(bare, path, **options).eval()
    if door == "load_adapter":
        model = get_peft_model(bare, SamConfig(target_modules=["q_proj"], score="random"), adapter_name="other")
        model.load_adapter(path, "default", **options)
        model.set_adapter("default")
        return model.eval()
    if door == "auto class":
        return AutoModelForCausalLM.from_pretrained(path, **options).eval()
    key_mapping = options.pop("key_mapping", {})
    from transformers.core_model_loading import WeightRenaming

    bare.load_adapter(path, weight_mapping=[WeightRenaming(k, v) for k, v in key_mapping.items()] or None, **options)
    return bare.eval()


def rename(folder: Path) -> None:
    """The adapter is of a time when the base's layers were called blocks."""
    state = {k.replace("model.layers", "model.blocks"): t for k, t in load_file(folder / "adapter" / FILE).items()}
    save_file(state, folder / "adapter" / FILE, metadata={"format": "pt"})
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("model.layers", "model.blocks"))


TARGETS = [
    None,
    ["q_proj", "v_proj"],
    "all",
    r"model\.(layers|blocks)\.\d+\.mlp\.up_proj",
    ["model.layers.1.mlp.up_proj"],
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_a_renamed_base_is_followed_or_refused_and_the_adapter_has_the_new_names(
    door: str, targets: Any, tmp_path: Path
) -> None:
    model = saved(tmp_path, target_modules=targets)
    rename(tmp_path)
    loaded = load(tmp_path, door, key_mapping={r"model\.blocks": "model.layers"})
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    ours, theirs = (m.peft_config["default"].selection for m in (model, loaded))
    assert (ours["counts"], ours["base"]) == (theirs["counts"], theirs["base"])
    with pytest.raises(ValueError, match=r"blocks|not found in the base model"):
        load(tmp_path, door)


@pytest.mark.parametrize("how", CODED_DAMAGES)
def test_transformers_refuses_a_damaged_file_and_its_model_is_as_before(how: str, tmp_path: Path) -> None:
    base = bert()
    model = copy.deepcopy(base)
    model.add_adapter(SamConfig(**RANDOM, modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path)
    damage_coded(state := load_file(tmp_path / FILE), how)
    save_file(state, tmp_path / FILE, metadata={"format": "pt"})
    before, kinds = bits(base), [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=r"support|adapter file"):
        base.load_adapter(str(tmp_path))
    assert_untouched(before, kinds, base)
    assert not hasattr(base, "peft_config")
    assert not base._hf_peft_config_loaded
    model.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))
    assert torch.equal(base.eval()(**rows()).logits, model.eval()(**rows()).logits)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # PEFT
@pytest.mark.filterwarnings("ignore:Adapter third was active which is now deleted:UserWarning")  # PEFT
def test_transformers_loads_several_adapters_and_takes_a_damaged_one_out_again(tmp_path: Path) -> None:
    base = bert()
    base.add_adapter(SamConfig(**RANDOM), "first")
    one = copy.deepcopy(base).eval()
    one.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path), "second")
    assert torch.equal(base.eval()(**rows()).logits, one(**rows()).logits)
    state = load_file(tmp_path / FILE)
    save_file({key: tensor[:-1].clone() for key, tensor in state.items()}, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="support"):
        base.load_adapter(str(tmp_path), "third")
    assert list(base.peft_config) == ["first", "second"]
    with pytest.raises(ValueError, match="already exists"):
        base.load_adapter(str(tmp_path), "second")


CLAIMS = ["all entries", "all entries, format 1", "no selection"]


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("door", [*DOORS, "mixed", "config"])
def test_no_room_is_made_for_what_a_config_only_claims(
    door: str, claim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_sam.sparse import delta

    saved(tmp_path, target_modules="all", task_type="CAUSAL_LM")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    if claim == "no selection":
        config |= {"selection": None, "score": "random", "density": 1.0}
    else:
        counts = {name: p.numel() for name, p in llama().named_parameters()}
        config["selection"] |= {"counts": counts, "k": sum(counts.values())}
        config["selection"] |= {"format": 1} if "1" in claim else {}
    path.write_text(json.dumps(config))
    held = sum(t.numel() for key, t in load_file(tmp_path / "adapter" / FILE).items() if key.endswith("values"))
    made: list[int] = []
    plain = delta.SparseDelta.__init__

    def counted(self: Any, shape: Any, indices: Any, values: Any) -> None:
        made.append(len(values))
        plain(self, shape, indices, values)

    monkeypatch.setattr(delta.SparseDelta, "__init__", counted)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    if door == "config" and claim != "no selection":
        get_peft_model(base, PeftConfig.from_pretrained(tmp_path / "adapter"))
    elif door == "mixed":
        if claim == "no selection":
            PeftMixedModel.from_pretrained(base, tmp_path / "adapter")
        else:
            with pytest.raises(ValueError, match=r"where adapter_config\.json says"):
                PeftMixedModel.from_pretrained(base, tmp_path / "adapter")
    elif door in DOORS and claim != "no selection":
        with pytest.raises(ValueError, match=r"where adapter_config\.json says"):
            load(tmp_path, door)
    elif door in DOORS:
        load(tmp_path, door)
    assert sum(made) <= (held if claim == "no selection" else 0) + 1000 * (door == "load_adapter")


@pytest.mark.parametrize("name", ["original_module", "base_layer", "modules_to_save", "support", "weight"])
def test_an_adapter_may_be_called_as_parts_of_names_are(name: str, tmp_path: Path) -> None:
    base = bert()
    config = SamConfig(**RANDOM, task_type="SEQ_CLS", target_modules="all")
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=name).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / name, adapter_name=name).eval()
    assert torch.equal(loaded(**rows()).logits, model(**rows()).logits)


class Slashes(nn.Module):
    """Parameters whose names have what parts the names of modules, and what stands for it."""

    NAMES = ("a/b", "a%b", "a%2Fb")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.register_parameter(name, nn.Parameter(torch.randn(4, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.NAMES:
            x = x @ self._parameters[name]
        return x


def test_parameters_may_have_slashes_in_their_names(tmp_path: Path) -> None:
    base = Sequential(Slashes())
    model = get_peft_model(copy.deepcopy(base), SamConfig(**RANDOM, target_modules="all"))
    assert {name.partition(".")[2] for name in deltas_of(model, "default")} == set(Slashes.NAMES)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 4)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x), model.eval()(x))
    assert torch.equal(loaded.merge_and_unload()(x), model(x))


@pytest.mark.parametrize("number", [1e300, -1e39, 1e39])
@pytest.mark.parametrize("door", DOORS)
def test_values_too_large_for_the_model_are_refused(door: str, number: float, tmp_path: Path) -> None:
    saved(tmp_path)
    state = load_file(tmp_path / "adapter" / FILE)
    name = next(key for key in state if key.endswith("values"))
    state[name] = torch.full_like(state[name], number, dtype=torch.float64)
    save_file(state, tmp_path / "adapter" / FILE, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"a value of {re.escape(f'{abs(number):.3g}')} in float64, which is too large"
    ):
        load(tmp_path, door)


@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_adapters_load_in_inference_mode(door: str, tmp_path: Path) -> None:
    model = saved(tmp_path, target_modules="all", task_type="CAUSAL_LM")
    with torch.inference_mode():
        loaded = load(tmp_path, door)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        double = loaded.double()(IDS).logits
    torch.testing.assert_close(double.float(), model(IDS).logits)
