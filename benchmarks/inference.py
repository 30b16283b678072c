"""What an active, unmerged adapter costs in inference: SAM and LoRA beside the bare model, in one run.

    python benchmarks/inference.py       # --quick for MiniLM only

"512": one forward pass over a sequence of 512 tokens. "decode": one token after 64 others, with their cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch

METHODS = {"base": "full", "SAM": "SAM", "SAM, random support": "SAM, random support", "LoRA r=8": "LoRA r=8"}
CACHED = 64


def forward(model: Any, tokens: int) -> Callable[[], None]:
    """A pass over so many tokens."""
    ids = torch.randint(5, 5000, (1, tokens), device=model.device)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids)

    return run


def decode(model: Any) -> Callable[[], None]:
    """One more token after those in the cache."""
    ids = torch.randint(5, 5000, (1, CACHED + 1), device=model.device)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :CACHED], use_cache=True).past_key_values

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids[:, CACHED:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run


def measure(shape: str, what: str, repetitions: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Ratios to the bare model."""
    steps = {}
    for name, method in METHODS.items():
        model = common.make(method, shape, dtype=dtype, device=device).eval()
        steps[name] = decode(model) if what == "decode" else forward(model, int(what))
    seconds = common.interleaved(steps, repetitions, f"{shape}, {what}")
    return {
        "shape": shape,
        "what": what,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": common.medians(seconds),
        "ratio": common.ratios(seconds, "base"),
    }


def main() -> None:
    """Measure, print, write."""
    args = common.arguments(__doc__.partition("\n")[0], repetitions=40)
    cases = [(common.MINILM, "512")]
    if not args.quick:
        llama = common.LLAMA if args.device == "cpu" else common.LARGE_LLAMA
        cases += [(common.ROBERTA, "512"), (llama, "512"), (llama, "decode")]
    results = []
    for shape, what in cases:
        results.append(measure(shape, what, args.repetitions, getattr(torch, args.dtype), args.device))
        figures = ", ".join(f"{name} {ratio:.2f}" for name, ratio in results[-1]["ratio"].items())
        print(f"{shape}, {what}: {figures}", flush=True)
    if not args.quick:
        common.write("inference", results, args)


if __name__ == "__main__":
    main()
