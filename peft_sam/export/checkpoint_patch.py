"""What an adapter changes in the checkpoint files of its base model, entry by entry.

Files: `checkpoint_patch.safetensors` has for each changed tensor of the checkpoint

    <name>.indices   flat row-major positions, increasing; int32 where they fit, else int64
    <name>.values    θ⁰ + Δ at these positions, in the base model's dtype

or, where every entry is given (heads that are trained densely), `<name>.values` alone, all entries in order: the first
file of a `WeightStream`, with its header. `checkpoint_patch.json` has under "tensors" the full "shape" and the "dtype"
of each, and what it is a patch of. `WeightReceiver(model).apply(file)` writes it into a model that was loaded from the
base's files. To apply it to the files' tensors:

    for name, about in json.load(open("checkpoint_patch.json"))["tensors"].items():
        values = patch[f"{name}.values"]
        if f"{name}.indices" in patch:
            tensors[name].view(-1)[patch[f"{name}.indices"].long()] = values
        else:
            tensors[name] = values.view(about["shape"])
"""

from __future__ import annotations

import json
from pathlib import Path

from peft_sam.export.parts import Adapter
from peft_sam.export.stream import WeightStream

NAME = "checkpoint_patch"
VERSION = 1


def write_patch(adapter: Adapter, folder: Path) -> None:
    """Write the patch of the checkpoint that the adapter's base model was loaded from, or would save."""
    stream = WeightStream(adapter.model, adapter.name)
    about = {
        patch.name: {"shape": list(patch.shape), "dtype": str(patch.dtype).removeprefix("torch.")}
        for patch in stream.patches()
    }
    base = {"base_model": adapter.config.base_model_name_or_path, "revision": adapter.config.revision}
    (folder / f"{NAME}.json").write_text(json.dumps({"version": VERSION, **base, "tensors": about}, indent=2))
    stream.write(folder / f"{NAME}.safetensors")
