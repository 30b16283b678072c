"""An optimizer for a model with sparse adapters, at one learning rate: that of full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import inf
from numbers import Real
from typing import Any

from torch import nn
from torch.optim import Optimizer

from peft_sam.config import SamConfig
from peft_sam.layers.found import deltas_of
from peft_sam.layers.low_rank import LowRank
from peft_sam.sparse.delta import PendingAdapterError

# LoRA's best rate over full fine-tuning's, with AdamW and α = 2 r (`benchmarks/results/recipes.md`)
LORA = 30


def create_sam_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    head_lr: float | None = None,
    lora_lr: float | None = None,
    **options: Any,
) -> Optimizer:
    """An optimizer that gives each sparse adapter's values the rate lr / share.

    share = Σ|g| over the selected entries / Σ|g| over all candidates (`Selection.share`). A step of equal size for all
    entries changes the loss by lr·Σ|g|, to first order; the fewer of the gradient the selected entries have, the
    larger a step takes as much. So `lr` is what full fine-tuning would take, about 1e-4 for AdamW, whatever the score
    and the density are. To such an optimizer it is the same as Δ = v / share with v trained at lr. Of n adapters that
    are trained beside each other each takes lr / (n · share), so that together they change the loss by as much.

        select_parameters(trainer)
        trainer.optimizer = create_sam_optimizer(model, torch.optim.AdamW, lr=1e-4)
        trainer.train()

    Args:
        model: with SAM adapters whose parameters are selected; those that are active are trained.
        optimizer_cls: one whose steps grow neither with the gradient nor with the values: Adam, AdamW, Lion.
        lr: learning rate of full fine-tuning.
        head_lr: that of what is trained besides the adapters, such as a new head; `lr` by default.
        lora_lr: that of low-rank pairs, as LoRA's; 30 times `lr` by default.
        options: of the optimizer, for all.

    Raises:
        PendingAdapterError: if the parameters of an adapter are not selected yet.
        ValueError: if no sparse adapter is trained, lr is no positive number, or an adapter does not know its share.
    """
    for name, rate in (("lr", lr), ("head_lr", head_lr), ("lora_lr", lora_lr)):
        if rate is None and name != "lr":
            continue
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate < inf:
            raise ValueError(f"{name} must be a positive number, a learning rate such as 1e-4; got {rate!r}.")
    trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    groups: list[dict[str, Any]] = []
    for part, name, config in _adapters(model):
        held = [id(delta.values) for delta in deltas_of(part, name).values()]
        if found := [trained.pop(one) for one in held if one in trained]:
            groups.append({"params": found, "lr": lr / _share(name, config)})
    if not groups:
        raise ValueError(
            f"no SAM adapter of this {type(model).__name__} is trained: make one with get_peft_model(model, "
            "SamConfig(...)), or activate one with model.set_adapter(...)."
        )
    for group in groups:
        group["lr"] /= len(groups)
    low_rank = [id(p) for module in model.modules() if isinstance(module, LowRank) for p in module.parameters()]
    if pairs := [trained.pop(one) for one in low_rank if one in trained]:
        groups.append({"params": pairs, "lr": LORA * lr if lora_lr is None else lora_lr})
    if trained:
        groups.append({"params": list(trained.values()), "lr": lr if head_lr is None else head_lr})
    return optimizer_cls(groups, lr=lr, **options)


def _adapters(model: nn.Module) -> Iterator[tuple[nn.Module, str, SamConfig]]:
    """Part, name and config of the SAM adapters of a model or of parts of it; some more than once."""
    for part in model.modules():
        configs = getattr(part, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, Mapping) else ():
            if isinstance(config, SamConfig):
                yield part, name, config


def _share(adapter_name: str, config: SamConfig) -> float:
    """What of a full fine-tuning's first steps falls on the adapter's entries.

    Raises:
        PendingAdapterError: if none are selected.
        ValueError: if it was not recorded.
    """
    if config.selection is None:
        raise PendingAdapterError(adapter_name, "given an optimizer")
    share = float(config.selection.get("share") or 0)
    if not 0 < share <= 1:
        raise ValueError(
            f"adapter {adapter_name!r} does not say which share of the gradient its entries have: it was selected by "
            "an earlier version, made of others, or comes from a state dict alone. Choose its rate yourself: "
            "torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=...)."
        )
    return share
