"""An adapter in formats that need no plugin. A new format is one function and one row of `FORMATS`."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from peft_sam.export.checkpoint_patch import write_patch
from peft_sam.export.low_rank import is_low_rank_target, lora
from peft_sam.export.parts import Adapter, Part
from peft_sam.export.stock_sparse import StockAdapter, is_linear_weight, shira, supertuning, target_names
from peft_sam.layers.found import PEFT_PREFIX
from peft_sam.tuner.merged import merged

DEFAULT_RANK = 16
SHOWN = 5
HALF_OR_SINGLE = "untied weights of nn.Linear layers in float32, bfloat16 or float16"
# parameter → ‖Δ - what was written‖² and ‖Δ‖²
Squares = dict[str, tuple[float, float]]


@dataclass
class ExportReport:
    """What was written. Prints as text.

    Attributes:
        path, format: as given.
        entries: of the adapter.
        size: of all files, bytes.
        errors: parameter → ‖Δ - what was written‖ / ‖Δ‖ in the Frobenius norm; empty for an exact format.
        error: the same over all parameters together.
    """

    path: Path
    format: str
    entries: int
    size: int
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0

    def __str__(self) -> str:
        how = f"relative error {self.error:.2%}" if self.errors else "exact"
        lines = [f"{self.entries:,} entries as {self.format!r} in {self.path}: {self.size:,} bytes, {how}"]
        worst = sorted(self.errors, key=lambda name: -self.errors[name])
        lines += [f"  {self.errors[name]:7.2%}  {name}" for name in worst[:SHOWN]]
        if len(worst) > SHOWN:
            lines.append(f"  ... {len(worst) - SHOWN} more parameters")
        return "\n".join(lines)


class Format(NamedTuple):
    """A way to write an adapter.

    Attributes:
        write: writes the adapter into an empty folder, and says what was lost, if anything is.
        holds: whether a delta can be written in this way.
        what: what it holds, for an error.
    """

    write: Callable[..., Squares | None]
    holds: Callable[[Part], bool]
    what: str


def write_merged(adapter: Adapter, folder: Path) -> None:
    """The whole model with θ⁰ + Δ, by its own `save_pretrained`; the model is merged while it is written."""
    bare: Any = adapter.bare_base()
    if not hasattr(bare, "save_pretrained"):
        raise ValueError(
            f"format 'merged' writes a model by its save_pretrained, which {type(bare).__name__} does not have. Use "
            "model.merge_and_unload() and save its state_dict."
        )
    with merged(adapter.model, [adapter.name]):
        bare.save_pretrained(folder)


def _stock(make: Callable[..., StockAdapter]) -> Callable[..., Squares]:
    """A writer for adapters of stock PEFT."""

    def write(adapter: Adapter, folder: Path, **options: Any) -> Squares:
        stock = make(adapter, **options)
        stock.config.target_modules = target_names(stock.tensors, adapter.module_names())
        tensors = {f"{PEFT_PREFIX}{m}.{key}": t for m, below in stock.tensors.items() for key, t in below.items()}
        tensors |= adapter.saved_besides(stock.tensors)
        whole = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
        save_file(whole, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        stock.config.save_pretrained(str(folder), auto_mapping_dict=adapter.auto_mapping())
        return stock.lost

    return write


FORMATS = {
    "supertuning": Format(_stock(supertuning), is_linear_weight, HALF_OR_SINGLE),
    "shira": Format(_stock(shira), is_linear_weight, HALF_OR_SINGLE),
    "lora": Format(_stock(lora), is_low_rank_target, "untied weights and biases of linear layers, and embeddings"),
    "merged": Format(write_merged, lambda part: part.readable, "any parameter in memory"),
    "checkpoint_patch": Format(write_patch, lambda part: part.readable, "any parameter in memory"),
}


def export_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str,
    adapter_name: str = "default",
    rank: int | None = None,
) -> ExportReport:
    """Write a SAM sparse adapter in a format that loads without this package; the model is as before.

    Of several processes, one calls it.

    * "supertuning": an adapter of PEFT's Super-Tuning (PEFT 0.21 and newer), with the bits of θ⁰ + Δ. As it stores
      equally many entries of equal layers, its file grows where the support is clustered.
    * "shira": one of PEFT's SHiRA, with the bits of θ⁰ + Δ.
    * "lora": the LoRA adapter nearest to Δ; what it loses is in the report, and warned about.
    * "merged": the whole model with θ⁰ + Δ, for `from_pretrained`.
    * "checkpoint_patch": the new values of single entries of the base's checkpoint files (`checkpoint_patch`), the
      form in which vLLM takes sparse updates.

    Args:
        model: a PEFT model with a SAM adapter that has its support and is not merged.
        path: a new or empty folder. It is written whole or not at all.
        rank: of "lora", 16 by default; smaller where that loses nothing.

    Raises:
        FileExistsError: if there is anything at `path`.
        TypeError: if the model is no PEFT model with SAM adapters.
        PendingAdapterError: if the adapter has no support yet.
        ValueError: if there is no such format or adapter, or the format cannot hold a delta; names those that can.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}; got {format!r}.")
    if rank is not None and (format != "lora" or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is a positive integer for format 'lora'; got rank={rank!r} for {format!r}.")
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{os.fspath(path)!r} is not empty: export to a new folder.")
    adapter = Adapter(model, adapter_name)
    _check_holds(format, adapter)
    options = {"rank": rank or DEFAULT_RANK} if format == "lora" else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        folder = Path(temporary, target.name)
        folder.mkdir()
        with torch.no_grad():
            lost = FORMATS[format].write(adapter, folder, **options) or {}
        size = sum(file.stat().st_size for file in folder.iterdir())
        if target.exists():
            target.rmdir()
        folder.rename(target)
    report = ExportReport(Path(path), format, sum(len(part.delta.values) for part in adapter.parts), size)
    if lost:
        report.errors = {name: sqrt(missing / whole) if whole else 0.0 for name, (missing, whole) in lost.items()}
        report.error = sqrt(sum(missing for missing, _ in lost.values()) / (sum(w for _, w in lost.values()) or 1.0))
    if report.error > 1e-6:
        warnings.warn(f"the exported adapter is an approximation. {report}", stacklevel=2)
    return report


def _check_holds(format: str, adapter: Adapter) -> None:
    left_out = [part for part in adapter.parts if not FORMATS[format].holds(part)]
    if not left_out:
        return
    names = ", ".join(f"{part.name} ({part.describe()})" for part in left_out[:SHOWN])
    more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    others = [name for name, row in FORMATS.items() if all(row.holds(part) for part in adapter.parts)]
    raise ValueError(
        f"format {format!r} holds {FORMATS[format].what}, and cannot hold the changes of {names}{more}. "
        + (f"Formats that can hold this adapter: {others}." if others else "No format can: they need plain weights.")
    )
