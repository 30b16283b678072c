"""Adapters in formats that need no plugin. A new format is one function and one row of `formats.FORMATS`.

Imports: config, sparse, layers, tuner.
Imported by nobody but the package itself.

* `formats`: `export_adapter`; `stock_sparse`, `low_rank`, `checkpoint_patch`: the formats; `parts`: what each needs of
  an adapter; `base_files`: the base's own checkpoint files.
"""

from peft_sam.export.formats import ExportReport, export_adapter

__all__ = ["ExportReport", "export_adapter"]
