"""Adapters in formats that need no plugin: `export_adapter`."""

from peft_sam.export.formats import ExportReport, export_adapter

__all__ = ["ExportReport", "export_adapter"]
