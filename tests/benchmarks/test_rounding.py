"""Laws of the measurement of what merging loses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_sam import SamConfig

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_a_number_rounded_at_random_is_one_of_its_neighbours_and_right_in_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from rounding import at_random

    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([1.0, -1.0, 0.0, 1 + 2**-9, -3 - 2**-8, 0.1], dtype=torch.float32)
    found = at_random(exact.repeat(20_000, 1), generator).float()
    below = (exact.view(torch.int32) & -(2**16)).view(torch.float32)
    above = ((below.view(torch.int32)) + 2**16).view(torch.float32)
    assert bool(((found == below) | (found == above)).all())
    assert torch.equal(found[:, :3], exact[:3].expand(20_000, 3))  # what bfloat16 holds stays
    torch.testing.assert_close(found.mean(0), exact, rtol=3e-5, atol=0)


@pytest.mark.slow
@pytest.mark.extra  # half a minute
def test_each_way_of_storing_has_the_losses_of_base_unmerged_and_merged(llama: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer, width = AutoTokenizer.from_pretrained(llama), {"hidden_size": 64, "intermediate_size": 64}  # for nf4
    shape = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2, **width)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = SamConfig(task_type="CAUSAL_LM", score="random", density=0.1, init_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "sam")
    command = [sys.executable, "-W", "ignore", FOLDER / "rounding.py", tmp_path / "sam", "--blocks", "2"]
    subprocess.run([*command, "--out", tmp_path / "found.json"], check=True, capture_output=True)
    rows = {row["stored"]: row for row in json.loads((tmp_path / "found.json").read_text())["results"]}
    assert list(rows) == ["float32", "bfloat16", "nf4"]
    assert rows["float32"]["merged"] == pytest.approx(rows["float32"]["unmerged"], rel=1e-5)
    assert len(rows["bfloat16"]["at_random"]) == 3
    for row in rows.values():
        gain = row["base"] - row["unmerged"]
        assert row["lost"] == pytest.approx((row["merged"] - row["unmerged"]) / gain)
