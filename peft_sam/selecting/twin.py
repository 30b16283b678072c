"""A sharded twin of a model, for the time of a pass."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

if TYPE_CHECKING:
    from accelerate import Accelerator


def sharded_twin(model: nn.Module, accelerator: Accelerator | None) -> nn.Module:
    """The model itself, or, where Accelerate is going to shard it for training, a copy sharded already (FSDP2).

    An adapter must have its support before FSDP2 or DeepSpeed take the model with its optimizer; the pass needs the
    shards before that. The copy shares the model's weights until they are sharded, and is thrown away with its shards
    after the pass.

    Raises:
        ValueError: for a model that is sharded already in a way that hides the parameters.
    """
    modules = list(model.modules())
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "DeepSpeed ZeRO-3 has taken the parameters apart: select before Accelerate prepares the model, and load it "
            "without deepspeed.zero.Init (make the TrainingArguments after the model), or shard with FSDP2 "
            "(fsdp_version: 2)."
        )
    kind = None if accelerator is None else accelerator.distributed_type
    one = kind == DistributedType.FSDP and accelerator is not None and not accelerator.is_fsdp2
    if one or any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError(
            "FSDP1 flattens the parameters, so that the entries cannot be told apart: use FSDP2 (fsdp_version: 2)."
        )
    sharding = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if accelerator is None or not sharding or any(isinstance(module, FSDPModule) for module in modules):
        return model
    shared = {
        id(p): nn.Parameter(p.detach(), p.requires_grad) if isinstance(p, nn.Parameter) else p
        for p in (*model.parameters(), *model.buffers())
    }
    twin = copy.deepcopy(model, shared)
    if kind == DistributedType.FSDP:
        return fsdp2_prepare_model(accelerator, twin)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = getattr(model, "_no_split_modules", None) or ()
    for module in list(twin.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    return twin
