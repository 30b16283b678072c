"""What of a full fine-tuning's first steps falls on the selected entries: from it follows their learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_sam.choosing.processes import Processes

# So many digits of a share are kept: the order in which it is summed does not show.
DIGITS = 4


def reach(statistics: Mapping[str, Tensor]) -> Tensor | None:
    """How far an entry takes the loss when all entries take equal steps, flat and in one unit for all parameters.

    |g|; where the pass has none, √(mean g_b²), or how far the entry moved. None if no data tells: all alike.
    """
    if "gradient" in statistics:
        return statistics["gradient"].flatten().abs()
    if "squared_gradient" in statistics:
        return statistics["squared_gradient"].flatten().sqrt()
    if "movement" in statistics:
        return statistics["movement"].flatten().abs()
    return None


class Share:
    """Adds up the reach of all candidates, and that of the selected ones."""

    def __init__(self) -> None:
        self.all = self.selected = 0.0

    def add(self, reach: Tensor | None, entries: int) -> None:
        """See the candidates of a parameter, or a piece of it."""
        self.all += entries if reach is None else float(reach.sum())

    def select(self, reach: Tensor | None, entries: int) -> None:
        """See selected ones; `reach` is theirs alone."""
        self.selected += entries if reach is None else float(reach.sum())

    def share(self, sharing: Processes | None = None) -> float:
        """Σ of the selected over Σ of all, 0 if nothing tells; of all processes that hold parts."""
        sums = torch.tensor([self.selected, self.all], dtype=torch.float64)
        selected, total = (sums if sharing is None else sharing.sum(sums)).tolist()
        return float(f"{selected / total:.{DIGITS}g}") if total > 0 else 0.0
