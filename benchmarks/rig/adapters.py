"""The ways to fine-tune that PEFT has, `SamConfig`'s among them, at PEFT's own defaults where nothing else is said."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn

from benchmarks.rig.method import Method, Setup, named_head, named_rest
from peft_sam import SamConfig, create_sam_optimizer, select_parameters


class Full(Method):
    """Full fine-tuning."""

    name: ClassVar[str] = "full"

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """All parameters ask for gradients."""
        return model.requires_grad_(True)


class Adapter(Method):
    """A PEFT adapter on the candidates."""

    def config(self, model: nn.Module, setup: Setup) -> PeftConfig:
        """What PEFT is told."""
        raise NotImplementedError

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """The model with the adapter."""
        return get_peft_model(model, self.config(model, setup))

    def stored_bytes(self, model: Any, setup: Setup) -> int:
        """The adapter's file, without modules_to_save."""
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, save_embedding_layers=False)
            return sum(file.stat().st_size for file in Path(folder).rglob("adapter_model.safetensors"))


def linear(model: nn.Module, setup: Setup) -> dict[str, nn.Linear]:
    """The linear layers among the candidates."""
    modules = dict(model.named_modules())
    return {name: modules[name] for name in setup.candidates if isinstance(modules[name], nn.Linear)}


@dataclass
class Lora(Adapter):
    """LoRA (Hu et al. 2021)."""

    name: ClassVar[str] = "lora"
    r: int = 8
    alpha: int = 8

    def config(self, model: nn.Module, setup: Setup) -> PeftConfig:
        """Rank r on all linear candidates."""
        return LoraConfig(r=self.r, lora_alpha=self.alpha, target_modules=list(linear(model, setup)))


class Shira(Adapter):
    """SHiRA (Bhardwaj et al. 2024) with its random mask."""

    name: ClassVar[str] = "shira"

    def config(self, model: nn.Module, setup: Setup) -> PeftConfig:
        """The rank whose r·(in + out) entries of each layer are in sum nearest to the density's."""
        layers = linear(model, setup)
        wanted = setup.density * sum(p.numel() for layer in layers.values() for p in layer.parameters())
        rank = max(1, round(wanted / sum(m.in_features + m.out_features for m in layers.values())))
        return ShiraConfig(r=rank, random_seed=setup.seed, target_modules=list(layers))


class Supertuning(Adapter):
    """Super-Tuning (arXiv 2607.09287): the largest weights of each layer."""

    name: ClassVar[str] = "supertuning"

    def config(self, model: nn.Module, setup: Setup) -> PeftConfig:
        """The sparsity that trains as many entries as the density says."""
        layers = linear(model, setup)
        wanted = setup.density * sum(p.numel() for layer in layers.values() for p in layer.parameters())
        sparsity = 1 - wanted / sum(layer.weight.numel() for layer in layers.values())
        return SupertuningConfig(sparsity=sparsity, target_modules=list(layers))


@dataclass
class Sparse(Adapter):
    """A sparse adapter on the candidates.

    Attributes:
        score, budget, damping: as in `SamConfig`.
        max_batches, train_mode: as in `select_parameters`.
        full_rate: whether the run's rate is that of full fine-tuning (`create_sam_optimizer`).
    """

    name: ClassVar[str] = "sam"
    score: str = "sam"
    budget: Literal["global", "tensor"] = "global"
    damping: float = 0.1
    max_batches: int | None = None
    train_mode: bool = False
    full_rate: bool = False

    def config(self, model: nn.Module, setup: Setup) -> SamConfig:
        """The adapter's configuration for this run."""
        return SamConfig(
            density=setup.density,
            score=self.score,
            budget=self.budget,
            damping=self.damping,
            seed=setup.seed,
            target_modules=list(setup.candidates),
        )

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Add the adapter, and select on the training batches where the score needs them."""
        adapted: Any = get_peft_model(model, self.config(model, setup))
        for _, parameter in named_head(adapted, setup):
            parameter.requires_grad_(True)
        if adapted.active_peft_config.needs_data:
            select_parameters(
                adapted, setup.batches, max_batches=self.max_batches, train_mode=self.train_mode, progress=False
            )
        return adapted

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """All at the run's rate, or the values at that over their share of the gradient."""
        if not self.full_rate:
            return super().groups(model, lr)
        every = create_sam_optimizer(model, torch.optim.AdamW, lr=lr).param_groups
        return [{"params": group["params"], "lr": group["lr"]} for group in every]


@dataclass
class Hybrid(Sparse):
    """A low-rank pair beside the sparse delta of each linear layer (RoSA, Nikdan et al. 2024, arXiv 2401.04679).

    Attributes:
        r, alpha: of the pairs, which are trained at the run's rate.
        scale: learning rate of the sparse values over that of the run.
    """

    name: ClassVar[str] = "hybrid"
    score: str = "random"
    r: int = 4
    alpha: float = 8
    scale: float = 1.0

    def config(self, model: nn.Module, setup: Setup) -> SamConfig:
        """That of the sparse half, with pairs."""
        return replace(super().config(model, setup), r=self.r, lora_alpha=float(self.alpha))

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The sparse values at a rate of their own, the others at the run's."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        values = [parameter for name, parameter in trained.items() if ".sam_sparse_delta." in name]
        others = [parameter for name, parameter in trained.items() if ".sam_sparse_delta." not in name]
        return [{"params": values, "lr": self.scale * lr}, {"params": others, "lr": lr}]


@dataclass
class BitFit(Sparse):
    """All biases of the encoder (Zaken et al. 2021): the score "bias" with as many entries as there are."""

    name: ClassVar[str] = "bitfit"
    score: str = "bias"

    def config(self, model: nn.Module, setup: Setup) -> SamConfig:
        """Every module of the encoder that owns parameters is a target."""
        owners = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
        owners = [name for name in owners if not f"{name}.".startswith(tuple(f"{head}." for head in setup.head))]
        rest = dict(named_rest(model, setup))
        biases = sum(p.numel() for name, p in rest.items() if p.ndim == 1 and name.endswith("bias"))
        # half an entry more, so that rounding down finds it
        density = (biases + 0.5) / sum(p.numel() for p in rest.values())
        return SamConfig(density=density, score="bias", seed=setup.seed, target_modules=owners)
