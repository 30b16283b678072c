"""Laws of word embeddings: what is tied stays tied, and rows of them are trained beside the adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sam import SamConfig, select_parameters
from peft_sam.tuner.candidates import candidates_of
from tests.shared.cases import NETS, VOCABULARY, NetCase, bert, names

ROWS = [3, 7, 11]
BATCH = {"input_ids": torch.tensor([[3, 7, 11, 4, 5]]), "labels": torch.tensor([[3, 7, 11, 4, 5]])}


def llama(tied: bool = True) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **sizes))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shorthand", [None, "all-linear", "all", ["q_proj", "down_proj"]])
def test_rows_are_trained_densely_beside_the_adapter_and_saved(tmp_path: Path, shorthand: Any, tied: bool) -> None:
    base = llama(tied)
    config = SamConfig(task_type="CAUSAL_LM", target_modules=shorthand, density=0.1, trainable_token_indices=ROWS)
    model: Any = get_peft_model(copy.deepcopy(base), config)
    assert not any("embed_tokens" in name for name in candidates_of(model, "default"))
    assert ("lm_head.weight" in candidates_of(model, "default")) == (not tied and shorthand == "all")
    assert isinstance(model.get_input_embeddings(), TrainableTokensWrapper)
    select_parameters(model, [BATCH], progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**BATCH).loss.backward()
    optimizer.step()
    model.eval()
    expected = model(**BATCH).logits
    changed = model.base_model.model.model.embed_tokens.token_adapter.get_merged_weights(["default"])
    rows = (changed != base.model.embed_tokens.weight).any(1).nonzero().flatten().tolist()
    assert rows == ROWS
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(**BATCH).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(**BATCH).logits, expected)
    model.unmerge_adapter()
    assert torch.equal(model(**BATCH).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**BATCH).logits, expected)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_a_module_cannot_be_a_target_and_trained_by_rows() -> None:
    base = bert()
    with pytest.raises(ValueError, match=r"word_embeddings' is a target and in trainable_token_indices"):
        get_peft_model(
            base, SamConfig(target_modules=["word_embeddings"], trainable_token_indices={"word_embeddings": [1]})
        )
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("wrong", [3, "3", [-1], [1.5], [True], {"word_embeddings": 3}, {1: [2]}, [[1]]])
def test_row_numbers_are_checked(wrong: Any) -> None:
    with pytest.raises(ValueError, match="trainable_token_indices must be None, a list of row numbers"):
        SamConfig(trainable_token_indices=wrong)


@pytest.mark.parametrize("rows", [[VOCABULARY], {"word_embeddings": [1, 10**12]}])
def test_a_row_that_the_embedding_does_not_have_is_refused(rows: Any) -> None:
    base = bert()
    with pytest.raises(ValueError, match=r"word_embeddings', which has \d+ rows: resize"):
        get_peft_model(base, SamConfig(target_modules=["query"], score="random", trainable_token_indices=rows))
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ".*(lm_head|embed_tokens)"])
def test_a_tied_target_is_warned_of_unless_it_is_known_and_all_its_uses_see_its_delta(targets: Any) -> None:
    base, options = llama(), {"target_modules": targets, "density": 0.2, "score": "random", "init_weights": False}
    with pytest.warns(UserWarning, match="but no implementation exists to tie the adapters, nor is one needed"):
        model: Any = get_peft_model(copy.deepcopy(base), SamConfig(**options))
    known: Any = get_peft_model(copy.deepcopy(base), SamConfig(ensure_weight_tying=True, **options))
    assert set(known.base_model.sparse_deltas()) == {"model.embed_tokens.weight"}
    expected = known.eval()(**BATCH).logits
    torch.testing.assert_close(known.merge_and_unload()(**BATCH).logits, expected)
    with pytest.warns(UserWarning, match="untie the embeddings"):
        model.merge_and_unload()


@pytest.mark.parametrize("case", [NETS[1], NETS[3]], ids=names)
def test_the_shorthands_take_ties_as_they_are(case: NetCase) -> None:
    model = get_peft_model(case.make(), SamConfig(**case.options, score="random"))
    model.merge_and_unload()


def test_a_tied_embedding_that_is_saved_whole_stays_tied_if_asked_for() -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "score": "random", "density": 0.2}
    with pytest.warns(
        UserWarning, match="unless ensure_weight_tying=True: the copy in `modules_to_save` is trained alone"
    ):
        apart: Any = get_peft_model(llama(), SamConfig(**options))
    assert isinstance(apart.base_model.model.lm_head, nn.Linear)
    tied: Any = get_peft_model(llama(), SamConfig(ensure_weight_tying=True, **options))
    inner = tied.base_model.model
    assert isinstance(inner.lm_head, ModulesToSaveWrapper)
    assert inner.lm_head.modules_to_save["default"].weight is inner.model.embed_tokens.modules_to_save["default"].weight


@pytest.mark.parametrize(
    ("tied", "words"), [(False, "no tied modules were found"), (True, "no tied modules are added")]
)
def test_a_wish_to_tie_what_is_not_there_is_warned_of(tied: bool, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        get_peft_model(llama(tied), SamConfig(target_modules=["q_proj"], ensure_weight_tying=True))
