"""What PEFT does with files of sparse adapters: one that cannot be loaded is taken out again, pickles are checked."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from peft_sam._peft.kind import is_sparse, tuner
from peft_sam._peft.names import save_and_load
from peft_sam._peft.pickles import read_pickle

# A reloaded module finds its own wrappers in place and unwraps them.
_load_adapter = inspect.unwrap(PeftModel.load_adapter)
_torch_load = inspect.unwrap(save_and_load.torch_load)

# Whether the file that PEFT is reading is one of a sparse adapter.
reads_sparse: ContextVar[Callable[[], bool]] = ContextVar("reads_sparse", default=lambda: False)
# While an adapter is made for a file that follows: what the names in its config are called in the model. Else None.
file_follows: ContextVar[Callable[[str], str] | None] = ContextVar("file_follows", default=None)


@contextmanager
def reading(key_mapping: Mapping[str, str] | None) -> Iterator[None]:
    """Have the adapters that are made meanwhile wait for their file, whose keys PEFT renames by `key_mapping`."""

    def renamed(name: str) -> str:
        for pattern, replacement in (key_mapping or {}).items():  # the first that matches, as PEFT does
            new, matches = re.subn(pattern, replacement, name)
            if matches:
                return new
        return name

    token = file_follows.set(renamed)
    try:
        yield
    finally:
        file_follows.reset(token)


def enter_files(other_base: type[Warning]) -> None:
    """Wrap PEFT's ways to load; with `strict_base` a warning `other_base` is an error.

    PEFT adds an adapter before it reads the file.
    """

    @functools.wraps(_load_adapter)
    def load_adapter(
        self: PeftModel, model_id: str, adapter_name: str, *args: Any, strict_base: bool = False, **kwargs: Any
    ) -> Any:
        def is_ours() -> bool:
            return is_sparse(self.peft_config.get(adapter_name))

        new = adapter_name not in self.peft_config or (is_ours() and tuner().awaits_file(self.base_model, adapter_name))
        token = reads_sparse.set(is_ours)
        try:
            with warnings.catch_warnings() if strict_base else nullcontext(), reading(kwargs.get("key_mapping")):
                if strict_base:
                    warnings.simplefilter("error", other_base)
                result = _load_adapter(self, model_id, adapter_name, *args, **kwargs)
                if is_ours():
                    tuner().stay_at_hand(self.base_model, adapter_name)
                return result
        except BaseException as error:
            ours = is_ours()
            if ours and new:
                tuner().withdraw(self.base_model, adapter_name)
            if isinstance(error, other_base):
                raise ValueError(str(error)) from None
            if not ours:
                raise
            if isinstance(error, SafetensorError):
                raise ValueError(f"the adapter file of {str(model_id)!r} is truncated or damaged ({error}).") from error
            if isinstance(error, KeyError):
                raise ValueError(f"the adapter file of {str(model_id)!r} lacks the tensor {error}.") from error
            raise
        finally:
            reads_sparse.reset(token)

    @functools.wraps(_torch_load)
    def torch_load(path: Any, *args: Any, map_location: Any = "cpu", **kwargs: Any) -> Any:
        if reads_sparse.get()():
            return read_pickle(path, map_location)
        return _torch_load(path, *args, map_location=map_location, **kwargs)

    PeftModel.load_adapter = load_adapter
    save_and_load.torch_load = torch_load
