"""PEFT's model card says what a sparse adapter is, also when `push_to_hub` writes a card of its own.

`push_to_hub` saves the adapter, then overwrites its card with an empty template; the card is written once more before
the upload.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_sam._peft.kind import is_sparse

# A reloaded module finds its own wrappers in place and unwraps them.
_write_plain_card = inspect.unwrap(PeftModel.create_or_update_model_card)
_save_pretrained = inspect.unwrap(PeftModel.save_pretrained)

# The adapters that are being saved; None for all.
_saved: ContextVar[Sequence[str] | None] = ContextVar("saved", default=None)


def enter_cards(complete_card: Callable[[Any, str, Path], None]) -> None:
    """Have `complete_card` (model, adapter name, folder) add to PEFT's cards.

    Of several sparse adapters that are saved the card describes "default", which PEFT saves beside it, or else the
    first.
    """

    @functools.wraps(_save_pretrained)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        told = inspect.signature(_save_pretrained).bind(self, *args, **kwargs).arguments
        token = _saved.set(told.get("selected_adapters"))
        try:
            _save_pretrained(self, *args, **kwargs)
        finally:
            _saved.reset(token)

    @functools.wraps(_write_plain_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        _write_plain_card(self, output_dir)
        saved = _saved.get()
        names = [n for n, config in self.peft_config.items() if is_sparse(config) and (saved is None or n in saved)]
        if names:
            try:
                complete_card(self, "default" if "default" in names else names[0], Path(output_dir))
            except Exception as error:  # PEFT writes the card before the adapter, which must not be lost for it
                warnings.warn(f"the model card says nothing of the sparse adapter: {error!r}", stacklevel=2)

    def _upload_modified_files(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if any(is_sparse(config) for config in self.peft_config.values()):
            self.create_or_update_model_card(str(working_dir))
        return super(PeftModel, self)._upload_modified_files(working_dir, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained
    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel._upload_modified_files = _upload_modified_files
