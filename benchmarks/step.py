"""What a training step costs: SAM beside LoRA, PEFT's other sparse tuners and full fine-tuning, in one run.

    python benchmarks/step.py            # all shapes; --quick for fewer repetitions of MiniLM; --dtype bfloat16

Every figure is a ratio to the *floor*: the same model, frozen, with gradients flowing through it down to the first
layer. Methods are interleaved, and medians over repetitions are compared; the trained entries of the sparse methods
are as many as SAM's (SHiRA's as near as its ranks allow). The support of MiniLM is a real one, selected on the
examples' text; the other shapes get the same support, stretched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from peft_sam.sparse import scratch


class Step:
    """One method's model and the forward and backward pass that is timed."""

    def __init__(self, model: Any, batch: int, length: int) -> None:
        self.model = model.train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.config.use_cache = False
        embeddings = base.get_input_embeddings()
        embeddings.register_forward_hook(lambda _module, _args, out: out.requires_grad_())
        weight = embeddings.weight
        self.ids = torch.randint(5, 1000, (batch, length), device=weight.device)
        size = batch, length, base.config.hidden_size
        self.grad = torch.randn(size, dtype=weight.dtype, device=weight.device) / 1e3

    def __call__(self) -> None:
        """Forward and backward once."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self.model(input_ids=self.ids).last_hidden_state.backward(self.grad)

    def saved_bytes(self) -> int:
        """Bytes of the distinct tensors that autograd keeps for backward, parameters apart."""
        known = {p.untyped_storage().data_ptr() for p in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
                storage = part.untyped_storage()
                if storage.data_ptr() not in known:
                    kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.model(input_ids=self.ids).last_hidden_state
        total = sum(kept.values())
        out.backward(self.grad)
        return total

    def peak_bytes(self) -> int:
        """The most memory that a step has at once on top of the model, its gradients included."""
        for parameter in self.model.parameters():
            parameter.grad = None
        scratch._kept.__dict__.clear()  # so that it is counted
        return common.peak_bytes(self, self.ids.device.type)


def measure(shape: str, batch: int, length: int, repetitions: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Time and memory of every method on one shape, interleaved."""
    steps: dict[str, Step] = {}
    counts: dict[str, int] = {}
    for name in common.METHODS:
        model = common.make(name, shape, counts.get("SAM", 0), dtype, device)
        counts[name] = common.trained_entries(model)
        steps[name] = Step(model, batch, length)
    seconds = common.interleaved(steps, repetitions, f"{shape}, {batch} x {length}")
    return {
        "shape": shape,
        "batch": batch,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "trained": counts,
        "seconds": common.medians(seconds),
        "ratio": common.ratios(seconds, "floor"),
        "saved_mib": {name: step.saved_bytes() / 2**20 for name, step in steps.items()},
        "peak_mib": {name: step.peak_bytes() / 2**20 for name, step in steps.items()},
    }


def show(result: dict[str, Any]) -> str:
    """One shape as a Markdown table."""
    lines = [
        f"**{result['shape']}**, {result['batch']} x {result['length']} tokens, {result['dtype']}",
        "",
        "| method | trained | step / floor | saved for backward | peak |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, ratio in result["ratio"].items():
        saved, peak = result["saved_mib"][name], result["peak_mib"][name]
        lines.append(f"| {name} | {result['trained'][name]:,} | {ratio:.2f} | {saved:.0f} MiB | {peak:.0f} MiB |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of step time and of saved memory, relative to the floor."""
    chosen = [r for r in results if r["batch"] * r["length"] > 128]
    names = [name for name in chosen[0]["ratio"] if name != "floor"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    for axis, key, title in zip(
        axes, ("ratio", "saved_mib"), ("step time / floor", "saved for backward / floor"), strict=True
    ):
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            heights = [r[key][name] / r[key]["floor"] for r in chosen]
            places = [place + (number - len(names) / 2 + 0.5) * width for place in range(len(chosen))]
            axis.bar(places, heights, width, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        names_of = [r["shape"].replace(" shape", "").replace(", ", "\n") for r in chosen]
        labels = [f"{name}\n{r['batch']} x {r['length']}" for name, r in zip(names_of, chosen, strict=True)]
        axis.set_xticks(range(len(chosen)), labels, fontsize=7)
        axis.set_title(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=len(names), loc="outside upper center")
    figure.savefig(path, metadata={"Date": None})
    print(f"drawn: {path}")


def main() -> None:
    """Measure, print, write, draw."""
    args = common.arguments(__doc__.partition("\n")[0], repetitions=20)
    shapes = [(common.MINILM, 16, 64), (common.MINILM, 8, 16)]
    if not args.quick:
        shapes += [(common.MINILM, 8, 128)]
        shapes += [(common.ROBERTA, *size) for size in ((16, 64), (8, 128), (8, 16))]
        shapes += [(common.LLAMA, 4, 128)] if args.device == "cpu" else [(common.LARGE_LLAMA, 4, 512)]
    results = []
    for shape, batch, length in shapes:
        repetitions = 8 if args.quick else args.repetitions
        results.append(measure(shape, batch, length, repetitions, getattr(torch, args.dtype), args.device))
        print(f"\n{show(results[-1])}\n", flush=True)
    if not args.quick:
        draw(results, common.write("step", results, args).with_suffix(".svg"))


if __name__ == "__main__":
    main()
