"""PEFT's access to quantised weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_sam._peft.names import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)


def quantization_backend(base_layer: nn.Module, tuner: Any) -> QuantizationBackend | None:
    """PEFT's access to the weight of a quantised layer, None if it is not quantised.

    To write torchao's weights PEFT needs the config of the quantisation, which models that transformers has quantised
    carry; others can only run.
    """
    try:
        return resolve_quantization_backend(base_layer, **get_quantization_kwargs(tuner))
    except ValueError:
        return ForwardOnlyQuantizationBackend("torchao, without the config of its quantisation")
