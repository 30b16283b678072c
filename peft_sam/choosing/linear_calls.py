"""The gradient of a linear layer's parameters, from what goes in and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class LinearCall(NamedTuple):
    """Parameter `which` ("weight" or "bias") of a linear layer y = x Wᵀ + b, seen only through its calls.

    transposed: whether W is stored as (inputs × outputs).
    """

    module: nn.Module
    which: str
    transposed: bool = False

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """∂L/∂W = gradᵀ x, or ∂L/∂b = Σ grad, in float32 or better, for inputs x and the outputs' gradient."""
        dtype = torch.promote_types(grad.dtype, torch.float32)
        rows = grad.reshape(-1, grad.shape[-1]).to(dtype)
        if self.which == "bias":
            return rows.sum(0)
        inputs = x.reshape(-1, x.shape[-1]).to(rows.device, dtype)
        return inputs.t() @ rows if self.transposed else rows.t() @ inputs

    def listen(self, name: str, take: Callable[[str, Tensor], None]) -> RemovableHandle:
        """Give `take` the gradient of each call of the layer, under `name`, when backward passes it."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            x = args[0].detach()
            # nothing below the first layer asks for gradients
            y = output if output.requires_grad else output.detach().requires_grad_()

            def arrived(grad: Tensor) -> None:
                with torch.no_grad():
                    take(name, self.gradient(x, grad))

            y.register_hook(arrived)
            return y

        return self.module.register_forward_hook(hook)
