"""Tiny encoders of several architectures, methods on them, and a plain loop, for tests of the methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from benchmarks.rig.adapters import Hybrid, Sparse
from benchmarks.rig.diffpruning import DiffPruning
from benchmarks.rig.method import Method, Setup
from tests.shared.cases import VOCABULARY, bert

DENSITY = 0.05
STEPS = 8


def _shape() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**_shape()))


def distilbert() -> nn.Module:
    config = DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    return DistilBertForSequenceClassification(config)


def _batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(2, VOCABULARY, (6, 7)), "labels": torch.randint(0, 2, (6,))}


MODELS = {
    "BERT": (bert, ("classifier",)),
    "RoBERTa": (roberta, ("classifier",)),
    "DistilBERT": (distilbert, ("pre_classifier", "classifier")),
}
METHODS: dict[str, Callable[[], Method]] = {
    "DiffPruning": DiffPruning,
    "DiffPruning, projected every 3 steps": lambda: DiffPruning(burn_in=1.0, project_every=3),
    "SAM": Sparse,
    "hybrid": Hybrid,
}
PRUNING = [name for name in METHODS if name.startswith("DiffPruning")]


def make(name: str = "BERT") -> tuple[nn.Module, Setup]:
    maker, head = MODELS[name]
    torch.manual_seed(0)
    model = maker()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms of a pretrained model are not zeros and ones
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    linear = [module for module, kind in model.named_modules() if isinstance(kind, nn.Linear)]
    modules = tuple(module for module in linear if not module.startswith(head))
    batches = [_batch() for _ in range(3)]
    return model.eval(), Setup(DENSITY, 0, STEPS, 1e-2, batches, head, modules)


def train(method: Method, model: nn.Module, setup: Setup, lr: float = 1e-2, **options: Any) -> list[float]:
    """The loop's order of calls with plain AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(method.groups(model, lr), lr=lr, **options)
    losses = []
    for step in range(setup.steps):
        loss = model(**setup.batches[step % 3]).loss
        losses.append(float(loss.detach()))
        extra = method.penalty(model, step)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
    model.eval()
    return losses


def logits(model: nn.Module, setup: Setup) -> Tensor:
    with torch.no_grad():
        return model(**setup.batches[0]).logits


def weights(model: nn.Module, setup: Setup) -> dict[str, Tensor]:
    """The candidates as the modules of an adapted model read them."""
    found = {}
    for module in setup.candidates:
        owner = model.get_submodule(module)
        found.update({f"{module}.{name}": getattr(owner, name).detach().clone() for name in ("weight", "bias")})
    return found


def changed(model: nn.Module, setup: Setup, before: dict[str, Tensor]) -> int:
    return sum(int((tensor != before[name]).sum()) for name, tensor in weights(model, setup).items())
