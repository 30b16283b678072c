"""Laws of what a batch counts: as many as its loss is a mean over, whatever the model's class and what is around it.

The oracle adds up the losses of all targets and divides once, in one backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BatchEncoding,
    BertForMaskedLM,
    BertForTokenClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from peft_sam import SamConfig, select_parameters
from peft_sam.selecting.batches import from_loader
from peft_sam.selecting.counts import examples_in
from tests.selecting.test_select import arguments, assert_same_up_to_rounding
from tests.shared import reference
from tests.shared.cases import VOCABULARY, bert, gpt2, llama, t5

# rows and tokens of the batches: means of means are far from the mean of all
SIZES = ((1, 2), (2, 12), (4, 3))
Batch = dict[str, Tensor]


class MyLlama(LlamaForCausalLM):
    """A subclass, whose name no table has."""


class Around(nn.Module):
    """A module around a model, which calls it with what it is called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = model

    def forward(self, **batch: Any) -> Any:
        return self.inside(**batch)


class OfItsOwn(nn.Module):
    """A language model of nobody's, with a loss of its own making."""

    def __init__(self, shifts: bool, hides: bool = False, ignored: int = -100) -> None:
        super().__init__()
        self.shifts, self.hides, self.ignored = shifts, hides, ignored
        self.table, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        logits = self.out(torch.tanh(self.table(input_ids).cumsum(1)))
        if labels is None:
            return {"logits": logits}
        if self.hides and attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, self.ignored)
        if self.shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self.ignored)}


def llava() -> nn.Module:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **shape)
    text = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **shape)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1)
    )


def language() -> Iterator[Batch]:
    for n, length in SIZES:
        ids = torch.randint(3, VOCABULARY - 1, (n, length))
        yield {"input_ids": ids, "labels": ids.clone()}


def padded() -> Iterator[Batch]:
    """Padding on the left or the right, which the labels leave out."""
    for number, batch in enumerate(language()):
        hidden = torch.rand(batch["labels"].shape).sort(1, descending=bool(number % 2)).values < 0.3
        yield {**batch, "attention_mask": (~hidden).long(), "labels": batch["labels"].masked_fill(hidden, -100)}


def prompts() -> Iterator[Batch]:
    """Only the last tokens are learnt, in one batch none."""
    for number, batch in enumerate(language()):
        labels = batch["labels"].clone()
        labels[:, : 10 if number == 1 else 2] = -100
        yield {**batch, "labels": labels}


def visible() -> Iterator[Batch]:
    """The labels of what the mask hides are there, as from a collator that does not care."""
    for number, batch in enumerate(language()):
        mask = torch.ones_like(batch["labels"])
        mask[0, -1:] = int(number == 0)
        yield {**batch, "attention_mask": mask}


def one_label() -> Iterator[Batch]:
    for batch in language():
        yield {**batch, "labels": torch.full_like(batch["labels"], 3)}


def masked() -> Iterator[Batch]:
    for batch in language():
        keep = torch.rand(batch["labels"].shape) < 0.4
        keep[0, 0] = True
        yield {**batch, "labels": batch["labels"].where(keep, -100)}


def of_tokens() -> Iterator[Batch]:
    for batch in language():
        labels = torch.randint(0, 3, batch["labels"].shape)
        labels[:, -1] = -100
        yield {**batch, "labels": labels}


def classes() -> Iterator[Batch]:
    for number, batch in enumerate(language()):
        labels = torch.randint(0, 3, (len(batch["input_ids"]),))
        labels[:number] = -100  # one of two, two of four
        yield {**batch, "labels": labels}


def classes_or_none() -> Iterator[Batch]:
    for number, batch in enumerate(classes()):
        yield {**batch, "labels": batch["labels"].fill_(-100) if number == 1 else batch["labels"]}


def numbers() -> Iterator[Batch]:
    for batch in language():
        yield {**batch, "labels": torch.randn(len(batch["input_ids"]))}


