"""Methods that PEFT has, at its own defaults unless the paper says otherwise."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import IA3Config, LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import nn

from benchmarks.rig.method import Method, Setup, named_rest


class Adapter(Method):
    """A PEFT adapter on the candidates."""

    def config(self, model: nn.Module, setup: Setup) -> PeftConfig:
        """What PEFT is told."""
        raise NotImplementedError

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """The model with the adapter."""
        return get_peft_model(model, self.config(model, setup))

    def trained(self, model: nn.Module, setup: Setup) -> int:
        """The adapter's trainable numbers."""
        return sum(p.numel() for _, p in named_rest(model, setup) if p.requires_grad)

    def stored_bytes(self, model: nn.Module, setup: Setup) -> int:
        """The adapter's file."""
        return saved_bytes(model)


def saved_bytes(model: Any) -> int:
    """Size of the file of an adapter without modules_to_save."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return Path(folder, "adapter_model.safetensors").stat().st_size


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
    dropout: float = 0.0

    def config(self, model: nn.Module, setup: Setup) -> PeftConfig:
        """Rank r on all linear candidates."""
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=list(linear(model, setup))
        )


@dataclass
class Shira(Adapter):
    """SHiRA (Bhardwaj et al. 2024) with its random mask."""

    name: ClassVar[str] = "shira"
    r: int = 0

    def config(self, model: nn.Module, setup: Setup) -> PeftConfig:
        """The rank r, or the one whose r·(in + out) entries of each layer are in sum nearest to the density's."""
        layers = linear(model, setup)
        wanted = setup.density * sum(p.numel() for layer in layers.values() for p in layer.parameters())
        rank = self.r or max(1, round(wanted / sum(m.in_features + m.out_features for m in layers.values())))
        return ShiraConfig(r=rank, random_seed=setup.seed, target_modules=list(layers))


@dataclass
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
class Ia3(Adapter):
    """(IA)³ (Liu et al. 2022): factors of keys, values and the feed-forward layer's hidden units."""

    name: ClassVar[str] = "ia3"

    def config(self, model: nn.Module, setup: Setup) -> PeftConfig:
        """PEFT's targets for this kind of encoder."""
        body: Any = model.body
        kind = body.config.model_type
        targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[kind]
        feedforward = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind]
        return IA3Config(target_modules=targets, feedforward_modules=feedforward)
