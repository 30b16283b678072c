"""The whole way over a hub, with the real client against a loopback server."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from transformers import Trainer

from peft_sam import SamConfig, select_parameters
from peft_sam.report import card, report
from tests.selecting.test_select import arguments, text_data
from tests.shared.cases import NETS, bert

BATCH = NETS[0].batch(3)


def selected(base: Any) -> Any:
    model = get_peft_model(base, SamConfig(task_type="SEQ_CLS", density=0.05))
    select_parameters(model, [BATCH], progress=False)
    for delta in model.base_model.sparse_deltas().values():
        delta.values.data.normal_()
    return model.eval()


def test_a_pushed_adapter_loads_by_its_repository_name(hub: Any, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    base = type(bert()).from_pretrained(tmp_path / "base")
    fresh = copy.deepcopy(base)
    model = selected(base)
    model.push_to_hub("me/my-adapter")
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md", "selection.png"}
    assert files <= set(hub.files("me/my-adapter"))
    expected = model(**BATCH).logits
    assert torch.equal(PeftModel.from_pretrained(fresh, "me/my-adapter")(**BATCH).logits, expected)
    assert torch.equal(
        AutoPeftModelForSequenceClassification.from_pretrained("me/my-adapter")(**BATCH).logits, expected
    )


def test_the_pushed_card_says_what_was_selected_and_how_to_load_it(hub: Any) -> None:
    model = selected(bert())
    model.peft_config["default"].base_model_name_or_path = "some/base"
    model.push_to_hub("me/my-adapter")
    model.push_to_hub("me/my-adapter")
    text = hub.files("me/my-adapter")["README.md"].decode()
    chosen = model.peft_config["default"].selection
    assert text.count("## SAM sparse adapter") == 1
    for expected in (
        "`some/base`",
        f"{chosen['k']:,} of {chosen['m']:,} candidate entries",
        "| density | 0.05 |",
        "| score | `sam` |",
        "| budget | `global` |",
        "3 samples in 1 batches",
        "import peft_sam",
        "AutoPeftModelForSequenceClassification.from_pretrained",
        "library_name: peft",
        "- sam-sparse",
        "![Selected entries by layer and module type](selection.png)",
    ):
        assert expected in text, expected
    assert hub.files("me/my-adapter")["selection.png"].startswith(b"\x89PNG")
    rows = [row for row in text.splitlines() if row.endswith(" of 2 |") or row.endswith(" of 1 |")]
    assert sum(int(row.split("|")[2].replace(",", "")) for row in rows) == chosen["k"]
    assert len(rows) == 7


def test_without_matplotlib_the_card_has_the_table_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card._png.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    selected(bert()).save_pretrained(tmp_path)
    assert not (tmp_path / "selection.png").exists()
    text = (tmp_path / "README.md").read_text()
    assert "selection.png" not in text
    assert "| `attention.self.query` |" in text


def test_a_selection_is_drawn_once_however_often_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(card, "draw", lambda counts, title: (drawn.append(title), report.draw(counts, title))[1])
    card._png.cache_clear()
    model = selected(bert())
    for step in (1, 2, 3):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    pictures = {path.read_bytes() for path in tmp_path.glob("*/selection.png")}
    assert (len(drawn), len(pictures)) == (1, 1)
    model.add_adapter("other", SamConfig(score="random", density=0.3))
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "selection.png").read_bytes() in pictures  # of "default", whose files lie beside it
    model.set_adapter("other")
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "selection.png").read_bytes() not in pictures
    assert len(drawn) == 2


def test_an_adapter_is_saved_whatever_happens_to_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no fonts")

    card._png.cache_clear()
    monkeypatch.setattr(card, "draw", fails)
    with pytest.warns(UserWarning, match="no picture of the selection in the model card: .*no fonts"):
        selected(bert()).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert "selection.png" not in (tmp_path / "README.md").read_text()


def test_a_card_that_a_person_extended_keeps_their_words(tmp_path: Path) -> None:
    model = selected(bert())
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## My notes\n\nTrained on a rainy day.\n")
    model.save_pretrained(tmp_path)
    assert "Trained on a rainy day." in path.read_text()
    assert path.read_text().count("## SAM sparse adapter") == 1


def test_another_process_loads_the_adapter_after_the_import(hub: Any, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    model = selected(type(bert()).from_pretrained(tmp_path / "base"))
    model.push_to_hub("me/my-adapter")
    code = (
        "import peft_sam\n"
        "from peft import AutoPeftModelForSequenceClassification as Auto\n"
        "model = Auto.from_pretrained('me/my-adapter')\n"
        "print(sum(len(d.values) for d in model.base_model.sparse_deltas().values()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=hub.env(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == model.peft_config["default"].selection["k"]
    assert HfApi().file_exists("me/my-adapter", "adapter_model.safetensors")


def test_a_trainer_pushes_the_adapter_that_it_trained(hub: Any, tmp_path: Path) -> None:
    base = bert()
    fresh = copy.deepcopy(base)
    model: Any = get_peft_model(base, SamConfig(task_type="SEQ_CLS", density=0.05))
    args = arguments(
        tmp_path / "run",
        learning_rate=1e-2,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="me/trained",
        hub_strategy="end",
    )
    trainer = Trainer(model=model, args=args, train_dataset=text_data(8))
    select_parameters(trainer)
    trainer.train()
    trainer.push_to_hub()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("me/trained"))
    loaded: Any = PeftModel.from_pretrained(fresh, "me/trained")
    assert torch.equal(loaded.eval()(**BATCH).logits, model.eval()(**BATCH).logits)
