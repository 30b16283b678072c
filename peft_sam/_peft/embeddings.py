"""PEFT's state dict of an adapter has the base's embeddings whenever they are targets: not that of a sparse adapter."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from peft_sam._peft.kind import is_sparse, tuner
from peft_sam._peft.names import save_and_load

NAME = "get_peft_model_state_dict"
# A reloaded module finds its own wrapper in place and unwraps it.
_plain = inspect.unwrap(getattr(save_and_load, NAME))


def enter_embeddings() -> None:
    """Have the tuner say what of the base's embeddings belongs in the file of a sparse adapter.

    The function is replaced wherever it was imported by name already.
    """

    @functools.wraps(_plain)
    def get_peft_model_state_dict(
        model: Any,
        state_dict: Any = None,
        adapter_name: str = "default",
        unwrap_compiled: bool = False,
        save_embedding_layers: Any = "auto",
    ) -> Any:
        inner = getattr(model, "_orig_mod", model) if unwrap_compiled else model
        if not is_sparse(inner.peft_config.get(adapter_name)):
            return _plain(model, state_dict, adapter_name, unwrap_compiled, save_embedding_layers)
        found = _plain(model, state_dict, adapter_name, unwrap_compiled, False)
        return found | tuner().embeddings_to_save(inner, adapter_name, state_dict, save_embedding_layers)

    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {}).get(NAME)
        if held is not None and inspect.unwrap(held) is _plain:
            setattr(module, NAME, get_peft_model_state_dict)
