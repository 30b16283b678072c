"""The door to PEFT: the names that it keeps private, and the only place that changes its tables and methods.

Everything else in this package uses what PEFT documents.

Imports nothing of the package.
Imported by: config, layers, files, tuner.

* `names`: PEFT's private names; `quantised`: its access to quantised weights.
* `kind`: the member SAM_SPARSE of its enum of types.
* `mixed`, `configs`, `cards`, `files`: where PEFT's own way of doing a thing leaves sparse adapters out.
* `embeddings`: what of the base's own is in an adapter's state; `auto`: transformers' way to load an adapter.
* `pickles`: reading files that are pickles.
* `register`: enters all of it.
"""

from peft_sam._peft.files import file_follows, reads_sparse
from peft_sam._peft.kind import SAM_SPARSE
from peft_sam._peft.names import (
    EMBEDDING_LAYER_NAMES,
    SUPPORTED_PEFT,
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    ExcludedModule,
    NoMatchingPeftModuleError,
    QuantizationBackend,
    check_adapters_to_merge,
    check_target_module_exists,
    dare_linear,
    dare_ties,
    get_input_embeddings_name,
    hotswap,
    hotswap_adapter_from_state_dict,
    keep_saved_modules_tied,
    load_peft_weights,
    magnitude_prune,
    match_target_against_key,
    prepare_swap,
    task_arithmetic,
    ties,
)
from peft_sam._peft.quantised import quantization_backend
from peft_sam._peft.register import register

__all__ = [
    "EMBEDDING_LAYER_NAMES",
    "SAM_SPARSE",
    "SUPPORTED_PEFT",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "ExcludedModule",
    "NoMatchingPeftModuleError",
    "QuantizationBackend",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "dare_linear",
    "dare_ties",
    "file_follows",
    "get_input_embeddings_name",
    "hotswap",
    "hotswap_adapter_from_state_dict",
    "keep_saved_modules_tied",
    "load_peft_weights",
    "magnitude_prune",
    "match_target_against_key",
    "prepare_swap",
    "quantization_backend",
    "reads_sparse",
    "register",
    "task_arithmetic",
    "ties",
]
