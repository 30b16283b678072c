"""The Hessian's diagonal: Hutchinson's estimate, and damping."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from peft_sam.choosing.processes import Processes


def signs(name: str, like: Tensor, probe: int, seed: int) -> Tensor:
    """Rademacher's vector number `probe` for a parameter: the same on every device, batch and process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {probe} {name}".encode()))
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8, device="cpu")
    return bits.to(like.device, like.dtype).mul_(2).sub_(1)


def hessian_products(
    gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor], probes: int, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """v ⊙ Hv for each probe and parameter; its mean over probes estimates the diagonal of H (Hutchinson 1989).

    Unbiased, since E[v_i v_j] is 1 for i = j and else 0; the variance of entry i is Σ_{j≠i} H_ij² / probes.

    Args:
        gradients: of the loss in the parameters, made with create_graph=True; those that do not depend on any
            parameter are left out.
    """
    names: Sequence[str] = [name for name, gradient in gradients.items() if gradient.requires_grad]
    for probe in range(probes if names else 0):
        vectors = {name: signs(name, parameter, probe, seed) for name, parameter in parameters.items()}
        products = torch.autograd.grad(
            [gradients[name] for name in names],
            list(parameters.values()),
            grad_outputs=[vectors[name] for name in names],
            retain_graph=probe < probes - 1,
            allow_unused=True,
        )
        for name, product in zip(parameters, products, strict=True):
            if product is not None:
                yield name, product * vectors[name]


def damped(
    diagonal: Mapping[str, Tensor], damping: float, absolute: bool, sharing: Processes | None = None
) -> dict[str, Tensor]:
    """|h| + λ, positive; λ is `damping`, or that share of the mean of |h| over all entries.

    Theorem 3 wants h > 0. Where the true Hessian has negative entries, |h| ranks by how fast the gradient changes.

    Args:
        sharing: the processes that hold the parts of `diagonal`, if it is sharded.
    """
    entries = sum(tensor.numel() for tensor in diagonal.values())
    total = sum(float(tensor.abs().sum(dtype=torch.float64)) for tensor in diagonal.values())
    if sharing is not None:
        total, entries = sharing.sum(torch.tensor([total, entries], dtype=torch.float64)).tolist()
    mean = total / entries
    smallest = torch.finfo(torch.float32).tiny
    added = max(damping if absolute else damping * mean, smallest)
    return {name: tensor.abs().add_(added) for name, tensor in diagonal.items()}
