"""All that is to be known of a device, in one command: the most important first, a JSON line as soon as it is measured.

    python benchmarks/device.py --minutes 8 --out device.jsonl     # --tiny: all of it in small, to see that it runs

Training step, decoding, the pass over the data, the threshold, an optimizer's step, merging and switching, compiled
inference, and the paper's runner with many runs at a time. A line says what was measured, beside what, and the aims
with what was found; the first says where. What no time is left for has a line of its own, and so has an error. Models
are blocks of Llama-3.2-1B and Llama-3-8B, eight of them or as many as the memory holds `COPIES` times.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import calibrate
import common
import gradient_pass
import inference
import psutil
import step
import switch
import torch

# name → hidden size, intermediate size, blocks, heads, heads for a key
BLOCKS = {"Llama-3.2-1B": (2048, 8192, 16, 32, 4), "Llama-3-8B": (4096, 14336, 32, 32, 4)}
VOCABULARY = 1000
# So many copies of a model's weights fit the memory: one for each method, and what a step adds.
COPIES = 20
# More blocks than this tell no more.
MOST_BLOCKS = 8
# The largest ratios that are aimed at.
AIMS = {
    "step": {"SAM / floor": 1.05, "SAM / LoRA r=8": 0.85, "peak of SAM / LoRA r=16": 0.75},
    "decode": {"SAM / base": 1.05},
    "pass": {"pass / plain": 1.05},
}


class Sizes(NamedTuple):
    """How large everything is.

    small, large: names of the two models in `common.MODELS`.
    batches: of the training step, (sequences, tokens).
    scores: of the threshold. whole: the shape whose k entries an optimizer steps. repetitions: of everything.
    """

    small: str
    large: str
    batches: tuple[tuple[int, int], ...]
    scores: int
    whole: tuple[int, int, int, int, int]
    repetitions: int
    dtype: torch.dtype
    compiling: dict[str, Any]


def numbers(hidden: int, intermediate: int, heads: int, shared: int) -> list[int]:
    """The entries of each linear layer of a block."""
    return [hidden * hidden, hidden * hidden // shared] * 2 + [hidden * intermediate] * 3


def sizes_for(device: str, tiny: bool) -> Sizes:
    """What fits the memory; models enter `common.MODELS`."""
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else psutil.virtual_memory().total
    names = []
    for name, (hidden, intermediate, blocks, heads, shared) in BLOCKS.items():
        if tiny:
            hidden, intermediate, blocks, heads = hidden // 32, intermediate // 32, 2, 4
        else:
            room = total // (COPIES * 2 * sum(numbers(hidden, intermediate, heads, shared)))
            blocks = max(1, min(blocks, MOST_BLOCKS, room))
        names.append(f"{name}, {blocks} blocks")
        common.MODELS[names[-1]] = partial(common.llama, hidden, intermediate, blocks, heads, VOCABULARY, shared)
    if tiny:
        return Sizes(*names, ((2, 16),), 10**5, (64, 128, 2, 4, 4), 1, torch.bfloat16, {"backend": "aot_eager"})
    compiling = {"mode": "reduce-overhead"} if device == "cuda" else {}
    return Sizes(*names, ((4, 1024), (1, 4096)), 10**9, BLOCKS["Llama-3-8B"], 10, torch.bfloat16, compiling)


def rows(sizes: Sizes, device: str, texts: Path | None) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Name, on what, and the measurement, the most important first."""
    of, times = sizes, sizes.repetitions
    models, first = (of.small, of.large), of.batches[0]
    for model in models:
        yield "step", f"{model}, {first}", partial(step.measure, model, *first, times, of.dtype, device)
    for model in models:
        for batch in (1, 32):
            made = partial(inference.measure, model, "decode", times, of.dtype, device, batch)
            yield "decode", f"{model}, batch {batch}", made
    for model in models:
        yield "pass", model, partial(gradient_pass.measure_pass, model, times, device, of.dtype, first)
    found = partial(gradient_pass.measure_threshold, min(times, 3), device, of.scores, ("topk",))
    yield "threshold", f"{of.scores:,} scores", found
    yield "optimizer", "a whole Llama-3-8B", partial(measure_optimizer, of.whole, times, device)
    yield "calibration", device, partial(calibrate.measure, device, times == 1, times)
    for model in models:
        yield "switch", model, partial(switch.measure, model, times, of.dtype, device)
    for model in models[:1] if times == 1 else models:  # compiling takes long
        for batch in (1,) if times == 1 else (1, 32):
            made = partial(inference.measure, model, "1", times, of.dtype, device, batch, of.compiling)
            yield "one token, compiled", f"{model}, batch {batch}", made
    for model in models:
        for size in of.batches[1:]:
            yield "step", f"{model}, {size}", partial(step.measure, model, *size, times, of.dtype, device)
    if texts is not None:
        yield "paper", str(texts), partial(measure_runs, texts, tiny=times == 1)


