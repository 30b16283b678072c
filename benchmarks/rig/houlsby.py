"""Adapters (Houlsby et al. 2019, arXiv 1902.00751): two small residual networks in every layer of an encoder."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from benchmarks.rig.masked import train_only
from benchmarks.rig.method import Method, Setup

# Endings of the names of the linear layers whose output goes to a residual sum, of attention and of the feed-forward
# network: in BERT and the models built like it (attention.output.dense and output.dense), and in DistilBERT.
PLACES = ("output.dense", "attention.out_lin", "ffn.lin2")
# Houlsby et al. find any deviation below 1e-2 equally good; their code has this one.
INIT = 1e-3


class Bottleneck(nn.Module):
    """x + U gelu(D x + b) + c, with D: d → r, U: r → d near zero, so that it begins near the identity."""

    def __init__(self, like: nn.Linear, size: int) -> None:
        super().__init__()
        where = {"device": like.weight.device, "dtype": like.weight.dtype}
        self.down = nn.Linear(like.out_features, size, **where)
        self.up = nn.Linear(size, like.out_features, **where)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=INIT, a=-2 * INIT, b=2 * INIT)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x, (..., d)."""
        return x + self.up(nn.functional.gelu(self.down(x)))


class HoulsbyAdapter(Method):
    """A bottleneck after the attention's and after the feed-forward network's output, before dropout and residual sum.

    Trained are the bottlenecks, every layer norm outside the head (as in the paper; the embeddings' too), and the head.
    Neither the density nor the candidates matter: the trained entries are 2 d r + r + d for each of two places in each
    layer, d the hidden size and r the size here, and 2 d for each norm.

    Args:
        size: r, the width of a bottleneck.
        places: endings of the names of the linear layers to put one after.
    """

    name: ClassVar[str] = "houlsby"

    def __init__(self, size: int = 64, places: tuple[str, ...] = PLACES) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size!r}.")
        self.size, self.places = size, places

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Insert the bottlenecks; freeze the rest.

        Raises:
            ValueError: if the model has no such places.
        """
        heads = tuple(f"{module}." for module in setup.head)
        endings = tuple(f".{place}" for place in self.places)
        found = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(endings) and not name.startswith(heads)
        }
        if not found:
            raise ValueError(
                f"no linear layer's name ends with one of {list(self.places)}: say with places=(...) how this model "
                "calls the outputs of its attention and of its feed-forward networks."
            )
        norms = [m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and not name.startswith(heads)]
        self.own = [parameter for norm in norms for parameter in norm.parameters()]
        for name, linear in found.items():
            bottleneck = Bottleneck(linear, self.size)
            self.own += bottleneck.parameters()
            model.set_submodule(name, nn.Sequential(linear, bottleneck).train(model.training))
        train_only(model, setup, self.own)
        return model

    def trained(self, model: nn.Module, setup: Setup) -> int:
        """Entries of the bottlenecks and of the norms."""
        return sum(parameter.numel() for parameter in self.own)

    def stored_bytes(self, model: nn.Module, setup: Setup) -> int:
        """The bottlenecks and the norms."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.own)
