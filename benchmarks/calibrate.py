"""What the parts of a product cost on this device, as a row for `peft_sam/sparse/costs.py`.

    python benchmarks/calibrate.py            # --tiny: small sizes, to see that it runs

Each part is timed alone, many times in turn with the others, and its median divided by that of one multiplication of a
dense product: of W (outputs × inputs) with all tokens, in the dtype that models have on the device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import common
import torch
from torch.nn import functional as F

from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.plan import make_plan
from peft_sam.sparse.products import GRADIENTS, add_sparse

# device → dtype, outputs, inputs, tokens
SIZES = {"cpu": (torch.float32, 768, 3072, 1024), "cuda": (torch.bfloat16, 2048, 8192, 4096)}
TINY = (48, 64, 16)


def measure(device: str, tiny: bool, repetitions: int) -> dict[str, Any]:
    """The costs by name, and the multiplications in a second that they are relative to."""
    dtype, *sizes = SIZES[device]
    outputs, inputs, tokens = TINY if tiny else sizes
    torch.manual_seed(0)
    x, grad = (torch.randn(tokens, size, dtype=dtype, device=device) for size in (inputs, outputs))
    weight, room = torch.randn(2, outputs, inputs, dtype=dtype, device=device)
    few = torch.randperm(inputs, device=device)[: inputs // 16].sort().values.int()
    positions = torch.randperm(outputs * inputs, device=device)[: outputs * inputs // 200].sort().values
    delta = SparseDelta(weight.shape, positions, torch.randn(len(positions), device=device))
    scattered = make_plan(delta, transposed=False)
    one, some = few[:1], x[: max(1, tokens // 128)]

    def block() -> None:
        """What a second block calls, with next to nothing to do."""
        (grad[:1].index_select(1, one).t() @ x[:1].index_select(1, one)).view(-1).index_select(0, one * 0)
        x[:1].index_add_(1, one.long(), x[:1, :1] * 0)

    # name → the call, and how many times its unit is done in it
    parts: dict[str, tuple[Callable[[], Any], int]] = {
        "product": (lambda: F.linear(x, weight), tokens * weight.numel()),
        "move": (lambda: room.copy_(weight), weight.numel()),
        "gather": (lambda: x.index_select(1, few), tokens * len(few)),
        "second_block": (block, tokens),
        "entry": (
            lambda: add_sparse(grad[: len(some)], some, scattered, delta.values.detach()),
            len(some) * len(positions),
        ),
    }
    if scattered.starts is not None:
        parts["sampled"] = (lambda: GRADIENTS["sampled"](scattered, x, grad), tokens * len(positions))
    with torch.no_grad():
        steps = {name: call for name, (call, _) in parts.items()}
        seconds = common.medians(common.interleaved(steps, repetitions, "calibration"))
    each = {name: seconds[name] / times for name, (_, times) in parts.items()}
    costs = {name: max(1, round(time / each["product"])) for name, time in each.items()}
    return {"costs": {name: costs[name] for name in costs if name != "product"}, "per_second": 1 / each["product"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=sorted(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small sizes, few repetitions: only to see that it runs")
    args = parser.parse_args()
    found = measure(args.device, args.tiny, repetitions=2 if args.tiny else 20)
    where = common.environment(args.device)
    row = ", ".join(f"{name}={cost}" for name, cost in found["costs"].items())
    print(json.dumps({**found, "environment": where}))
    print(f'    "{where["device"]}": Costs({row}),')


if __name__ == "__main__":
    main()
