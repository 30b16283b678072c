"""What merging, unmerging and switching between merged adapters cost, and whether the base gets its bits back.

    python benchmarks/switch.py          # --quick for MiniLM only

Two adapters each of SAM, LoRA and SHiRA with trained (here: random) deltas on one base. "merge + unmerge": of one of
them. "switch": unmerge one, merge the other. "changed": share of the base's entries with other bits afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import common
import torch

METHODS = ("LoRA r=8", "SAM", "SHiRA")


def two_adapters(method: str, shape: str, dtype: torch.dtype, device: str) -> Any:
    """A model with two adapters of one method and random deltas."""
    count = common.trained_entries(common.make("SAM", shape)) if method == "SHiRA" else 0
    model = common.make(method, shape, count)
    config = model.peft_config["default"]
    if method == "SAM":
        config = dataclasses.replace(config, score="random", selection=None)
    model.add_adapter("other", config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if model.prefix in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 100)
    return model.to(device, dtype)


def base_bits(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what is not adapter."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if model.prefix not in name}


def changed(model: Any, before: dict[str, torch.Tensor]) -> float:
    """Share of the base's entries whose value is another one."""
    different = sum(int((p != before[name]).sum()) for name, p in model.named_parameters() if name in before)
    return different / sum(tensor.numel() for tensor in before.values())


def measure(shape: str, repetitions: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Seconds of each operation of each method, and what they leave behind."""
    models = {method: two_adapters(method, shape, dtype, device) for method in METHODS}
    before = {method: base_bits(model) for method, model in models.items()}

    def merge_unmerge(model: Any) -> Callable[[], None]:
        def run() -> None:
            model.merge_adapter(["default"])
            model.unmerge_adapter()

        return run

    def switch(model: Any) -> Callable[[], None]:
        names = ["default", "other"]

        def run() -> None:
            names.reverse()
            model.unmerge_adapter()
            model.merge_adapter(names[:1])

        return run

    there_and_back = common.interleaved(
        {name: merge_unmerge(model) for name, model in models.items()}, repetitions, f"{shape}, merge + unmerge"
    )
    left = {name: changed(model, before[name]) for name, model in models.items()}
    for model in models.values():
        model.merge_adapter(["default"])
    switching = common.interleaved(
        {name: switch(model) for name, model in models.items()}, repetitions, f"{shape}, switch"
    )
    for model in models.values():
        model.unmerge_adapter()
    beside = common.medians(there_and_back)["LoRA r=8"]
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "merge_unmerge_seconds": common.medians(there_and_back),
        "switch_seconds": common.medians(switching),
        "merge_unmerge_over_lora": common.ratios(there_and_back, "LoRA r=8"),
        "switch_over_lora_merge_unmerge": {n: s / beside for n, s in common.medians(switching).items()},
        "changed_after_merge_unmerge": left,
        "changed_after_switching": {name: changed(model, before[name]) for name, model in models.items()},
    }


if __name__ == "__main__":
    SHAPES = [common.MINILM, common.ROBERTA, common.LLAMA, common.WIDE_LLAMA]
    common.carry_out("switch", __doc__.partition("\n")[0], SHAPES, 30, measure)
