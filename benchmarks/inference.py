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
# Token numbers are below this.
TOKENS = 1000


def forward(model: Any, tokens: int, batch: int = 1, compiling: dict[str, Any] | None = None) -> Callable[[], None]:
    """A pass over so many tokens, without a cache; compiled with such options."""
    ids = torch.randint(5, TOKENS, (batch, tokens), device=model.device)
    called = model if compiling is None else torch.compile(model, **compiling)

    @torch.no_grad()
    def run() -> None:
        called(input_ids=ids, use_cache=False)

    return run


def decode(model: Any, batch: int = 1) -> Callable[[], None]:
    """One more token after those in the cache."""
    ids = torch.randint(5, TOKENS, (batch, CACHED + 1), device=model.device)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :CACHED], use_cache=True).past_key_values

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids[:, CACHED:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run


def measure(
    shape: str,
    what: str,
    repetitions: int,
    dtype: torch.dtype,
    device: str,
    batch: int = 1,
    compiling: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Ratios to the bare model.

    Args:
        what: "decode", or a number of tokens.
        compiling: options of torch.compile, of a pass over tokens; None for eager mode.
    """
    steps = {}
    for name, method in METHODS.items():
        model = common.make(method, shape, dtype=dtype, device=device).eval()
        steps[name] = decode(model, batch) if what == "decode" else forward(model, int(what), batch, compiling)
    seconds = common.interleaved(steps, repetitions, f"{shape}, {what}")
    return {
        "shape": shape,
        "what": what,
        "batch": batch,
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
        cases += [(common.SMOLLM, "decode")] if args.device == "cpu" else []
    results = []
    for shape, what in cases:
        results.append(measure(shape, what, args.repetitions, getattr(torch, args.dtype), args.device))
        figures = ", ".join(f"{name} {ratio:.2f}" for name, ratio in results[-1]["ratio"].items())
        print(f"{shape}, {what}: {figures}", flush=True)
    if not args.quick:
        common.write("inference", results, args)


if __name__ == "__main__":
    main()