def degrees() -> Iterator[Batch]:
    for batch in language():
        yield {**batch, "labels": torch.full((len(batch["input_ids"]),), -100)}


def several() -> Iterator[Batch]:
    for batch in language():
        yield {**batch, "labels": torch.randint(0, 2, (len(batch["input_ids"]), 3)).float()}


def masks() -> Iterator[Batch]:
    for n in (1, 3):
        labels = torch.randint(0, 3, (n, 64, 64))
        labels[0, : 9 * n] = 255
        yield {"pixel_values": torch.randn(n, 3, 64, 64), "labels": labels}


def tokens(logits: Tensor, batch: Batch, shift: bool) -> Tensor:
    labels = batch["labels"]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def causal(model: Any, batch: Batch) -> Tensor:
    return tokens(model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits, batch, True)


def in_place(model: Any, batch: Batch) -> Tensor:
    return tokens(model(input_ids=batch["input_ids"]).logits, batch, False)


def after_labels(model: Any, batch: Batch) -> Tensor:
    return tokens(model(**batch).logits, batch, False)


def of_rows(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="sum")


def squares(model: Any, batch: Batch) -> Tensor:
    return (model(input_ids=batch["input_ids"]).logits[:, 0] - batch["labels"]).square().sum()


def of_each(model: Any, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="sum") / 3


def own(shift: bool, hides: bool = False, ignored: int = -100) -> Callable[[Any, Batch], Tensor]:
    def total(model: Any, batch: Batch) -> Tensor:
        labels = batch["labels"].masked_fill(batch["labels"] == ignored, -100)
        if hides and "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        return tokens(model(batch["input_ids"])["logits"], {"labels": labels}, shift)

    return total


def of_pixels(model: Any, batch: Batch) -> Tensor:
    logits = F.interpolate(model(batch["pixel_values"]).logits, size=(64, 64), mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, batch["labels"], ignore_index=255, reduction="sum")


def texts_of_sound() -> Iterator[Batch]:
    for n, length in SIZES:
        yield {"input_values": torch.randn(n, 16 * length), "labels": torch.randint(1, 9, (n, length // 2))}


def of_sounds(model: Any, batch: Batch) -> Tensor:
    logits = model(input_values=batch["input_values"]).logits.log_softmax(-1).transpose(0, 1)
    n, length = batch["labels"].shape
    lengths = torch.full((n,), len(logits)), torch.full((n,), length)
    return F.ctc_loss(logits, batch["labels"], *lengths, reduction="mean") * n


def wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (4,), "num_feat_extract_layers": 1}
    width = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=9,
            ctc_loss_reduction="mean",
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            **convolutions,
            **width,
        )
    )


def of_a_reward_model(model: Any) -> Any:
    """A language model from the folder of one whose config has a single label."""
    model.config.num_labels = 1
    return model


def with_labels(model: Any, number: int, kind: str | None = None) -> Any:
    config = copy.deepcopy(bert().config)
    config.num_labels, config.problem_type = number, kind
    return model(config)


@dataclass(frozen=True)
class Case:
    """A model with batches, the sum of the losses of a batch's targets, and how many there are in all."""

    make: Callable[[], nn.Module]
    batches: Callable[[], Iterator[Batch]]
    total: Callable[[Any, Batch], Tensor]
    number: int | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})


SHIFTED = sum(n * (length - 1) for n, length in SIZES)
ALL = sum(n * length for n, length in SIZES)
ROWS = sum(n for n, _ in SIZES)
EVERY = {"target_modules": "all"}

