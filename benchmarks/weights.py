"""What new weights cost after a step, for an engine that generates while the adapter is trained: bytes and seconds.

    python benchmarks/weights.py         # --quick for MiniLM only

All as safetensors files for an engine in bfloat16. "first patch": positions and values of a `WeightStream`. "patch": of
every later step, values only. "LoRA": the adapter's own file, of the rank with about as many entries, for an engine
that holds it apart. "full": every parameter, what TRL pushes after merging either adapter. Writing is by the trainer,
applying by a plain model that reads the file; LoRA's is left out, since engines differ in it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_sam import SamConfig, WeightReceiver, WeightStream

ENGINE = torch.bfloat16


def measure(shape: str, repetitions: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Bytes of each file, and median seconds of writing and applying it."""
    folder = Path(tempfile.mkdtemp())
    files = {name: folder / f"{name}.safetensors" for name in ("first patch", "patch", "full", "LoRA")}
    torch.manual_seed(0)
    base = common.MODELS[shape]().to(device, dtype)
    engine = copy.deepcopy(base).to(ENGINE)
    linear = [module for module in base.modules() if isinstance(module, torch.nn.Linear)]
    lora: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=1, target_modules="all-linear"))
    each = sum(module.in_features + module.out_features for module in linear)
    model: Any = get_peft_model(base, SamConfig(density=common.DENSITY, score="random"))
    trained = common.trained_entries(model)
    rank = max(1, round(trained / each))
    if rank > 1:
        lora = get_peft_model(lora.unload(), LoraConfig(r=rank, target_modules="all-linear"))
    stream, receiver = WeightStream(model, dtype=ENGINE), WeightReceiver(engine)
    of_engine = engine.state_dict()

    def full() -> None:
        with torch.no_grad():
            save_file({name: tensor.contiguous() for name, tensor in of_engine.items()}, files["full"])

    def adapter() -> None:
        save_file({n: p.detach().to(ENGINE) for n, p in lora.named_parameters() if "lora_" in n}, files["LoRA"])

    writing: dict[str, Callable[[], Any]] = {
        "first patch": lambda: stream.write(files["first patch"], indices=True),
        "patch": lambda: stream.write(files["patch"], indices=False),
        "LoRA": adapter,
        "full": full,
    }
    written = common.interleaved(writing, repetitions, f"{shape}, writing")
    receiver.apply(files["first patch"])
    applying: dict[str, Callable[[], Any]] = {
        "patch": lambda: receiver.apply(files["patch"]),
        "full": lambda: engine.load_state_dict(load_file(files["full"])),
    }
    applied = common.interleaved(applying, repetitions, f"{shape}, applying")
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "entries": {"SAM": trained, "LoRA": rank * each, "full": sum(p.numel() for p in engine.parameters())},
        "bytes": {name: path.stat().st_size for name, path in files.items()},
        "write_seconds": common.medians(written),
        "apply_seconds": common.medians(applied),
    }


if __name__ == "__main__":
    SHAPES = [common.MINILM, common.LLAMA]
    common.carry_out("weights", __doc__.partition("\n")[0], SHAPES, 10, measure)
