"""The ways to fine-tune that PEFT has, `SamConfig`'s among them, at PEFT's own defaults where nothing else is said."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.rig.method import Method, Setup, mean_loss, named_head, named_rest
from peft_sam import SamConfig, create_sam_optimizer, select_parameters
from peft_sam.choosing.dense import train_densely


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
        """Add the adapter and select on the training batches."""
        adapted = self.adapted(model, setup)
        self.select(adapted, setup)
        return adapted

    def adapted(self, model: nn.Module, setup: Setup) -> nn.Module:
        """The model with the adapter, pending where the score needs data."""
        adapted: Any = get_peft_model(model, self.config(model, setup))
        for _, parameter in named_head(adapted, setup):
            parameter.requires_grad_(True)
        return adapted

    def select(self, adapted: Any, setup: Setup) -> None:
        """Choose the entries, where that is still to be done."""
        if adapted.active_peft_config.needs_data:
            select_parameters(
                adapted, setup.batches, max_batches=self.max_batches, train_mode=self.train_mode, progress=False
            )

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """All at the run's rate, or the values at that over their share of the gradient."""
        if not self.full_rate:
            return super().groups(model, lr)
        every = create_sam_optimizer(model, torch.optim.AdamW, lr=lr).param_groups
        return [{"params": group["params"], "lr": group["lr"]} for group in every]


class LowRank(nn.Module):
    """alpha/r · B·A·x, added to what a layer makes of x; A as PEFT's LoRA starts it, B = 0."""

    def __init__(self, layer: nn.Linear, r: int, alpha: int) -> None:
        super().__init__()
        self.scale = alpha / r
        self.a = nn.Parameter(layer.weight.new_empty(r, layer.in_features))
        self.b = nn.Parameter(layer.weight.new_zeros(layer.out_features, r))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The output with it; a forward hook of the layer."""
        return output + self.scale * nn.functional.linear(nn.functional.linear(inputs[0], self.a), self.b)


@dataclass
class Hybrid(Sparse):
    """A low-rank pair beside a sparse delta in each linear layer (RoSA, Nikdan et al. 2024, arXiv 2401.04679).

    Attributes:
        r, alpha: of the low-rank pairs, which are trained at the run's rate.
        warm: steps in which the pairs and the head are trained alone, at the same rate, before the entries are chosen.
        scale: learning rate of the sparse values over that of the run.
    """

    name: ClassVar[str] = "hybrid"
    r: int = 1
    alpha: int = 8
    warm: int = 0
    scale: float = 1.0

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Add the pairs, warm them up, and choose entries with them in place."""
        layers = linear(model, setup)
        pairs = {name: LowRank(layer, self.r, self.alpha) for name, layer in layers.items()}
        model.low_rank = nn.ModuleList(pairs.values())
        if self.warm:
            hooks = [layers[name].register_forward_hook(pair) for name, pair in pairs.items()]
            trained = {**dict(model.low_rank.named_parameters()), **dict(named_head(model, setup))}
            options = {"what": "low-rank warm-up", "steps": self.warm, "lr": setup.lr, "progress": False}
            train_densely(model, trained, setup.batches, mean_loss(model), clip=1.0, **options)
            for hook in hooks:
                hook.remove()
        adapted: Any = self.adapted(model, setup)
        for name, pair in pairs.items():
            adapted.get_base_model().get_submodule(name).register_forward_hook(pair)
            pair.requires_grad_(True)
        self.select(adapted, setup)
        return adapted

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The sparse values at a rate of their own, the others at the run's."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        values = [parameter for name, parameter in trained.items() if ".sam_sparse_delta." in name]
        others = [parameter for name, parameter in trained.items() if ".sam_sparse_delta." not in name]
        return [{"params": values, "lr": self.scale * lr}, {"params": others, "lr": lr}]

    def stored_bytes(self, model: Any, setup: Setup) -> int:
        """The sparse half's file, and the numbers of the pairs."""
        pairs = model.get_base_model().low_rank.parameters()
        return super().stored_bytes(model, setup) + sum(p.numel() * p.element_size() for p in pairs)


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
