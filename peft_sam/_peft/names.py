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
    from peft.utils.error import NoMatchingPeftModuleError
    from peft.utils.hotswap import (
        _convert_scalings_to_tensor as prepare_swap,
    )
    from peft.utils.hotswap import (
        hotswap_adapter_from_state_dict,
        load_peft_weights,
    )
    from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
    from peft.utils.other import AuxiliaryTrainingWrapper
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

__all__ = [
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
    "get_quantization_kwargs",
    "hotswap",
    "hotswap_adapter_from_state_dict",
    "load_peft_weights",
    "magnitude_prune",
    "mixed",
    "peft",
    "prepare_swap",
    "resolve_quantization_backend",
    "save_and_load",
    "task_arithmetic",
    "ties",
]
