"""The whole way over a hub, with the real client against a loopback server."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model

from peft_sam import SamConfig, select_parameters
from tests.cases import NETS, bert

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
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.files("me/my-adapter"))
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
    card = hub.files("me/my-adapter")["README.md"].decode()
    chosen = model.peft_config["default"].selection
    assert card.count("## SAM sparse adapter") == 1
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
    ):
        assert expected in card, expected


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
