"""The two ends of the scale: everything is trained, or only the head."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from benchmarks.rig.method import Method, Setup, named_rest


class Full(Method):
    """Full fine-tuning."""

    name: ClassVar[str] = "full"

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """All parameters ask for gradients."""
        return model.requires_grad_(True)

    def trained(self, model: nn.Module, setup: Setup) -> int:
        """All entries."""
        return sum(p.numel() for _, p in named_rest(model, setup) if p.requires_grad)

    def stored_bytes(self, model: nn.Module, setup: Setup) -> int:
        """All parameters."""
        return sum(p.numel() * p.element_size() for _, p in named_rest(model, setup) if p.requires_grad)


class HeadOnly(Full):
    """A frozen encoder."""

    name: ClassVar[str] = "head"

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Only the head asks for gradients, which the loop sees to."""
        return model.requires_grad_(False)
