"""What `peft.utils.hotswap.hotswap_adapter` does with sparse adapters: one's deltas and heads in place of another's.

Parameters whose supports have the same size keep their tensors, so that a compiled model infers on as it is. It trains
on as it is, too, unless the plans of its linear layers get blocks of other sizes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from peft_sam import _peft
from peft_sam._peft import SAM_SPARSE, hotswap
from peft_sam.config import SamConfig
from peft_sam.files.checkpoint import KEY, read_file, read_pairs
from peft_sam.files.fingerprint import check_base
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import layers_with, module_of, pairs_of, sam_layers
from peft_sam.tuner.embeddings import rows_of_tokens
from peft_sam.tuner.model import SamModel

# A reloaded module finds its own wrappers in place and unwraps them.
_load_peft_weights = inspect.unwrap(_peft.load_peft_weights)
_swap_state_dict = inspect.unwrap(_peft.hotswap_adapter_from_state_dict)
_prepare = inspect.unwrap(_peft.prepare_swap)


def swap(model: Any, state_dict: Mapping[str, Tensor], adapter_name: str, config: SamConfig) -> None:
    """Replace what an adapter of a model, compiled or not, holds; on an error the model is as it was.

    Its scale is 1 then, as after loading.

    Args:
        model: with or without PeftModel around it.
        state_dict: of the other adapter, with `adapter_name` in its keys.
        config: of the other adapter.

    Raises:
        ValueError: if the adapter is merged, or the tensors are damaged or do not belong to `config`.
        RuntimeError: if there are deltas for what the adapter to be replaced does not target.
    """
    model = getattr(model, "_orig_mod", model)
    layers = layers_with(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"adapter {adapter_name!r} cannot be swapped while it is merged: call model.unmerge_adapter() first."
        )
    state = {SamModel._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in state_dict.items()}
    deltas = {key: module_of(match["module"]) for key in state if (match := KEY.match(key))}
    if unexpected := [key for key, module in deltas.items() if module not in layers]:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}. The adapter to "
            "be replaced does not target these modules: load the other one beside it, with load_adapter."
        )
    read_file(state, layers, adapter_name, config.counts)
    if not read_pairs(state, layers, adapter_name, whole=False) and config.r is not None:
        raise ValueError(
            f"the other adapter's config says r={config.r}, and its file has no low-rank pairs: the two do not belong "
            "together, or one is damaged."
        )
    own = model.peft_config[adapter_name]
    if (rows := rows_of_tokens(own, model)) != (others := rows_of_tokens(config, model)):
        raise ValueError(
            f"the other adapter trains rows {others or 'of no embedding'} (trainable_token_indices), and this one "
            f"{rows or 'of none'}: load the other one beside it, with load_adapter."
        )
    check_base(sam_layers(model), config.fingerprints, config.strict_base)
    before, own.selection = own.selection, config.selection
    try:
        set_peft_model_state_dict(model, state, adapter_name=adapter_name)
    except BaseException as error:
        own.selection = before
        if isinstance(error, KeyError):
            raise ValueError(f"the other adapter lacks the tensor {error}, which this one has.") from error
        raise
    if config.selection is not None:
        own.selection = config.selection
    for layer in layers.values():
        layer.set_scale(adapter_name, 1.0)
    if config.lora_alpha is not None:
        own.lora_alpha = config.lora_alpha
        for pair in pairs_of(model, adapter_name).values():
            pair.alpha = float(config.lora_alpha)


def register_swap() -> None:
    """Have PEFT's hot swapping take sparse adapters; what their configs hold and their files do not, `swap` compares.

    What `hotswap_adapter` calls is replaced, not the function, which may have been imported before this package.
    """
    hotswap.CONFIG_KEYS_TO_CHECK[SAM_SPARSE] = []

    @functools.wraps(_load_peft_weights)
    def load_peft_weights(model_id: str, *args: Any, **kwargs: Any) -> Any:
        where = {key: kwargs.get(key) for key in ("subfolder", "revision", "cache_dir", "token")}
        kwargs.pop("strict_base", None)  # it went into the config
        reads_sparse = _peft.reads_sparse  # a reloaded module has another one
        token = reads_sparse.set(lambda: isinstance(PeftConfig.from_pretrained(model_id, **where), SamConfig))
        try:
            return _load_peft_weights(model_id, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"the adapter file of {str(model_id)!r} is truncated or damaged ({error}).") from error
        finally:
            reads_sparse.reset(token)

    @functools.wraps(_swap_state_dict)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(config, SamConfig):
            swap(model, state_dict, adapter_name, config)
        else:
            _swap_state_dict(model, state_dict, adapter_name, config, *args, **kwargs)

    @functools.wraps(_prepare)
    def convert_scalings_to_tensor(model: Any) -> bool:
        # a sparse adapter is ready to be swapped as it is
        return _prepare(model) or any(isinstance(module, SamLayer) for module in model.modules())

    hotswap.load_peft_weights = load_peft_weights
    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict
    hotswap._convert_scalings_to_tensor = convert_scalings_to_tensor
