"""Word embeddings: what is said where they are tied to other layers, and those of which single rows are trained.

A tied parameter has one delta, which all its uses see (`ties`); PEFT warns of ties, and so it is done here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_sam._peft import (
    EMBEDDING_LAYER_NAMES,
    get_input_embeddings_name,
    keep_saved_modules_tied,
    match_target_against_key,
)
from peft_sam.config import SHORTHANDS, SamConfig
from peft_sam.layers.found import base_modules, module_of
from peft_sam.layers.owned import stored_parameters

TIED = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but no implementation exists to tie"
)
COMPLICATIONS = (
    "This can lead to complications, for example when converting your model to formats other than safetensors. "
    "Check the discussion here: https://github.com/huggingface/peft/issues/2777"
)


def check_ties(tuner: Any, config: SamConfig) -> str | None:
    """Tie what a config wants tied, and find what is to be said of tied word embeddings that it names.

    With `ensure_weight_tying` a dense copy in `modules_to_save` is tied, too.

    Returns:
        a warning, in PEFT's words where it has some.
    """
    tied = tuner._get_module_names_tied_with_embedding()
    to_save = any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in config.modules_to_save or ())
    if config.ensure_weight_tying:
        if not tied:
            return "You have requested `ensure_weight_tying`, but no tied modules were found in the model"
        if to_save:
            keep_saved_modules_tied(tuner, config, tied)
        elif not names_embeddings(config) and config.target_modules != "all" and not config.trainable_token_indices:
            return (
                "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` "
                "or `target_modules`"
            )
    elif tied and to_save:
        return (
            f"{TIED} the adapters unless ensure_weight_tying=True: the copy in `modules_to_save` is trained alone, and "
            f"what was tied to it stays as it is. {COMPLICATIONS}"
        )
    elif tied and names_embeddings(config) and config.selection is None:  # whoever saved it was told
        config.names_tied = True
        return (
            f"{TIED} the adapters, nor is one needed: the tied weight has one delta, which all its uses see "
            f"(ensure_weight_tying=True says that this is known). {COMPLICATIONS}"
        )
    return None


def names_embeddings(config: SamConfig) -> bool:
    """Whether a config names word embeddings or their output layer among its targets, as PEFT finds them."""
    wanted = config.target_modules
    if isinstance(wanted, str):
        named = wanted not in SHORTHANDS and any(match_target_against_key(wanted, n) for n in EMBEDDING_LAYER_NAMES)
        return bool(named)
    return any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in wanted or ())


def rows_of_tokens(config: SamConfig, model: nn.Module) -> dict[str, list[int]]:
    """Module of the base model → the rows of it that PEFT trains (`trainable_token_indices`), in their order.

    Raises:
        ValueError: if a module has no such row.
    """
    wanted, found = config.trainable_token_indices or {}, {}
    named = wanted if isinstance(wanted, dict) else {get_input_embeddings_name(model, "embed_tokens"): wanted}
    for name, rows in named.items():
        for path, module in base_modules(model):
            if f".{module_of(path)}".endswith(f".{name}"):
                found[module_of(path)] = list(rows)
                there = max((len(parameter) for parameter in stored_parameters(module).values()), default=0)
                if rows and max(rows) >= there:
                    raise ValueError(
                        f"trainable_token_indices has row {max(rows)} of {module_of(path)!r}, which has {there} rows: "
                        "resize the embeddings before the adapter is made, or mend the number."
                    )
    return found


def modules_of_tokens(config: SamConfig, model: nn.Module) -> set[str]:
    """The base model's modules of which PEFT trains single rows (`trainable_token_indices`), those tied to them too."""
    found = set(rows_of_tokens(config, model))
    if not found:
        return found
    modules = {module_of(path): module for path, module in base_modules(model)}
    rows = {id(parameter) for path in found for parameter in stored_parameters(modules[path]).values()}
    return {path for path, m in modules.items() if any(id(p) in rows for p in stored_parameters(m).values())} | found
