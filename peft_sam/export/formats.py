"""An adapter in formats that need no plugin. A new format is one function and one row of `FORMATS`."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_sam.export.base_files import copy_tokenizer
from peft_sam.export.check import Check, Squares, check_merged, check_patch, check_stock
from peft_sam.export.checkpoint_patch import write_patch
from peft_sam.export.low_rank import is_low_rank_target, like_experts, lora
from peft_sam.export.parts import Adapter, Part
from peft_sam.export.rounding import RoundingReport, rounding_report
from peft_sam.export.stock_sparse import StockAdapter, is_linear_weight, shira, supertuning, target_names
from peft_sam.layers.found import PEFT_PREFIX
from peft_sam.tuner.merged import merged

DEFAULT_RANK = 16
SHOWN = 5
HALF_OR_SINGLE = "untied weights of nn.Linear layers in float32, bfloat16 or float16"
LINEAR_OR_EMBEDDING = "untied weights and biases of linear layers, and embeddings"


@dataclass
class ExportReport:
    """What was written. Prints as text.

    Attributes:
        path, format: as given.
        entries: of the adapter.
        size: of all files, bytes.
        own_size: of the tensors in the adapter's own file, bytes.
        notes: what else is to be known of the files.
        errors: parameter → ‖Δ - what was written‖ / ‖Δ‖ in the Frobenius norm; empty for an exact format.
        error: the same over all parameters together.
        rounding: what θ⁰'s dtype takes from Δ, in formats that hold the bits of θ⁰ + Δ; None in others.
    """

    path: Path
    format: str
    entries: int
    size: int
    own_size: int
    notes: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    rounding: RoundingReport | None = None

    def __str__(self) -> str:
        how = f"relative error {self.error:.2%}" if self.errors else "exact"
        lines = [
            f"{self.entries:,} entries as {self.format!r} in {self.path}: {self.size:,} bytes, {how}",
            f"  {self.size / self.own_size:,.1f} times the {self.own_size:,} bytes of the adapter's own file",
            *(f"  {note}" for note in self.notes),
        ]
        if self.rounding is not None and self.rounding.unmoved:
            lines.append(f"  {self.rounding}")
        worst = sorted(self.errors, key=lambda name: -self.errors[name])
        lines += [f"  {self.errors[name]:7.2%}  {name}" for name in worst[:SHOWN]]
        if len(worst) > SHOWN:
            lines.append(f"  ... {len(worst) - SHOWN} more parameters")
        return "\n".join(lines)


class Format(NamedTuple):
    """A way to write an adapter.

    Attributes:
        write: writes the adapter into an empty folder, and says what was lost, if anything is.
        check: reads it back by the loader that it is for; a ValueError says what does not come back.
        holds: whether a delta can be written in this way.
        what: what it holds, for an error.
        pairs: whether it holds low-rank pairs, too.
    """

    write: Callable[..., Squares | None]
    check: Check
    holds: Callable[[Part], bool]
    what: str
    pairs: bool = False


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
        names = adapter.module_names()
        stock.config.target_modules = target_names(stock.tensors, names)
        _write_stock(adapter, stock, folder)
        apart = like_experts(stock)
        if apart and not _loads(adapter, folder, stock.lost):
            stock.config.target_modules = target_names(stock.tensors.keys() - apart, names)
            stock.config.target_parameters = [f"{module}.weight" for module in sorted(apart)]
            _write_stock(adapter, stock, folder)
        return stock.lost

    return write


def _loads(adapter: Adapter, folder: Path, lost: Squares) -> bool:
    try:
        check_stock(adapter, folder, lost)
    except ValueError:
        return False
    return True


def _write_stock(adapter: Adapter, stock: StockAdapter, folder: Path) -> None:
    tensors = {f"{PEFT_PREFIX}{m}.{key}": t for m, below in stock.tensors.items() for key, t in below.items()}
    tensors |= adapter.saved_besides(stock.tensors)
    whole = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    save_file(whole, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    stock.config.save_pretrained(str(folder), auto_mapping_dict=adapter.auto_mapping())


FORMATS = {
    "supertuning": Format(_stock(supertuning), check_stock, is_linear_weight, HALF_OR_SINGLE, pairs=True),
    "shira": Format(_stock(shira), check_stock, is_linear_weight, HALF_OR_SINGLE),
    "lora": Format(_stock(lora), check_stock, is_low_rank_target, LINEAR_OR_EMBEDDING, pairs=True),
    "merged": Format(write_merged, check_merged, lambda part: part.readable, "any parameter in memory", pairs=True),
    "checkpoint_patch": Format(write_patch, check_patch, lambda part: part.readable, "any parameter in memory"),
}


def export_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str,
    adapter_name: str = "default",
    rank: int | None = None,
    tokenizer: Any = None,
    batch: Mapping[str, Tensor] | None = None,
) -> ExportReport:
    """Write a SAM sparse adapter in a format that loads without this package; the model is as before.

    Of several processes, one calls it. What is written is read back by the loader that it is for, PEFT or transformers,
    before the call returns; "merged" and "checkpoint_patch" take the memory of the model once more for that.

    * "supertuning": an adapter of PEFT's Super-Tuning (PEFT 0.21 and newer), with the bits of θ⁰ + Δ. As it stores
      equally many entries of equal layers, its file grows where the support is clustered; the report says how much.
    * "shira": one of PEFT's SHiRA, with the bits of θ⁰ + Δ; its file grows alike.
    * "lora": the LoRA adapter nearest to Δ; what it loses is in the report, and warned about.
    * "merged": the whole model with θ⁰ + Δ, for `from_pretrained`.
    * "checkpoint_patch": the new values of single entries of the base's checkpoint files (`checkpoint_patch`), the
      form in which vLLM takes sparse updates.

    Args:
        model: a PEFT model with a SAM adapter that has its support and is not merged.
        path: a new or empty folder. It is written whole or not at all.
        rank: of "lora", 16 by default; smaller where that loses nothing. Low-rank pairs come with their own besides.
        tokenizer: of "merged", or a processor, saved beside the model; None for the base's own, if it has one.
        batch: what the model takes, to measure what rounding does to the logits (`rounding_report`).

    Raises:
        FileExistsError: if there is anything at `path`.
        TypeError: if the model is no PEFT model with SAM adapters.
        PendingAdapterError: if the adapter has no support yet.
        ValueError: if there is no such format or adapter, the format cannot hold a delta, or what was written does
            not load as θ⁰ + Δ.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}; got {format!r}.")
    if rank is not None and (format != "lora" or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is a positive integer for format 'lora'; got rank={rank!r} for {format!r}.")
    if tokenizer is not None and (format != "merged" or not hasattr(tokenizer, "save_pretrained")):
        raise ValueError(f"tokenizer has save_pretrained and is for format 'merged'; got {tokenizer!r} for {format!r}.")
    target = Path(path).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{os.fspath(path)!r} is not empty: export to a new folder.")
    adapter = Adapter(model, adapter_name)
    adapter.refuse_what_is_besides()
    if not FORMATS[format].pairs:
        adapter.refuse_pairs(f"format {format!r}")
    _check_holds(format, adapter)
    notes: list[str] = []
    options = {"rank": rank or DEFAULT_RANK} if format == "lora" else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        folder = Path(temporary, target.name)
        folder.mkdir()
        with torch.no_grad():
            lost = FORMATS[format].write(adapter, folder, **options) or {}
        try:
            FORMATS[format].check(adapter, folder, lost)
        except (ValueError, RuntimeError) as error:  # a loader's of tensors that have no place
            raise ValueError(
                f"format {format!r} cannot hold this adapter of {type(adapter.base).__name__}: {error}. Nothing is "
                f"written. {_others(format, adapter)}"
            ) from error
        if format == "merged":
            notes = _save_tokenizer(adapter, tokenizer, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if target.exists():
            target.rmdir()
        folder.rename(target)
    entries = sum(len(part.delta.values) for part in adapter.parts)
    report = ExportReport(Path(path), format, entries, size, adapter.own_size(), notes)
    if adapter.pairs:
        notes.append(f"with its low-rank pairs (r={adapter.config.r}), which are not among the entries")
    elif format != "lora":
        report.rounding = rounding_report(model, adapter_name, batch=batch)
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
    raise ValueError(
        f"format {format!r} holds {FORMATS[format].what}, and cannot hold the changes of {names}{more}. "
        + _others(format, adapter)
    )


def _others(format: str, adapter: Adapter) -> str:
    rows = {name: row for name, row in FORMATS.items() if name != format and (row.pairs or not adapter.pairs)}
    others = [name for name, row in rows.items() if all(row.holds(part) for part in adapter.parts)]
    return f"Formats that can hold this adapter: {others}." if others else "No format can: they need plain weights."


def _save_tokenizer(adapter: Adapter, tokenizer: Any, folder: Path) -> list[str]:
    """Put a tokenizer beside a model; what there is to say of it."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif not copy_tokenizer(adapter.config.base_model_name_or_path, adapter.config.revision, folder):
        base = adapter.config.base_model_name_or_path
        return [f"no tokenizer beside it: there is none at {base!r}; export_adapter(..., tokenizer=...) saves one"]
    return []
