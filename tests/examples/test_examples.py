"""The examples run, as a newcomer would run them, on fewer steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.cases import llama
from tests.whole.test_libraries import tokenizer

ROOT = Path(__file__).parents[2]
WARM = ("--head-warmup-steps", "2")


def run(script: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / script), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_selects_trains_reloads_and_prints_its_table(tmp_path: Path) -> None:
    printed = run("01_quickstart.py", "--examples", "64", "--max-steps", "3", *WARM, "--output", str(tmp_path))
    assert "after 2 steps of training the head alone" in printed
    assert "gives the same logits, bit by bit" in printed
    assert printed.splitlines()[-1].startswith("SAM ")
    assert (tmp_path / "selection.png").stat().st_size > 10_000
    assert (tmp_path / "sam" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.extra
def test_the_quickstart_compares_methods_on_a_folder_of_json_lines(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "cola"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"text": f"sentence number {i}", "label": i % 2} for i in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--data-dir", str(tmp_path / "data"), "--dataset", "cola", "--compare", "--max-steps", "1", *WARM]
    printed = run("01_quickstart.py", *options, "--output", str(tmp_path / "out"))
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["SAM", "LoRA", "full"]


@pytest.mark.extra
def test_the_causal_lm_example_generates_and_restores_every_bit(tmp_path: Path) -> None:
    printed = run("02_causal_lm.py", "--base-steps", "3", "--steps", "2", "--output", str(tmp_path))
    assert "merged model writes the same text: True; unmerging restores every bit: True" in printed


@pytest.mark.extra
def test_gradient_masks_load_into_stock_sparse_tuners(tmp_path: Path) -> None:
    printed = run("03_statistics_only.py", "--examples", "32", "--steps", "1", "--output", str(tmp_path))
    rows = {line[:26].strip(): line[26:].split() for line in printed.splitlines()[-4:]}
    assert rows["SHiRA, random"][0] == rows["SHiRA, gradient"][0]
    assert rows["Super-Tuning, magnitude"][0] == rows["Super-Tuning, gradient"][0]


@pytest.mark.slow
def test_the_language_model_example_trains_by_trl_and_gives_the_base_its_bits_back(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--output", str(tmp_path), "--compare", "--steps", "2"]
    printed = run("04_language_model.py", *options, "--length", "16", "--test-blocks", "4", "--selection-batches", "1")
    assert "merged, it writes the same text: True" in printed
    assert "every bit of the base is as before: True" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[-5:-1]}
    assert rows["SAM"][0] == rows["LoRA"][0] == "992"
    assert rows["SAM"][1] != rows["before"][0]
    assert (tmp_path / "sam" / "adapter_model.safetensors").exists()
    assert (tmp_path / "selection.safetensors").exists()
