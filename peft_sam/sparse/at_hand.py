"""Parameters that stay in memory where PEFT has Accelerate offload the layer that holds them."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import remove_hook_from_module
from torch import nn


class AtHand(nn.Module):
    """A module of few numbers that is used, but not always called, by the layer that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self._remembered: dict[str, nn.Parameter] = {}

    def expect_dispatch(self) -> None:
        """Remember the parameters: PEFT is about to have Accelerate place the model's layers, on disk perhaps."""
        self._remembered = dict(self.named_parameters())

    def stay_at_hand(self) -> None:
        """Bring them back if they were offloaded with their layer: Accelerate's hook waits for a call."""
        remembered, self._remembered = self._remembered, {}
        hook: Any = getattr(self, "_hf_hook", None)
        if remembered and hook is not None:
            hook.offload = False  # or removing it would leave what it maps from its file in their place
            remove_hook_from_module(self)
            for name, parameter in remembered.items():
                setattr(self, name, parameter)
            self.to(hook.execution_device)
