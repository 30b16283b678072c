"""How much of what an adapter has learnt is lost where it is merged into weights in bfloat16 or in 4 bits.

    python examples/04_language_model.py                                   # trains output/language_model/sam
    python benchmarks/rounding.py output/language_model/sam                # --blocks 8 for a quick look

Mean loss a token on held-out topics of Python's documentation: of the base as it is stored, with the adapter unmerged,
and merged. "lost" is the share of unmerged's gain over the base that merging takes away. A merged export and a
checkpoint patch have the bits of the merged weights. "at random" rounds θ + Δ up or down with the probability that
leaves its mean right, in place of to the nearest: what small Δ that act together would need.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import language
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from peft_sam import merged, rounding_report

LENGTH, BATCH = 64, 8
# How the base is stored → what `from_pretrained` is told.
STORED: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "nf4": {
        "dtype": torch.float32,
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    },
}


def held_out(base: str, blocks: int) -> Tensor:
    """Blocks of token numbers, (blocks, LENGTH)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [number for text in language.documentation()["test"]["text"] for number in tokenizer(text)["input_ids"]]
    whole = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:blocks]
    return whole[chosen]


@torch.no_grad()
def loss(model: nn.Module, blocks: Tensor) -> float:
    """Mean over tokens."""
    model.eval()
    return sum(float(model(input_ids=of, labels=of).loss) * len(of) for of in blocks.split(BATCH)) / len(blocks)


def at_random(exact: Tensor, generator: torch.Generator) -> Tensor:
    """float32 in bfloat16, up or down by chance, its mean kept: the bits cut off carry over as often as they weigh."""
    noise = torch.randint(2**16, exact.shape, generator=generator, dtype=torch.int32)
    return ((exact.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


@torch.no_grad()
def rounded_at_random(model: Any, blocks: Tensor, repetitions: int = 3) -> list[float]:
    """The loss with bfloat16 weights that hold θ + Δ rounded at random; the model is as before."""
    deltas, own = model.base_model.sparse_deltas(), dict(model.unload().named_parameters())
    before = {name: own[name].detach().clone() for name in deltas}
    found = []
    for seed in range(repetitions):
        generator = torch.Generator().manual_seed(seed)
        for name, delta in deltas.items():
            exact = before[name].take(delta.indices).float() + delta.values.detach()
            own[name].copy_(before[name]).put_(delta.indices, at_random(exact, generator))
        found.append(loss(model.get_base_model(), blocks))
    return found


def measure(adapter: str, blocks: int) -> Iterator[dict[str, Any]]:
    """A row for each way in which the base can be stored."""
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    tokens = held_out(base, blocks)
    for stored, options in STORED.items():
        start = time.perf_counter()
        bare = AutoModelForCausalLM.from_pretrained(base, **options)
        model: Any = PeftModel.from_pretrained(bare, adapter)  # before bitsandbytes packs weights anew, for a CPU
        with model.disable_adapter():
            found: dict[str, Any] = {"stored": stored, "base": loss(model, tokens)}
        found["unmerged"] = loss(model, tokens)
        gain = found["base"] - found["unmerged"]
        report = rounding_report(model)
        found |= {"entries": report.entries, "unmoved": report.unmoved, "delta_lost": report.error}
        with merged(model):
            found["merged"] = loss(model, tokens)
        found["lost"] = (found["merged"] - found["unmerged"]) / gain
        if stored == "bfloat16":
            found["at_random"] = rounded_at_random(model, tokens)
        yield {**found, "blocks": len(tokens), "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", help="folder of a SAM adapter of a causal language model")
    parser.add_argument("--blocks", type=int, default=64, help=f"blocks of {LENGTH} tokens that a loss is a mean over")
    parser.add_argument("--out", type=Path, help="a file for the results")
    args = parser.parse_args()
    results = []
    for row in measure(args.adapter, args.blocks):
        results.append(row)
        print(json.dumps(row), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({"environment": common.environment("cpu"), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
