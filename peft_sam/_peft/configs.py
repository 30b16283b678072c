"""PEFT takes a config for the adapter's own; sparse adapters have copies of it, and PEFT goes along with that here."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from peft import PeftMixedModel, PeftModel, PeftModelForQuestionAnswering, PeftModelForTokenClassification

from peft_sam._peft.files import reading
from peft_sam._peft.kind import is_sparse

# The heads that PEFT trains densely for a task, entered in the config only after the adapter is made.
HEADS = {PeftModelForTokenClassification: ("classifier", "score"), PeftModelForQuestionAnswering: ("qa_outputs",)}

# A reloaded module finds its own wrapper in place and unwraps it.
_from_pretrained = inspect.unwrap(PeftModel.from_pretrained.__func__)
_mixed_from_pretrained = inspect.unwrap(PeftMixedModel.from_pretrained.__func__)


def enter_configs() -> None:
    """Enter the heads of a task before the copy is made; make a config given to `from_pretrained` the adapter's."""
    for task, heads in HEADS.items():
        _enter_heads_first(task, heads)
    PeftModel.from_pretrained = classmethod(from_pretrained)
    PeftMixedModel.from_pretrained = classmethod(mixed_from_pretrained)


@functools.wraps(_from_pretrained)
def from_pretrained(
    cls: Any,
    model: Any,
    model_id: Any,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """PEFT's; the adapter's config is then the one given, if one was."""
    with reading(kwargs.get("key_mapping")):
        found = _from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)
    if is_sparse(config):
        vars(config).update(vars(found.peft_config[adapter_name]))
        found.peft_config[adapter_name] = config
    return found


@functools.wraps(_mixed_from_pretrained)
def mixed_from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's, which makes the adapter before it reads the file."""
    with reading(kwargs.get("key_mapping")):
        return _mixed_from_pretrained(cls, *args, **kwargs)


def _enter_heads_first(task: Any, heads: tuple[str, ...]) -> None:
    plain = inspect.unwrap(task.__init__)

    @functools.wraps(plain)
    def __init__(self: Any, model: Any, peft_config: Any = None, *args: Any, **kwargs: Any) -> None:
        if is_sparse(peft_config):
            peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or ()), *heads]))
        plain(self, model, peft_config, *args, **kwargs)

    task.__init__ = __init__
