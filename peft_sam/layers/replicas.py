"""Values beside a sharded parameter: every process has all of them, and they must stay equal."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate


def keep_equal(values: nn.Parameter, parameter: Tensor) -> None:
    """Average the gradients of `values` over the processes that share `parameter`, if it is sharded.

    FSDP only knows the parameters that were there when it sharded the model.
    """
    if not isinstance(parameter, DTensor):
        return
    mesh = parameter.device_mesh

    def average(values: Tensor) -> None:
        assert values.grad is not None
        terms = DTensor.from_local(values.grad / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
        values.grad.copy_(terms.redistribute(placements=[Replicate()] * mesh.ndim).to_local())

    # a hook can only be registered while gradients are wanted, and stays when they are not
    wanted = values.requires_grad
    values.requires_grad_().register_post_accumulate_grad_hook(average)
    values.requires_grad_(wanted)
