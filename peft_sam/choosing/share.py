"""What of a full fine-tuning's first steps falls on the selected entries: from it follows their learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from peft_sam.choosing.processes import Processes

# Statistic → how far an entry takes the loss when all entries take equal steps; the first that a pass has.
REACH = {"gradient": torch.abs, "squared_gradient": torch.sqrt, "movement": torch.abs}
# So many digits of a share are kept: the order in which it is summed does not show.
DIGITS = 4
# So many entries are summed at a time.
CHUNK = 1 << 22


def reach(statistics: Mapping[str, Tensor], positions: Tensor) -> Tensor | None:
    """Of the entries of a parameter at flat positions, on the CPU; None if no data tells: all are alike."""
    kind = _told_by(statistics)
    if kind is None:
        return None
    flat = statistics[kind].flatten()
    return REACH[kind](flat[positions.to(flat.device)].cpu())


def _told_by(statistics: Mapping[str, Tensor]) -> str | None:
    return next((kind for kind in REACH if kind in statistics), None)


def _sum(values: Tensor) -> float:
    """Without what is NaN, which is never selected."""
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    return float(values.nansum(dtype=wide))


class Share:
    """Adds up the reach of all candidates, and that of the selected ones."""

    def __init__(self) -> None:
        self.all = self.selected = 0.0

    def add(self, statistics: Mapping[str, Tensor], entries: int) -> None:
        """See the candidates of a parameter, or of a piece of it."""
        kind = _told_by(statistics)
        if kind is None:
            self.all += entries
        else:
            self.all += sum(_sum(REACH[kind](chunk)) for chunk in statistics[kind].flatten().split(CHUNK))

    def select(self, found: Tensor | None, entries: int) -> None:
        """See selected ones, and their reach."""
        self.selected += entries if found is None else _sum(found)

    def share(self, sharing: Processes | None = None) -> float:
        """Σ of the selected over Σ of all, 0 if nothing tells; of all processes that hold parts."""
        sums = torch.tensor([self.selected, self.all], dtype=torch.float64)
        selected, total = (sums if sharing is None else sharing.sum(sums)).tolist()
        return float(f"{selected / total:.{DIGITS}g}") if 0 < total < inf else 0.0