CASES = {
    "a causal model": Case(llama, language, causal, SHIFTED),
    "GPT-2": Case(gpt2, language, causal, SHIFTED),
    "a subclass of a causal model": Case(lambda: MyLlama(llama().config), language, causal, SHIFTED),
    "a module around a causal model": Case(lambda: Around(llama()), language, causal, SHIFTED),
    "a module around a module around one": Case(lambda: Around(Around(gpt2())), language, causal, SHIFTED),
    "a vision-language model": Case(llava, language, causal, SHIFTED),
    "a causal model, padded": Case(llama, padded, causal),
    "a causal model with prompts": Case(lambda: MyLlama(llama().config), prompts, causal),
    "a causal model with one label": Case(llama, one_label, causal, SHIFTED),
    "a causal model with a reward model's config": Case(lambda: of_a_reward_model(llama()), language, causal, SHIFTED),
    "a masked model with one": Case(lambda: of_a_reward_model(BertForMaskedLM(bert().config)), masked, in_place),
    "the text of sounds": Case(wav2vec2, texts_of_sound, of_sounds, ROWS),
    "one of nobody's": Case(lambda: OfItsOwn(True), language, own(True), SHIFTED, EVERY),
    "one of nobody's that does not shift": Case(lambda: OfItsOwn(False), language, own(False), ALL, EVERY),
    "one that hides what the mask hides": Case(
        lambda: OfItsOwn(True, True), visible, own(True, True), SHIFTED - 2, EVERY
    ),
    "one that does not": Case(lambda: OfItsOwn(True), visible, own(True), SHIFTED, EVERY),
    "a seq2seq model": Case(t5, language, after_labels, ALL),
    "a seq2seq model, padded": Case(t5, padded, after_labels),
    "a module around a seq2seq model": Case(lambda: Around(t5()), language, after_labels, ALL),
    "a masked model": Case(lambda: BertForMaskedLM(bert().config), masked, in_place),
    "classes of tokens": Case(lambda: with_labels(BertForTokenClassification, 3), of_tokens, in_place, ALL - ROWS),
    "classes": Case(lambda: with_labels(type(bert()), 3), classes, of_rows, ROWS - 3),
    "classes, a batch without any": Case(lambda: with_labels(type(bert()), 3), classes_or_none, of_rows, 3),
    "numbers": Case(lambda: with_labels(type(bert()), 1), numbers, squares, ROWS),
    "whole numbers, of which one is -100": Case(
        lambda: with_labels(type(bert()), 1, "regression"), degrees, squares, ROWS
    ),
    "several classes": Case(
        lambda: with_labels(type(bert()), 3, "multi_label_classification"), several, of_each, ROWS
    ),
    "pixels": Case(
        lambda: SegformerForSemanticSegmentation(
            SegformerConfig(
                num_labels=3,
                depths=[1, 1, 1, 1],
                hidden_sizes=[8, 8, 8, 8],
                num_attention_heads=[1, 1, 1, 1],
                decoder_hidden_size=8,
                semantic_loss_ignore_index=255,
            )
        ),
        masks,
        of_pixels,
        64 * 64 * 4 - 64 * (9 + 27),
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def expected_of(case: Case, batches: list[Batch]) -> int:
    """How many labels there are, for the cases that do not say."""
    if case.number is not None:
        return case.number
    return sum(
        int((batch["labels"][:, 1:] if case.total is causal else batch["labels"]).ne(-100).sum()) for batch in batches
    )


@every_case
@pytest.mark.parametrize("train_mode", [False, True])
def test_a_batch_counts_as_many_as_its_loss_is_a_mean_over(case: Case, train_mode: bool) -> None:
    base, batches = case.make().eval(), list(case.batches())
    if train_mode and any(isinstance(module, (nn.Dropout, nn.BatchNorm2d)) for module in base.modules()):
        return  # its loss in train mode is another
    model = get_peft_model(copy.deepcopy(base), SamConfig(density=0.05, **case.options))
    selection = select_parameters(model, batches, train_mode=train_mode, progress=False)
    n = expected_of(case, batches)
    assert selection.samples == n
    assert selection.batches == len(batches)
    assert selection.unit == {1: "samples", 2: "tokens", 3: "pixels"}[batches[0]["labels"].ndim] or case.number == ROWS
    some = [batch for batch in batches if bool(batch["labels"].ne(-100).any()) or case.total is squares]
    gradients = reference.mean_loss_gradients(base, selection.indices, some, case.total, n)
    assert_same_up_to_rounding(selection, gradients)


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_model_is_asked_once_and_its_batches_are_left_alone(kind: Any) -> None:
    calls, base = 0, llama()
    batches = [kind(batch) for batch in language()]
    before = copy.deepcopy(batches)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return model(input_ids=batch["input_ids"], labels=batch.pop("labels")).loss

    with from_loader(base, [copy.deepcopy(batch) for batch in batches], None, loss_fn, None) as source:
        found = [source.loss(batch).samples for batch in batches]
    assert found == [n * (length - 1) for n, length in SIZES]
    assert calls == len(SIZES) + 3
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(batches, before, strict=True))


def test_a_count_fn_says_it_itself_and_is_not_second_guessed() -> None:
    model = get_peft_model(llama(), SamConfig(task_type="CAUSAL_LM", density=0.05))
    selection = select_parameters(model, list(language()), count_fn=lambda b: len(b["labels"]), progress=False)
    assert (selection.samples, selection.unit) == (ROWS, "samples")


def some_rows() -> Dataset:
    ids = torch.randint(3, VOCABULARY, (4, 5)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("make", [llama, lambda: MyLlama(llama().config), llava, t5, lambda: OfItsOwn(True)])
def test_a_trainer_s_batches_count_by_their_targets(
    tmp_path: Path, make: Any, accumulation: int, smoothing: float
) -> None:
    base = make().eval()
    # the Trainer's label smoother shifts for the classes that it knows by name
    shift = (
        isinstance(base, OfItsOwn) or type(base) is LlamaForCausalLM or not (smoothing or isinstance(base, type(t5())))
    )
    if smoothing and isinstance(base, (OfItsOwn, type(t5()))):
        return  # without labels the one gives no loss and the other has nothing to decode
    model = get_peft_model(copy.deepcopy(base), SamConfig(density=0.05, **EVERY))
    options = {"gradient_accumulation_steps": accumulation, "label_smoothing_factor": smoothing}
    ids = torch.randint(3, VOCABULARY - 1, (6, 8))
    labels = ids.where(torch.rand(6, 8).cumsum(1) > 0.5 * torch.arange(6)[:, None], -100)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    args = arguments(tmp_path, per_device_train_batch_size=4, **options)
    selection = select_parameters(Trainer(model=model, args=args, train_dataset=data))
    counted = labels[:, 1:] if shift else labels
    assert selection.samples == int((counted != -100).sum())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (some_rows(), "Dataset gives rows, not batches: pass torch.utils.data.DataLoader"),
        (some_rows().with_format("torch"), "Dataset gives rows, not batches"),
        (some_rows().to_iterable_dataset(), "IterableDataset gives rows, not batches"),
        (torch.utils.data.TensorDataset(torch.zeros(3, 2)), "TensorDataset gives rows, not batches"),
        ([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}], "row of a dataset and no batch: it has no tensors"),
        ([{"input_ids": torch.arange(3), "labels": torch.tensor(1)}], "it has labels without a dimension"),
        ([{"input_ids": torch.arange(3), "labels": torch.arange(3)}], "it has input_ids of one dimension"),
        ([(torch.zeros(3), torch.tensor(1))], r"it has tensors of shapes \(3,\), \(\)"),
        (next(language()), r"got a dict. Of one batch, pass \[batch\]"),
        (torch.zeros(3, 4), r"got a Tensor. Of one batch, pass \[batch\]"),
        (7, "expected a DataLoader or a list of batches; got a int"),
    ],
)
def test_rows_in_the_place_of_batches_are_told_apart(loader: Any, message: str) -> None:
    model = get_peft_model(llama(), SamConfig(task_type="CAUSAL_LM", density=0.05))
    with pytest.raises(ValueError, match=message):
        select_parameters(model, loader, progress=False)


