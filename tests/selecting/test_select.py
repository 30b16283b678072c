"""Laws of `select_parameters`, from a loader and from a Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from peft_sam import FewerEntriesWarning, PendingAdapterError, SamConfig, Selection, select_parameters
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import deltas_of
from peft_sam.tuner import candidates
from tests.shared import reference
from tests.shared.cases import NETS, VOCABULARY, NetCase, bert, gpt2, llama, names
from tests.shared.device import DEVICE


def adapt(case: NetCase, **options: Any) -> tuple[Any, nn.Module]:
    base = case.make()
    untouched = copy.deepcopy(base)
    config = SamConfig(task_type=case.task_type, **{"density": 0.02, **case.options, **options})
    return get_peft_model(base, config), untouched


def supports(selection: Selection) -> dict[str, list[int]]:
    return {name: indices.tolist() for name, indices in selection.indices.items()}


def assert_same_up_to_rounding(selection: Selection, gradients: dict[str, Tensor]) -> None:
    """Equal to sorting g², except for entries whose scores agree with the threshold to 1e-5."""
    expected = reference.largest({n: gradients[n].double() ** 2 for n in selection.indices}, selection.k)
    for name, found in supports(selection).items():
        for position in set(found) ^ set(expected[name]):
            score = float(gradients[name].flatten()[position].abs())
            assert score == pytest.approx(selection.threshold, rel=1e-4), (name, position)


@pytest.mark.on_device
@pytest.mark.parametrize("case", NETS, ids=names)
def test_the_largest_gradients_of_the_mean_loss_are_selected(case: NetCase) -> None:
    model, base = adapt(case)
    batches = [case.batch(n) for n in (4, 4, 1)]
    selection = select_parameters(model, batches, progress=False)

    def total(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"]
        tokens = labels[:, 1:] if case.task_type == "CAUSAL_LM" else labels
        return model(**batch).loss * tokens.numel()

    n = sum(
        batch["labels"][:, 1:].numel() if case.task_type == "CAUSAL_LM" else batch["labels"].numel()
        for batch in batches
    )
    assert selection.samples == n
    gradients = reference.mean_loss_gradients(base, selection.indices, batches, total, n)
    assert selection.k == reference.budget(0.02, selection.m)
    assert_same_up_to_rounding(selection, gradients)
    for name, delta in model.base_model.sparse_deltas().items():
        assert delta.indices.tolist() == supports(selection)[name]
        assert not bool(delta.values.any())


@pytest.mark.on_device
@pytest.mark.parametrize("case", NETS, ids=names)
def test_a_selected_adapter_starts_as_the_base_model_and_then_learns(case: NetCase) -> None:
    model, base = adapt(case, density=0.1)
    batch = case.batch(4)
    select_parameters(model, [batch], progress=False)
    model.eval()
    base.eval()
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "sam_sparse_" in n], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unwrapped = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p
        for n, p in model.named_parameters()
        if "sam_sparse_" not in n and "modules_to_save" not in n
    }
    for name, parameter in base.named_parameters():
        original = unwrapped.get(name, unwrapped.get(name.replace("classifier", "classifier.original_module")))
        assert torch.equal(parameter, original), name


def text_data(n: int = 13, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (n, 7), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] > VOCABULARY // 2).long().tolist()})


def language_data(n: int = 9) -> Dataset:
    rows = [torch.randint(1, VOCABULARY, (3 + i % 5,)).tolist() for i in range(n)]
    padded = [{"input_ids": r + [0] * (8 - len(r)), "labels": r + [-100] * (8 - len(r))} for r in rows]
    return Dataset.from_list(padded)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": DEVICE.type == "cpu",  # a Trainer moves what it trains by itself
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **options})


def test_a_trainer_gives_the_same_selection_as_its_batches_in_a_loader(tmp_path: Path) -> None:
    base = bert()
    make = lambda: get_peft_model(copy.deepcopy(base), SamConfig(task_type="SEQ_CLS", density=0.05))  # noqa: E731
    torch.manual_seed(1)
    one = make()
    trainer = Trainer(model=one, args=arguments(tmp_path), train_dataset=text_data())
    torch.manual_seed(1)
    two = make()
    loader = DataLoader(text_data().with_format("torch"), batch_size=5)
    first, second = select_parameters(trainer), select_parameters(two, loader, progress=False)
    assert first.samples == second.samples == 13
    assert supports(first) == supports(second)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_language_models_are_weighted_by_target_tokens(
    tmp_path: Path, make: Any, accumulation: int, smoothing: float
) -> None:
    base = make()
    model = get_peft_model(copy.deepcopy(base), SamConfig(task_type="CAUSAL_LM", density=0.05))
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, label_smoothing_factor=smoothing)
    data = language_data()
    selection = select_parameters(Trainer(model=model, args=args, train_dataset=data))
    tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in data)
    assert selection.samples == tokens

    def total(model: nn.Module, row: dict[str, list[int]]) -> Tensor:
        labels = torch.tensor(row["labels"][1:])
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        return nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

    gradients = reference.mean_loss_gradients(base, selection.indices, data, total, tokens)
    assert_same_up_to_rounding(selection, gradients)


def test_a_trainer_s_own_loss_is_used(tmp_path: Path) -> None:
    class Backwards(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            logits = model(input_ids=inputs["input_ids"]).logits
            return (logits[:, 0] ** 2).mean()

    base = bert()
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), SamConfig(task_type="SEQ_CLS", density=0.05))
    selection = select_parameters(Backwards(model=model, args=arguments(tmp_path), train_dataset=text_data()))

    def total(model: nn.Module, row: dict[str, Any]) -> Tensor:
        return (model(input_ids=torch.tensor([row["input_ids"]])).logits[:, 0] ** 2).sum()

    gradients = reference.mean_loss_gradients(base, selection.indices, text_data(), total, 13)
    assert_same_up_to_rounding(selection, gradients)


def test_selecting_before_training_does_not_change_the_order_of_the_data(tmp_path: Path) -> None:
    base, seen = bert(), []

    class Watching(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            seen.append(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, *args)

    def order(**options: Any) -> list[list[int]]:
        seen.clear()
        model = get_peft_model(copy.deepcopy(base), SamConfig(task_type="SEQ_CLS", density=0.05, **options))
        trainer = Watching(model=model, args=arguments(tmp_path), train_dataset=text_data())
        if not options:
            select_parameters(trainer, max_batches=2)
        trainer.train()
        return list(seen)

    assert order() == order(score="random")


def test_an_accelerator_and_an_unprepared_loader_give_the_same_selection() -> None:
    model, _ = adapt(NETS[0])
    other = copy.deepcopy(model)
    loader = DataLoader(text_data().with_format("torch"), batch_size=4)
    one = select_parameters(model, loader, accelerator=Accelerator(cpu=True), progress=False)
    two = select_parameters(other, loader, progress=False)
    assert supports(one) == supports(two)


def test_max_batches_stops_the_pass() -> None:
    model, _ = adapt(NETS[0])
    selection = select_parameters(model, [NETS[0].batch(3) for _ in range(5)], max_batches=2, progress=False)
    assert (selection.batches, selection.samples) == (2, 6)


def test_a_saved_selection_replaces_the_pass(tmp_path: Path) -> None:
    model, _ = adapt(NETS[0])
    other = copy.deepcopy(model)
    selection = select_parameters(model, [NETS[0].batch(3)], progress=False)
    selection.save(tmp_path / "selection.safetensors")
    select_parameters(other, selection=Selection.load(tmp_path / "selection.safetensors"))
    for name, delta in other.base_model.sparse_deltas().items():
        assert torch.equal(delta.indices, model.base_model.sparse_deltas()[name].indices)


def test_a_selection_for_other_targets_names_the_first_difference() -> None:
    model, _ = adapt(NETS[0])
    selection = select_parameters(model, [NETS[0].batch(3)], progress=False)
    other, _ = adapt(NETS[0], target_modules=["query"])
    with pytest.raises(ValueError, match=r"'bert\.encoder.*' is no candidate of this adapter"):
        select_parameters(other, selection=selection)
    with pytest.raises(PendingAdapterError):
        other.train()(**NETS[0].batch(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"indices": [0, 10**6]}, "outside the parameter"),
        ({"indices": [3, 1]}, "must be sorted"),
        ({"score": "my mask"}, "'my mask'; a word"),
        ({"unit": "target tokens"}, "'target tokens'; a word"),
        ({"threshold": float("nan")}, "nan; a finite number"),
        ({"threshold": float("inf")}, "inf; a finite number"),
    ],
)
def test_a_selection_that_could_not_be_saved_changes_nothing(wrong: dict[str, Any], message: str) -> None:
    model, _ = adapt(NETS[0])
    selection = select_parameters(copy.deepcopy(model), [NETS[0].batch(3)], progress=False)
    damaged = copy.deepcopy(selection)
    if "indices" in wrong:
        damaged.indices[[*damaged.shapes][-1]] = torch.tensor(wrong["indices"])
    else:
        setattr(damaged, *next(iter(wrong.items())))
    with pytest.raises(ValueError, match=message):
        select_parameters(model, selection=damaged)
    assert all(delta.pending for delta in deltas_of(model, "default").values())
    select_parameters(model, selection=selection)


def test_shapes_are_shapes_whatever_they_are_given_as(tmp_path: Path) -> None:
    model, _ = adapt(NETS[0])
    found = select_parameters(copy.deepcopy(model), [NETS[0].batch(3)], progress=False)
    fields = {**vars(found), "shapes": {name: tuple(shape) for name, shape in found.shapes.items()}}
    select_parameters(model, selection=Selection(**fields))
    assert model.peft_config["default"].selection["m"] == found.m


def test_a_number_of_steps_that_is_numpy_s_is_saved(tmp_path: Path) -> None:
    model, _ = adapt(NETS[0])
    batches = [NETS[0].batch(3)]
    select_parameters(model, batches, head_warmup_steps=np.int64(1), progress=False)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)


def test_a_data_free_score_selects_inside_get_peft_model() -> None:
    for score in ("magnitude", "random"):
        model, base = adapt(NETS[0], score=score)
        found = {n: d.indices.tolist() for n, d in model.base_model.sparse_deltas().items()}
        assert sum(map(len, found.values())) == model.peft_config["default"].selection["k"]
        if score == "magnitude":
            parameters = dict(base.named_parameters())
            from peft_sam.tuner.candidates import candidates_of

            pending, _ = adapt(NETS[0])
            weights = {n: parameters[n].detach().abs() for n in candidates_of(pending, "default")}
            expected = reference.largest(weights, sum(map(len, found.values())))
            assert found == {n: i for n, i in expected.items() if i}


@pytest.mark.parametrize("where", ["set_support", "fingerprints"])
def test_an_interruption_while_supports_are_given_leaves_the_adapter_pending(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = adapt(NETS[0])
    other, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=1.0)
    batch, calls = NETS[0].batch(4), 0
    given = SamLayer.set_support

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if where == "fingerprints" or calls == 3:
            raise KeyboardInterrupt
        return given(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(*((SamLayer, where) if where == "set_support" else (candidates, where)), stops)
        with pytest.raises(KeyboardInterrupt):
            select_parameters(model, [batch], progress=False)
    assert all(delta.pending for delta in deltas_of(model, "default").values())
    assert model.peft_config["default"].selection is None
    one, two = (select_parameters(of, [batch], progress=False) for of in (model, other))
    assert supports(one) == supports(two)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert all(id(delta.values) in held for delta in deltas_of(model, "default").values())


def test_choosing_twice_is_refused() -> None:
    model, _ = adapt(NETS[0])
    select_parameters(model, [NETS[0].batch(3)], progress=False)
    with pytest.raises(ValueError, match="already selected"):
        select_parameters(model, [NETS[0].batch(3)], progress=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: select_parameters(m), "this score needs data"),
        (lambda m, b: select_parameters(m, []), "no samples in them"),
        (lambda m, b: select_parameters(m, [(1, 2)]), "not a dict of the model's arguments: pass loss_fn"),
        (lambda m, b: select_parameters(m, [{"input_ids": b["input_ids"]}]), "no loss .* put 'labels' in the batches"),
        (lambda m, b: select_parameters(m, [b], loss_fn=lambda model, batch: 3.0), "as a tensor; got float"),
        (lambda m, b: select_parameters(m, [b], adapter_name="other"), "no SAM adapter 'other'"),
        (lambda m, b: select_parameters(m, [b], max_batches=0), "at least 1"),
        (lambda m, b: select_parameters(m.get_base_model().bert, [b]), "without adapters"),
    ],
)
def test_a_wrong_call_says_what_to_pass_and_changes_nothing(call: Any, message: str) -> None:
    model, _ = adapt(NETS[0])
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        call(model, NETS[0].batch(3))
    assert all(
        flag == p.requires_grad and torch.equal(bits, p)
        for (flag, bits), p in zip(before.values(), model.parameters(), strict=True)
    )
    with pytest.raises(PendingAdapterError):
        model.train()(**NETS[0].batch(2))


class Reached(nn.Module):
    """A table of which the data touch some rows, and a branch that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.unused, self.out = nn.Embedding(200, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x).mean(1))


