"""Laws of task types: PEFT's heads are trained and saved densely, and the adapter leaves them alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForTokenClassification,
)

from peft_sam import SamConfig, select_parameters
from tests.shared.cases import bert, gpt2, t5
from tests.shared.reference import adapted_copy

IDS = torch.arange(12).view(2, 6)
LABELS: dict[str, dict[str, Tensor]] = {
    "SEQ_CLS": {"labels": torch.tensor([0, 1])},
    "TOKEN_CLS": {"labels": IDS % 2},
    "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    "CAUSAL_LM": {"labels": IDS},
    "SEQ_2_SEQ_LM": {"labels": IDS},
    "FEATURE_EXTRACTION": {},
}
# task type, model, the head that PEFT trains densely
TASKS = [
    ("SEQ_CLS", lambda: BertForSequenceClassification(bert().config), "classifier"),
    ("TOKEN_CLS", lambda: BertForTokenClassification(bert().config), "classifier"),
    ("TOKEN_CLS", lambda: GPT2ForTokenClassification(gpt2().config), "classifier"),
    ("QUESTION_ANS", lambda: BertForQuestionAnswering(bert().config), "qa_outputs"),
    ("CAUSAL_LM", gpt2, None),
    ("SEQ_2_SEQ_LM", t5, None),
    ("FEATURE_EXTRACTION", lambda: BertModel(bert().config), None),
]
cases = pytest.mark.parametrize(("task", "make", "head"), TASKS, ids=[f"{task}-{head}" for task, _, head in TASKS])


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    return out.loss if "loss" in out else out.last_hidden_state[..., 0].mean()


@cases
@pytest.mark.parametrize("targets", [None, "all-linear", "all"])
def test_a_task_type_selects_trains_saves_and_loads_with_its_head(
    tmp_path: Path, task: str, make: Any, head: str | None, targets: Any
) -> None:
    base, batch = make().eval(), {"input_ids": IDS, **LABELS[task]}
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, SamConfig(task_type=task, density=0.05, target_modules=targets))
    select_parameters(model, [batch], loss_fn=None if LABELS[task] else lambda m, b: loss_of(m, b), progress=False)
    dense = {name.partition("modules_to_save.")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in dense if "sam_sparse_" not in name} == ({f"base_model.model.{head}."} if head else set())
    assert not any(head in name for name in model.base_model.sparse_deltas() if head)
    model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    after = loss_of(model, batch).detach()
    assert after != loss.detach()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    assert torch.equal(loss_of(loaded, batch), after)
    assert type(loaded) is type(model)


AUTO_CLASSES = {
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": AutoPeftModelForTokenClassification,
    "QUESTION_ANS": AutoPeftModelForQuestionAnswering,
    "CAUSAL_LM": AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoPeftModelForFeatureExtraction,
}


@cases
def test_peft_s_auto_classes_load_base_and_adapter(tmp_path: Path, task: str, make: Any, head: str | None) -> None:
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, SamConfig(task_type=task, score="random", density=0.1, init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    batch = {"input_ids": IDS, **LABELS[task]}
    loaded = AUTO_CLASSES[task].from_pretrained(tmp_path / "adapter")
    assert torch.equal(loss_of(loaded.eval(), batch), loss_of(model.eval(), batch))


def test_a_batch_norm_that_is_trained_densely_comes_back_with_its_statistics(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    model = get_peft_model(
        copy.deepcopy(base), SamConfig(target_modules=["0"], modules_to_save=["1", "3"], score="random", density=0.2)
    )
    optimizer, x = torch.optim.AdamW(model.parameters(), lr=0.1), torch.randn(5, 3, 6, 6)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    with model.disable_adapter():
        assert torch.equal(model(x), base.eval()(x))


@pytest.mark.parametrize(("task", "make", "heads"), [
    ("SEQ_CLS", BertForSequenceClassification, ["classifier", "score"]),
    ("TOKEN_CLS", BertForTokenClassification, ["classifier", "score"]),
    ("QUESTION_ANS", BertForQuestionAnswering, ["qa_outputs"]),
])  # fmt: skip
def test_heads_are_named_once_however_often_a_config_is_used(
    tmp_path: Path, task: str, make: Any, heads: list[str]
) -> None:
    config = SamConfig(task_type=task, score="random", modules_to_save=["pooler"] if task == "SEQ_CLS" else None)
    expected = [*(config.modules_to_save or []), *heads]
    base = make(bert().config)
    for _ in range(3):
        model = get_peft_model(copy.deepcopy(base), config)
        assert model.peft_config["default"].modules_to_save == expected
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".second." not in n} == set()
    model.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "second"):
        model = PeftModel.from_pretrained(copy.deepcopy(base), path)
        assert model.peft_config["default"].modules_to_save == expected


def test_an_injected_adapter_trains_no_head_that_its_config_does_not_name() -> None:
    model = inject_adapter_in_model(
        SamConfig(task_type="TOKEN_CLS", score="random"), BertForTokenClassification(bert().config)
    )
    assert {"sam_sparse_" in name for name, p in model.named_parameters() if p.requires_grad} == {True}


def test_a_config_given_to_from_pretrained_is_the_adapter_s_own(tmp_path: Path) -> None:
    config = SamConfig(task_type="SEQ_CLS", score="random")
    base = bert()
    model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode
    assert config.counts == model.peft_config["default"].counts
    assert not model.peft_config["default"].inference_mode


def test_a_second_adapter_targets_the_original_of_what_the_first_trains_densely(tmp_path: Path) -> None:
    base = bert().eval()
    model = get_peft_model(
        copy.deepcopy(base), SamConfig(score="random", modules_to_save=["pooler"]), adapter_name="first"
    )
    options: dict[str, Any] = {"target_modules": "all", "score": "random", "density": 0.5, "init_weights": False}
    model.add_adapter("second", SamConfig(budget="tensor", **options))
    assert set(model.base_model.sparse_deltas("second")) == {n for n, _ in base.named_parameters()}
    first = model(input_ids=IDS).logits
    model.set_adapter("second")
    alone = adapted_copy(base, model.base_model.sparse_deltas("second"))
    torch.testing.assert_close(model(input_ids=IDS).logits, alone(input_ids=IDS).logits)
    assert not torch.allclose(first, alone(input_ids=IDS).logits)
    model.save_pretrained(tmp_path, selected_adapters=["second"], save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "second")
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