@pytest.mark.parametrize("around", [lambda b: {"x": b}, lambda b: (b, None), lambda b: [[b["input_ids"], b["labels"]]]])
def test_rows_are_counted_at_whatever_depth_they_lie(around: Callable[[Batch], Any]) -> None:
    batch = {"input_ids": torch.zeros(7, 3, dtype=torch.int64), "labels": torch.zeros(7, dtype=torch.int64)}
    assert examples_in(around(batch)) == 7


@dataclass
class Rows:
    texts: list[str]
    labels: Tensor


EXAMPLES = {
    "tensors of unequal lengths": [torch.zeros(length) for length in (2, 5, 3)],
    "dicts of tensors of unequal lengths": [{"input_ids": torch.zeros(length)} for length in (2, 5, 3)],
    "lists of unequal lengths": {"input_ids": [[1, 2, 3, 4, 5], [1, 2], [3]]},
    "lists alone": [[1, 2, 3, 4, 5], [1, 2], [3]],
    "objects": [Rows(["one"], torch.tensor(1))] * 3,
    "two encodings": [{"x": torch.zeros(3, 5)}, {"x": torch.zeros(3, 7)}],
    "two encodings and labels": ([{"x": torch.zeros(3, 5)}, {"x": torch.zeros(3, 7)}], torch.zeros(3)),
    "two dicts": ({"x": torch.zeros(3)}, {"y": torch.zeros(3)}),
    "a size beside": {"size": (224, 224), "shape": torch.Size((8, 3)), "x": torch.zeros(3)},
    "a text beside": {"languages": ["en"], "x": torch.zeros(3)},
    "weights of classes beside": (torch.zeros(3, 7), torch.zeros(5)),
    "a dict in front": {"inside": {"x": torch.zeros(3)}, "weights": torch.zeros(5)},
    "dicts": [{"input_ids": torch.zeros(7), "labels": torch.tensor(1)}] * 3,
    "pairs": [(torch.zeros(7), 1)] * 3,
    "texts": ["one", "another", "a third"],
    "a dict of texts and numbers": {"text": ["one", "another", "a third"], "labels": [0, 1, 1]},
    "numbers": {"labels": [0.5, 1.0, 2.0]},
    "arrays": {"x": np.zeros((3, 2))},
    "an object": Rows(["one", "another", "a third"], torch.zeros(3)),
    "two fields": [torch.zeros(3, 7), torch.zeros(3)],
}


@pytest.mark.parametrize("batch", EXAMPLES.values(), ids=EXAMPLES)
def test_examples_are_counted_in_whatever_form_they_come(batch: Any) -> None:
    assert examples_in(batch) == 3


ROUND = SimpleNamespace()
ROUND.itself = ROUND


@pytest.mark.parametrize("batch", [{"none": None, "nothing": []}, [("a", "b", "c"), ("d", "e", "f")][:0], ROUND])
def test_a_batch_that_does_not_say_how_many_it_has_is_warned_of(batch: Any) -> None:
    with pytest.warns(UserWarning, match=r"a \w+, says how many examples it has.* pass count_fn"):
        assert examples_in(batch) == 1


def test_a_batch_of_single_tokens_has_no_targets_and_is_passed_over() -> None:
    def selected(lengths: list[int]) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(llama(), SamConfig(density=0.05))
        rows = [torch.randint(1, VOCABULARY, (2, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
        return select_parameters(model, [{"input_ids": ids, "labels": ids} for ids in rows], progress=False)

    alone, beside = selected([5, 6]), selected([5, 1, 6])
    assert beside.samples == alone.samples
    assert all(torch.equal(beside.indices[name], indices) for name, indices in alone.indices.items())
