"""A sharded twin of a model, for the time of a pass."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

if TYPE_CHECKING:
    from accelerate import Accelerator


def sharded_twin(model: nn.Module, accelerator: Accelerator | None) -> nn.Module:
    """The model itself, or, where Accelerate is going to shard it for training (FSDP2), a copy sharded already.

    An adapter must have its support before Accelerate shards it with its optimizer; the pass needs the shards before
    that. The copy shares the model's weights until they are sharded, and is thrown away with its shards after the pass.

    Raises:
        ValueError: for other kinds of sharding, which hide the parameters.
    """
    modules = list(model.modules())
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "DeepSpeed ZeRO-3 keeps the parameters out of reach. Select before the model is given to DeepSpeed, or "
            "shard with FSDP2 (fsdp_version: 2)."
        )
    one = accelerator is not None and accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
    if one or any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError(
            "FSDP1 flattens the parameters, so that the entries cannot be told apart: use FSDP2 (fsdp_version: 2)."
        )
    if accelerator is None or not accelerator.is_fsdp2 or any(isinstance(module, FSDPModule) for module in modules):
        return model
    shared = {
        id(p): nn.Parameter(p.detach(), p.requires_grad) if isinstance(p, nn.Parameter) else p
        for p in (*model.parameters(), *model.buffers())
    }
    return fsdp2_prepare_model(accelerator, copy.deepcopy(model, shared))
