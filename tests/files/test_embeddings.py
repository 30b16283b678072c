"""Laws of embeddings in adapter files: the file is the adapter, and brings what was resized and nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

from peft_sam import SamConfig
from tests.shared.cases import VOCABULARY, bert, clip, gpt2, llama, shown, t5, vit

FILE = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
RANDOM: dict[str, Any] = {"score": "random", "init_weights": False, "density": 0.2}
ALL = {"target_modules": "all"}


def tied_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**llama().config.to_dict() | {"tie_word_embeddings": True}))


MODELS: list[tuple[Callable[[], Any], dict[str, Any]]] = [
    (llama, ALL),
    (llama, {"target_modules": ["embed_tokens"]}),
    (llama, {"target_modules": ["lm_head"]}),
    (llama, {"target_modules": r".*(embed_tokens|lm_head)"}),
    (llama, {"target_modules": ["q_proj"]}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    (llama, {**ALL, "modules_to_save": ["lm_head"]}),
    (tied_llama, ALL),
    (tied_llama, {"target_modules": ["lm_head"]}),
    (gpt2, ALL),
    (t5, ALL),
]
OTHERS: list[tuple[Callable[[], Any], dict[str, Any]]] = [
    (bert, {**ALL, "task_type": "SEQ_CLS"}),
    (vit, ALL),
    (clip, ALL),
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()


def base(make: Callable[[], Any], path: Path, dtype: torch.dtype = torch.float32, tokens: int = VOCABULARY) -> Any:
    if not path.exists():
        torch.manual_seed(0)
        make().save_pretrained(path)
    model = type(make()).from_pretrained(path, dtype=dtype)
    if tokens != VOCABULARY:
        model.resize_token_embeddings(tokens)
    return model.eval()


def ids(tokens: int) -> Tensor:
    return torch.arange(tokens - 12, tokens).view(2, 6)


@torch.no_grad()
def logits(model: Any, tokens: int = VOCABULARY) -> Tensor:
    inputs = {"input_ids": ids(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(tokens)
    return model.eval()(**inputs).logits


def whole(folder: Path, model: Any) -> list[str]:
    """The tensors in a file that are no deltas and no heads."""
    heads = tuple(model.peft_config["default"].modules_to_save or ())
    state = load_file(folder / FILE)
    return [key for key in state if ".sam_sparse_" not in key and not any(f".{head}." in key for head in heads)]


@pytest.mark.parametrize(("make", "options"), MODELS + OTHERS, ids=shown)
@pytest.mark.parametrize("save", ["auto", False])
def test_the_file_holds_no_base_weights(make: Any, options: Any, save: Any, tmp_path: Path) -> None:
    model = get_peft_model(base(make, tmp_path / "base"), SamConfig(**RANDOM, **options))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save)
    assert whole(tmp_path / "adapter", model) == []
    loaded = PeftModel.from_pretrained(base(make, tmp_path / "base"), tmp_path / "adapter", strict_base=True)
    here, there = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.parametrize(("make", "options"), MODELS, ids=shown)
def test_a_resized_embedding_comes_along_once_and_the_rest_of_the_base_keeps_its_bits(
    make: Any, options: Any, tmp_path: Path
) -> None:
    tokens = VOCABULARY + 3
    resized = base(make, tmp_path / "base", tokens=tokens)
    model = get_peft_model(copy.deepcopy(resized), SamConfig(**RANDOM, **options))
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)  # other new rows
    again = base(make, tmp_path / "base", tokens=tokens)
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(again), tmp_path / "adapter", strict_base=True)
    assert torch.equal(logits(loaded, tokens), expected)
    state = load_file(tmp_path / "adapter" / FILE)
    named = whole(tmp_path / "adapter", model)
    distinct = {id(m.weight) for m in (resized.get_input_embeddings(), resized.get_output_embeddings())}
    dense = {"embed_tokens", "lm_head"} & set(options.get("modules_to_save", ()))
    assert len(named) == len(distinct) - len(dense)
    assert all(len(state[key]) == tokens for key in named)
    bare = loaded.unload()
    for (name, one), two in zip(bare.named_parameters(), again.parameters(), strict=True):
        if one.shape[0] == tokens:
            assert torch.equal(one[:VOCABULARY], two[:VOCABULARY]), name
        else:
            assert torch.equal(one, two), name


@pytest.mark.parametrize(("make", "options"), MODELS[:4] + MODELS[7:], ids=shown)
@pytest.mark.parametrize("tokens", [VOCABULARY, VOCABULARY + 2])
def test_saved_while_merged_the_file_holds_the_adapter_once(
    make: Any, options: Any, tokens: int, tmp_path: Path
) -> None:
    model = get_peft_model(base(make, tmp_path / "base", tokens=tokens), SamConfig(**RANDOM, **options))
    model.save_pretrained(tmp_path / "apart", save_embedding_layers=True)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged", save_embedding_layers=True)
    apart, merged = (load_file(tmp_path / name / FILE) for name in ("apart", "merged"))
    assert apart.keys() == merged.keys()
    assert all(torch.equal(apart[key], merged[key]) for key in apart)
    assert whole(tmp_path / "merged", model)


def test_a_base_in_another_dtype_keeps_its_bits(tmp_path: Path) -> None:
    for tokens in (VOCABULARY, VOCABULARY + 2):
        half = base(llama, tmp_path / "base", torch.bfloat16, tokens)
        adapter = tmp_path / f"adapter {tokens}"
        get_peft_model(half, SamConfig(**RANDOM, **ALL)).save_pretrained(adapter, save_embedding_layers=True)
        full = base(llama, tmp_path / "base", tokens=tokens)
        before = {name: p.clone() for name, p in full.named_parameters()}
        loaded: Any = PeftModel.from_pretrained(full, adapter)
        for name, parameter in loaded.unload().named_parameters():
            rows = VOCABULARY if len(parameter) == tokens else len(parameter)
            assert torch.equal(parameter[:rows], before[name][:rows]), name
        assert torch.equal(full.lm_head.weight[VOCABULARY:].bfloat16(), half.lm_head.weight[VOCABULARY:])


def test_a_file_for_a_resized_base_says_what_to_do_and_changes_nothing(tmp_path: Path) -> None:
    tokens = VOCABULARY + 2
    model = get_peft_model(base(llama, tmp_path / "base", tokens=tokens), SamConfig(**RANDOM, **ALL))
    model.save_pretrained(tmp_path / "adapter")
    bare = base(llama, tmp_path / "base")
    before = {name: p.clone() for name, p in bare.named_parameters()}
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({tokens}\)"):
        PeftModel.from_pretrained(bare, tmp_path / "adapter")
    assert all(torch.equal(p, before[name]) for name, p in bare.named_parameters())
    assert {name for name, _ in bare.named_parameters()} == before.keys()


def test_a_file_that_is_refused_for_its_head_leaves_no_embedding_behind(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(base(llama, tmp_path / "base"), SamConfig(**RANDOM, **options))
    model.save_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / FILE)
    head = state["base_model.model.lm_head.weight"]
    state["base_model.model.model.embed_tokens.weight"] = torch.zeros_like(head)
    state["base_model.model.lm_head.weight"] = head[:4].clone()
    save_file(state, tmp_path / "adapter" / FILE)
    bare = base(llama, tmp_path / "base")
    before = {name: p.clone() for name, p in bare.named_parameters()}
    with pytest.raises(ValueError, match=r"lm_head.*with shape \(4, 16\)"):
        PeftModel.from_pretrained(bare, tmp_path / "adapter")
    assert all(torch.equal(p, before[name]) for name, p in bare.named_parameters())


def test_the_state_dict_is_the_same_under_every_name_of_the_function(tmp_path: Path) -> None:
    import peft
    from peft.utils import save_and_load

    model = get_peft_model(base(llama, tmp_path / "base"), SamConfig(**RANDOM, **ALL))
    for function in (
        get_peft_model_state_dict,
        peft.get_peft_model_state_dict,
        peft.utils.get_peft_model_state_dict,
        save_and_load.get_peft_model_state_dict,
    ):
        assert all(".sam_sparse_" in key for key in function(model))
        keys = {key for key in function(model, save_embedding_layers=True) if ".sam_sparse_" not in key}
        assert {key.split(".")[-3] for key in keys} == {"embed_tokens", "lm_head"}


def test_a_module_that_is_no_language_model_has_no_embeddings_to_save() -> None:
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 4)), SamConfig(**RANDOM, **ALL))
    with pytest.warns(UserWarning, match="Could not identify embedding"):
        found = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert all(".sam_sparse_" in key for key in found)


@pytest.mark.parametrize(("make", "options"), [MODELS[0], MODELS[7]], ids=shown)
@pytest.mark.parametrize("tokens", [VOCABULARY, VOCABULARY + 2])
def test_transformers_own_loading_does_the_same(make: Any, options: Any, tokens: int, tmp_path: Path) -> None:
    model = base(make, tmp_path / "base", tokens=tokens)
    model.add_adapter(SamConfig(**RANDOM, **options))
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    if tokens == VOCABULARY:
        assert all(".sam_sparse_" in key for key in load_file(tmp_path / "adapter" / FILE))
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        found = base(make, tmp_path / "base", tokens=tokens)
        found.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(found, tokens), expected)


class Plain(nn.Module):
    """A model that has an embedding and no config to tell whether its vocabulary is as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids))

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize(("targets", "brought"), [(["table"], True), (["table", "out"], True), (["out"], False)])
def test_an_adapted_embedding_of_an_unknown_vocabulary_comes_along_with_peft_s_warning(
    targets: list[str], brought: bool, tmp_path: Path
) -> None:
    model = get_peft_model(Plain(), SamConfig(target_modules=targets, **RANDOM))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path)
    words = [str(warning.message) for warning in told]
    assert any("as embedding layers found in `target_modules`" in text for text in words) == brought
    assert ("base_model.model.table.base_layer.weight" in load_file(tmp_path / FILE)) == brought
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert all("sam_sparse_" in key for key in load_file(tmp_path / FILE))