ROWS = [(torch.randint(0, 12, (8, 5)), torch.randint(0, 2, (8,))) for _ in range(2)]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("options", [{}, {"budget": "tensor"}, {"score": "fisher"}, {"score": "movement"}])
@pytest.mark.parametrize("memory_budget", [None, 1000])
def test_every_selected_entry_moves_in_training_and_fewer_than_asked_for_is_said(
    options: dict[str, Any], memory_budget: int | None
) -> None:
    model = get_peft_model(Reached(), SamConfig(target_modules="all", density=0.5, **options))
    if options.get("score") == "movement":
        memory_budget = None
    with pytest.warns(FewerEntriesWarning, match=r"asks for 415 entries, and only \d+ .* have a gradient"):
        selection = select_parameters(
            model, ROWS, loss_fn=cross_entropy, max_batches=2, memory_budget=memory_budget, progress=False
        )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batch in ROWS:
        cross_entropy(model, batch).backward()
    optimizer.step()
    deltas = model.base_model.sparse_deltas()
    assert sum(int(delta.values.count_nonzero()) for delta in deltas.values()) == selection.k > 0
    assert "unused.weight" not in deltas


def test_candidates_that_no_gradient_reaches_are_an_error_and_the_adapter_stays_pending() -> None:
    for options in ({}, {"score": "movement"}):
        model = get_peft_model(Reached(), SamConfig(target_modules=["unused"], density=0.5, **options))
        with pytest.raises(ValueError, match=r"does not depend on|only 0 candidates|are zero"):
            select_parameters(model, ROWS, loss_fn=cross_entropy, max_batches=2, progress=False)
        assert not model.base_model.sparse_deltas()


def test_a_base_of_nan_selects_nothing_by_magnitude() -> None:
    base = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        base[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="nothing would be trained"):
        get_peft_model(base, SamConfig(target_modules=["0"], density=0.5, score="magnitude"))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -8.0])
def test_a_count_that_is_no_number_of_samples_is_refused(number: float) -> None:
    model, _ = adapt(NETS[0])
    with pytest.raises(ValueError, match=f"counts as {number} samples"):
        select_parameters(model, [NETS[0].batch(2)], count_fn=lambda _: number, progress=False)


def test_the_pass_runs_in_train_mode_when_asked_although_the_adapter_is_pending() -> None:
    model, _ = adapt(NETS[0])
    select_parameters(model, [NETS[0].batch(3)], train_mode=True, progress=False)
    assert model.base_model.sparse_deltas()


def test_the_bar_is_on_standard_error_and_can_be_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = adapt(NETS[0])
    other = copy.deepcopy(model)
    select_parameters(model, [NETS[0].batch(3)])
    assert "Gradient statistics" in capsys.readouterr().err
    select_parameters(other, [NETS[0].batch(3)], progress=False)
    assert capsys.readouterr().err == ""