def measure_optimizer(whole: tuple[int, int, int, int, int], repetitions: int, device: str) -> dict[str, Any]:
    """AdamW on the k entries of all linear layers, beside LoRA's factors, in float32."""
    hidden, intermediate, blocks, heads, shared = whole
    entries = [int(common.DENSITY * number) for number in numbers(hidden, intermediate, heads, shared)] * blocks
    sides = [hidden, hidden, hidden, hidden // shared] * 2 + [hidden, intermediate] * 3
    steps, counts = {}, {}
    for name, lengths in (("SAM", entries), ("LoRA r=16", [16 * side for side in sides] * blocks)):
        values = [torch.zeros(length, device=device, requires_grad=True) for length in lengths]
        for value in values:
            value.grad = torch.randn_like(value)
        optimizer = torch.optim.AdamW(values, lr=1e-4, fused=True)
        steps[name], counts[name] = optimizer.step, sum(lengths)
    seconds = common.interleaved(steps, repetitions, "optimizer")
    return {"trained": counts, "seconds": common.medians(seconds), "ratio": common.ratios(seconds, "LoRA r=16")}


def measure_runs(texts: Path, tiny: bool) -> dict[str, Any]:
    """Seconds of the paper's runs on MiniLM, all methods: a folder's tasks several at a time, its first one by one."""
    tasks = sorted(file.parent.name for file in texts.glob("*/train.jsonl"))
    size = ["--max-steps", "2", "--eval-every", "2", "--max-length", "8"] if tiny else ["--max-steps", "100"]
    if tiny:
        tasks, size = tasks[:1], [*size, "--methods", "full", "sam"]
    found = {}
    for jobs, these in ((2 if tiny else 8, tasks), (1, tasks[:1])):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "benchmarks.paper", "run", "--source", str(texts), "--out", out, *size]
            start = time.perf_counter()
            subprocess.run(
                [*command, "--tasks", *these, "--seeds", "0", "--lrs", "1e-3", "--jobs", str(jobs)],
                check=True,
                cwd=Path(__file__).parent.parent,
                stdout=subprocess.DEVNULL,
            )
            seconds = time.perf_counter() - start
            done = sum(len(path.read_text().splitlines()) for path in Path(out).glob("*.jsonl"))
            found[f"{jobs} at a time"] = {"tasks": these, "seconds": seconds, "runs": done}
    return found


def aims_of(what: str, result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each aim with what was found."""
    found: dict[str, float] = {}
    if what == "step":
        ratio, peak = result["ratio"], result["peak_mib"]
        found["SAM / floor"] = ratio["SAM"]
        found["SAM / LoRA r=8"] = ratio["SAM"] / ratio["LoRA r=8"]
        found["peak of SAM / LoRA r=16"] = peak["SAM"] / peak["LoRA r=16"]
    elif what == "decode":
        found["SAM / base"] = result["ratio"]["SAM"]
    elif what == "pass":
        found["pass / plain"] = result["pass_over_plain"]
    return {aim: {"at_most": AIMS[what][aim], "found": ratio} for aim, ratio in found.items()}


def main() -> int:
    """Measure and write; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="nothing is begun after so many")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="all of it in small")
    parser.add_argument("--texts", type=Path, help="folder of the tasks, for the paper's runner")
    parser.add_argument("--out", type=Path, help="a file for the lines, too")
    args = parser.parse_args()
    start, failed = time.monotonic(), 0

    def tell(line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(text + "\n")

    tell({"what": "environment", **common.environment(args.device), "tiny": args.tiny})
    for what, on, measurement in rows(sizes_for(args.device, args.tiny), args.device, args.texts):
        begun = time.monotonic()
        line: dict[str, Any] = {"what": what, "on": on}
        if begun - start > 60 * args.minutes:
            tell({**line, "left_out": "no time"})
            continue
        try:
            found = measurement()
            line = {**line, **found, **line, "aims": aims_of(what, found)}
        except Exception as error:
            failed += 1
            line["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        tell({**line, "took": round(time.monotonic() - begun, 1)})
        torch._dynamo.reset()
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
