"""Whether something has taken a pending adapter's values already, so that their entries would not be trained.

Values keep their `nn.Parameter` from the pending state on: an optimizer that was made before the selection trains them.
Where that cannot be, the selection is refused before it starts, with the line to move.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import Trainer

from peft_sam.layers.deltas import is_held
from peft_sam.layers.found import deltas_of

if TYPE_CHECKING:
    from accelerate import Accelerator

LINES = """Move the line up:

    peft_sam.select_parameters(trainer)      # before trainer.train(), not in a callback
    trainer.train()

or, without a Trainer,

    peft_sam.select_parameters(model, dataloader, accelerator=accelerator)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model, optimizer = accelerator.prepare(model, optimizer)"""


def check_not_taken(
    model: nn.Module, adapted: nn.Module, adapter_name: str, trainer: Trainer | None, accelerator: Accelerator | None
) -> None:
    """Whether the entries that are about to be selected would be trained by what was prepared before.

    Args:
        model: what is trained; `adapted` is itself or a part of it.
        trainer, accelerator: whose optimizers are looked at, too.

    Raises:
        ValueError: if not; says who has taken the values, and which line to move.
    """
    values = [delta.values for delta in deltas_of(adapted, adapter_name).values() if delta.values.requires_grad]
    if any(map(is_held, values)):
        raise ValueError(
            "the model was given to DistributedDataParallel before its parameters are selected, and the new entries' "
            f"gradients would not be averaged: each process would train an adapter of its own. {LINES}"
        )
    if any(hasattr(parameter, "param_idx_in_group") for parameter in model.parameters()):
        raise ValueError(
            "the model was given to DeepSpeed before its parameters are selected, and DeepSpeed's optimizer would not "
            f"train the new entries. {LINES}"
        )
    if any(map(_is_in_an_optimizer, (one for one in values if isinstance(one, DTensor)))):
        raise ValueError(
            "the optimizer was made for a sharded model (FSDP2) before its parameters are selected, and would not "
            f"train the new entries. {LINES}"
        )
    _check_optimizers(model, values, _known(trainer, accelerator))


def _known(trainer: Trainer | None, accelerator: Accelerator | None) -> list[Optimizer]:
    found = [] if accelerator is None else list(accelerator._optimizers)
    if trainer is not None and trainer.optimizer is not None:
        found.append(trainer.optimizer)
    return found


def _check_optimizers(model: nn.Module, values: Iterable[nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    """Whether optimizers that train this model hold the values, and nothing that they keep is of the old size.

    Raises:
        ValueError: if not.
    """
    own = {id(parameter) for parameter in model.parameters()}
    held = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if not own & held.keys():
        return
    for one in values:
        if id(one) not in held:
            raise ValueError(
                "the optimizer was made before the adapter, or for a part of its parameters: it does not hold all "
                f"values of the adapter, and would not train the new entries. {LINES}"
            )
        kept = held[id(one)].state.get(one, {}).values()
        if any(isinstance(tensor, torch.Tensor) and tensor.shape == one.shape for tensor in kept):
            raise ValueError(
                f"the optimizer ({type(held[id(one)]).__name__}) has state for the adapter already, which is of the "
                f"size before the selection: no entries. {LINES}"
            )


def _is_in_an_optimizer(parameter: nn.Parameter) -> bool:
    """Whether any optimizer's groups list this very parameter: sharded values do not stay the same, so nobody may."""
    lists = [holder for holder in gc.get_referrers(parameter) if type(holder) is list]
    return any(type(owner) is dict and owner.get("params") is one for one in lists for owner in gc.get_referrers(one))
