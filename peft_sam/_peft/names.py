"""The names that PEFT keeps private, imported in one place.

If one of them moves, the import fails here, with the range of PEFT versions that is known to work.
"""

from __future__ import annotations

from importlib.metadata import version

SUPPORTED_PEFT = "peft>=0.21.0,<0.22"

try:
    import peft.mixed_model
    import peft.tuners.mixed
    import peft.tuners.mixed.model as mixed
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        check_adapters_to_merge,
        check_target_module_exists,
    )
    from peft.tuners.tuners_utils import (
        _ExcludedModule as ExcludedModule,
    )
    from peft.utils import hotswap, save_and_load
    from peft.utils.constants import EMBEDDING_LAYER_NAMES
    from peft.utils.error import NoMatchingPeftModuleError
    from peft.utils.hotswap import (
        _convert_scalings_to_tensor as prepare_swap,
    )
    from peft.utils.hotswap import (
        hotswap_adapter_from_state_dict,
        load_peft_weights,
    )
    from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
    from peft.utils.other import AuxiliaryTrainingWrapper, match_target_against_key
    from peft.utils.other import _get_input_embeddings_name as get_input_embeddings_name
    from peft.utils.quantization_utils import (
        ForwardOnlyQuantizationBackend,
        QuantizationBackend,
        get_quantization_kwargs,
        resolve_quantization_backend,
    )
except ImportError as error:
    raise ImportError(
        f"peft_sam supports {SUPPORTED_PEFT} and found peft {version('peft')}, which lacks a name that peft_sam "
        f'needs ({error}). Install a supported version: pip install "{SUPPORTED_PEFT}"'
    ) from error

# Has the copies that modules_to_save makes of tied layers share their parameters: (tuner, config, names).
keep_saved_modules_tied = LoraModel._add_modules_to_save_to_tie

__all__ = [
    "EMBEDDING_LAYER_NAMES",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SUPPORTED_PEFT",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "ExcludedModule",
    "ForwardOnlyQuantizationBackend",
    "NoMatchingPeftModuleError",
    "QuantizationBackend",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "dare_linear",
    "dare_ties",
    "get_input_embeddings_name",
    "get_quantization_kwargs",
    "hotswap",
    "hotswap_adapter_from_state_dict",
    "keep_saved_modules_tied",
    "load_peft_weights",
    "magnitude_prune",
    "match_target_against_key",
    "mixed",
    "peft",
    "prepare_swap",
    "resolve_quantization_backend",
    "save_and_load",
    "task_arithmetic",
    "ties",
]
