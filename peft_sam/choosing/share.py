"""What of a full fine-tuning's first steps falls on the selected entries: from it follows their learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_sam.choosing.processes import Processes

# Statistic → how far an entry takes the loss when all entries take equal steps; the first that a pass has.
REACH = {"gradient": torch.abs, "squared_gradient": torch.sqrt, "movement": torch.abs}
# So many digits of a share are kept: the order in which it is summed does not show.
DIGITS = 4


def reach(statistics: Mapping[str, Tensor], positions: Tensor | None = None) -> Tensor | None:
    """Of the entries of a parameter, or of those at flat positions, on the CPU; None if no data tells: all alike."""
    kind = next((kind for kind in REACH if kind in statistics), None)
    if kind is None:
        return None
    flat = statistics[kind].flatten()
    return REACH[kind](flat if positions is None else flat[positions.to(flat.device)].cpu())


class Share:
    """Adds up the reach of all candidates, and that of the selected ones."""

    def __init__(self) -> None:
        self.all = self.selected = 0.0

    def add(self, statistics: Mapping[str, Tensor], entries: int) -> None:
        """See the candidates of a parameter, or of a piece of it."""
        found = reach(statistics)
        self.all += entries if found is None else float(found.sum())

    def select(self, found: Tensor | None, entries: int) -> None:
        """See selected ones, and their reach."""
        self.selected += entries if found is None else float(found.sum())

    def share(self, sharing: Processes | None = None) -> float:
        """Σ of the selected over Σ of all, 0 if nothing tells; of all processes that hold parts."""
        sums = torch.tensor([self.selected, self.all], dtype=torch.float64)
        selected, total = (sums if sharing is None else sharing.sum(sums)).tolist()
        return float(f"{selected / total:.{DIGITS}g}") if total > 0 else 0.0
