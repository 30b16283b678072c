"""Selection by movement: the lottery-ticket mask of Ansell et al. 2022 (arXiv 2110.07560), trained as a SAM adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import get_peft_model
from torch import nn
from transformers import get_linear_schedule_with_warmup

from benchmarks.paper.loop import endless
from benchmarks.paper.masked import candidates, train_only
from benchmarks.paper.method import Setup, named_head
from benchmarks.paper.methods_sam import Sparse
from peft_sam import choose, select_parameters


@dataclass
class Movement(Sparse):
    """The entries that moved furthest in a short full fine-tuning, which is then undone.

    Attributes:
        rehearsal, rehearsal_lr: steps of the full fine-tuning, and its peak learning rate, which falls linearly to
            zero. The head is trained with it and put back, too.
    """

    name: ClassVar[str] = "movement"
    rehearsal: int = 200
    rehearsal_lr: float = 1e-4

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Rehearse, measure, put back; add the adapter and select."""
        parameters = candidates(model, setup)
        train_only(model, setup, parameters.values())
        trained = [*parameters.values(), *(p for _, p in named_head(model, setup))]
        before = [p.detach().clone() for p in trained]
        optimizer = torch.optim.AdamW(trained, lr=self.rehearsal_lr, weight_decay=0.0, fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, self.rehearsal // 10, self.rehearsal)
        source = endless(setup.batches)
        model.train()
        for _ in range(self.rehearsal):
            model(**next(source)).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        moved = {n: p.detach() - b for (n, p), b in zip(parameters.items(), before, strict=False)}  # the head is last
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
        selection = choose(
            parameters, score="sam", density=setup.density, budget=self.budget, statistics={"gradient": moved}
        )
        adapted: Any = get_peft_model(model, self.config(model, setup))
        select_parameters(adapted, selection=selection, progress=False)
        return adapted
