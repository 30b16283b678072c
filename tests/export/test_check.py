"""Laws of reading back: what an export claims to be, its own loader makes of it, or nothing is left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_sam import export_adapter
from peft_sam.export import formats
from tests.export.test_export import IDS, Saved, bits
from tests.shared.cases import VOCABULARY, bert, gpt2, llama, mixtral, shown

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # stock SHiRA
SHAPE: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 24, "num_key_value_heads": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
}


def qwen2_moe() -> Any:
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(num_experts=2, shared_expert_intermediate_size=8, **SHAPE))


def qwen3_moe() -> Any:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=2, head_dim=8, mlp_only_layers=[0], **SHAPE))


def deepseek() -> Any:
    own = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 8}
    heads = {"q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPE, **own, **heads}, first_k_dense_replace=1))


EXPERTS: list[tuple[Any, dict[str, Any]]] = [
    (mixtral, {}),
    (qwen2_moe, {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}),
    (qwen3_moe, {}),
    (deepseek, {}),
    (qwen3_moe, {"target_modules": ["down_proj"]}),
    (qwen3_moe, {"target_modules": ["gate_proj"]}),
    (deepseek, {"target_modules": ["gate_proj", "q_a_proj"]}),
    (llama, {}),
]


@pytest.mark.parametrize("format", ["lora", "supertuning", "shira"])
@pytest.mark.parametrize(("make", "options"), EXPERTS, ids=shown)
@torch.no_grad()
def test_a_twin_of_a_mixture_of_experts_loads_whole(make: Any, options: Any, format: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path, make, **{"density": 0.2, **options})
    flags = {name: p.requires_grad for name, p in saved.model.named_parameters()}
    state = torch.get_rng_state()
    report = export_adapter(saved.model, tmp_path / "twin", format, **({"rank": 16} if format == "lora" else {}))
    assert torch.equal(torch.get_rng_state(), state)
    assert report.error < 1e-6
    twin: Any = PeftModel.from_pretrained(saved.load(), tmp_path / "twin").eval()
    torch.testing.assert_close(twin(IDS).logits, saved.model(IDS).logits)
    assert {name: p.requires_grad for name, p in saved.model.named_parameters()} == flags


def test_what_peft_refuses_to_load_is_refused_in_its_words(tmp_path: Path) -> None:
    saved = Saved(tmp_path, lambda: MambaForCausalLM(MambaConfig(**SHAPE, state_size=4)))
    with pytest.raises(ValueError, match=r"'lora' cannot hold this adapter of MambaForCausalLM: PEFT .*out_proj"):
        export_adapter(saved.model, tmp_path / "twin", "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert export_adapter(saved.model, tmp_path / "merged", "merged").error == 0


def largest(state: dict[str, Any], ending: str = "") -> str:
    return max((key for key in state if key.endswith(ending)), key=lambda key: state[key].numel())


@pytest.mark.parametrize("how", ["a tensor less", "another number", "another name"])
@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize(("make", "options"), [(llama, {}), (bert, {"task_type": "SEQ_CLS"}), (gpt2, {})], ids=shown)
def test_what_does_not_come_back_is_not_handed_out(
    make: Any, options: Any, format: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if make is gpt2 and format in ("supertuning", "shira"):
        options = {"target_modules": ["lm_head"]}
    saved = Saved(tmp_path, make, **options)
    row = formats.FORMATS[format]
    if not all(row.holds(part) for part in formats.Adapter(saved.model, "default").parts):
        format, row = "merged", formats.FORMATS["merged"]
    before = bits(saved.model)

    def damaged(adapter: Any, folder: Path, **given: Any) -> Any:
        lost = row.write(adapter, folder, **given)
        path = next(folder.glob("*.safetensors"))
        state = load_file(path)
        name = largest(state, ".values" if format == "checkpoint_patch" else "")
        if how == "a tensor less":
            del state[name]
        elif how == "another name":
            state[f"{name}.other"] = state.pop(name)
        else:
            state[name] = state[name] + 1
        save_file(state, path, metadata={"format": "pt"})
        return lost

    monkeypatch.setitem(formats.FORMATS, format, row._replace(write=damaged))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=f"format '{format}' cannot hold this adapter of .*Nothing is written"):
        export_adapter(saved.model, tmp_path / "out", format)
    assert not list((tmp_path / "out").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    after = bits(saved.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_patch_that_does_not_fit_the_base_s_files_is_refused(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    path = saved.path / "model.safetensors"
    state = load_file(path)
    name = largest(state, "down_proj.weight")
    save_file({**state, name: state[name].t().contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'checkpoint_patch' cannot hold"):
        export_adapter(saved.model, tmp_path / "out", "checkpoint_patch")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_link_to_an_empty_folder_is_filled(format: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    for there in ("real", "gone"):
        if there == "real":
            (tmp_path / there).mkdir()
        os.symlink(tmp_path / there, tmp_path / f"link to {there}")
        export_adapter(saved.model, tmp_path / f"link to {there}", format, rank=64 if format == "lora" else None)
        assert list((tmp_path / there).iterdir())
        assert (tmp_path / f"link to {there}").is_symlink()


@pytest.mark.parametrize("options", [{}, {"save_dtype": "bfloat16"}, {"task_type": "SEQ_CLS"}], ids=shown)
def test_the_report_tells_the_bytes_beside_those_of_the_adapter_s_own_file(options: Any, tmp_path: Path) -> None:
    saved = Saved(tmp_path, bert, **options)
    saved.model.save_pretrained(tmp_path / "own")
    own = sum(tensor.nbytes for tensor in load_file(tmp_path / "own" / "adapter_model.safetensors").values())
    report = export_adapter(saved.model, tmp_path / "patch", "checkpoint_patch")
    assert report.own_size == own
    assert f"{report.size / own:,.1f} times the {own:,} bytes of the adapter's own file" in str(report)


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="[UNK]")


def test_a_merged_model_has_the_tokenizer_of_its_base_or_the_one_given_or_says_that_it_has_none(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    report = export_adapter(saved.model, tmp_path / "none", "merged")
    assert report.notes == [str(report).splitlines()[-1].strip()]
    assert f"no tokenizer beside it: there is none at '{saved.path}'" in str(report)
    assert export_adapter(saved.model, tmp_path / "given", "merged", tokenizer=tokenizer()).notes == []
    tokenizer().save_pretrained(saved.path)
    assert export_adapter(saved.model, tmp_path / "copied", "merged").notes == []
    for folder in ("given", "copied"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder)("a").input_ids == [1]
    with pytest.raises(ValueError, match="is for format 'merged'; got"):
        export_adapter(saved.model, tmp_path / "lora", "lora", tokenizer=tokenizer())


def test_the_tokenizer_comes_from_the_hub_too(hub: Any, tmp_path: Path) -> None:
    llama().push_to_hub("me/base")
    tokenizer().push_to_hub("me/base")
    saved = Saved(tmp_path, llama)
    saved.model.peft_config["default"].base_model_name_or_path = "me/base"
    assert export_adapter(saved.model, tmp_path / "merged", "merged").notes == []
    assert json.loads((tmp_path / "merged" / "tokenizer.json").read_text())["model"]["type"] == "WordLevel"


def test_a_plain_module_s_patch_is_read_back_as_a_file(tmp_path: Path) -> None:
    from peft import get_peft_model

    from peft_sam import SamConfig

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), SamConfig(target_modules=["0"], score="random", density=0.5))
    export_adapter(model, tmp_path / "patch", "checkpoint_patch")
    assert load_file(tmp_path / "patch" / "checkpoint_patch.safetensors")
