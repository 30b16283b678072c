"""Adapters in formats that need no plugin, once or after every step.

A new format is one function and one row of `formats.FORMATS`.

Imports: config, sparse, layers, tuner.
Imported by nobody but the package itself.

* `formats`: `export_adapter`; `stock_sparse`, `low_rank`, `checkpoint_patch`: the formats; `parts`: what each needs of
  an adapter; `base_files`: the base's own files; `check`: reading back what was written.
* `rounding`: what the weights' dtype or codes take from an adapter.
* `stream`: new weights after every step, as the `patch`es that engines take; `receiver`: a plain model that takes them;
  `way_back`: where a model's tensors lie in its checkpoint.
"""

from peft_sam.export.formats import ExportReport, export_adapter
from peft_sam.export.patch import WeightPatch
from peft_sam.export.receiver import WeightReceiver
from peft_sam.export.rounding import RoundingReport, rounding_report
from peft_sam.export.stream import WeightStream

__all__ = [
    "ExportReport",
    "RoundingReport",
    "WeightPatch",
    "WeightReceiver",
    "WeightStream",
    "export_adapter",
    "rounding_report",
]
