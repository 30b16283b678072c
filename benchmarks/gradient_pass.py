"""What the selection costs: the pass over the data, and the threshold, beside the plain ways, in one run.

    python benchmarks/gradient_pass.py            # --quick for fewer repetitions, nothing written
    python benchmarks/gradient_pass.py --plan     # memory and traffic for large models, from the formulas below

Time of the pass: over a plain forward and backward of the same batches with the same weights asking for gradients.
Memory: on top of the model, beside the formula. Threshold: over 10^8 scores, beside torch.topk and torch.kthvalue.
Processes: two with one core each beside one with one core, same data. Shards: bytes that two processes exchange for a
model sharded over them (FSDP2), beside the formula.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from peft_sam import Loss, SamConfig, accumulate, select_parameters
from peft_sam.choosing.processes import Processes
from peft_sam.choosing.threshold import bits_of, kth_largest
from peft_sam.tuner.candidates import candidates_of

SCORES = 10**8
CHUNK = 2**22
BATCHES, BATCH, LENGTH = 6, 16, 64
# Batches that one or two processes share.
WORK = 24


class Plan(NamedTuple):
    """Memory and traffic of a pass with score "sam", in bytes per device.

    entries: m, candidate entries. largest: of the largest candidate. unit: of the largest FSDP unit.
    width: bytes of a weight. devices: D.
    """

    entries: float
    largest: float
    unit: float
    width: int
    devices: int

    @property
    def whole_memory(self) -> float:
        """On a model that every device has: an accumulator per entry, and the largest gradient."""
        return 4 * self.entries + self.width * self.largest

    @property
    def whole_traffic(self) -> float:
        """One all-reduce of the accumulators after the last batch (a ring sends and gets each part twice)."""
        return 2 * 4 * self.entries * (self.devices - 1) / self.devices

    @property
    def sharded_memory(self) -> float:
        """On a sharded model: the shard's accumulators; two units' weights; the largest gradient, its float32 term.

        The term is reduced from a copy with equal parts, of which this device keeps one.
        """
        return 4 * self.entries / self.devices + 2 * self.width * self.unit + (self.width + 4 + 4) * self.largest

    @property
    def sharded_traffic(self) -> float:
        """Per batch: the weights are gathered for forward and backward, the float32 terms are scattered."""
        return (2 * self.width + 4) * self.entries * (self.devices - 1) / self.devices

    @property
    def threshold_traffic(self) -> float:
        """Of the threshold on a sharded model: two all-reduces of 65,536 counts."""
        return 2 * 2 * 8 * 2**16 * (self.devices - 1) / self.devices

    @property
    def support_traffic(self) -> float:
        """Every device gets the k = 0.005 m positions, 8 bytes each."""
        return 8 * common.DENSITY * self.entries


# hidden size, intermediate size, layers, share of key and value heads: Llama 2 7 B and 70 B, and a model of 400 B
LARGE = {
    "7 B": (4096, 11008, 32, 1.0),
    "70 B": (8192, 28672, 80, 1 / 8),
    "400 B": (16384, 53248, 126, 1 / 16),
}


def plan_of(model: str, devices: int) -> Plan:
    """The plan for the linear layers of a large model in bfloat16."""
    hidden, intermediate, layers, shared = LARGE[model]
    layer = hidden * hidden * (2 + 2 * shared) + 3 * hidden * intermediate
    return Plan(layers * layer, hidden * intermediate, layer, 2, devices)


def show_plans() -> str:
    """The formulas for large models as a Markdown table."""
    lines = [
        "| model | devices | whole: memory | whole: traffic, once | sharded: memory | sharded: traffic a batch "
        "| threshold | support |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model in LARGE:
        for devices in (8, 64, 512):
            plan = plan_of(model, devices)
            figures = [plan.whole_memory, plan.whole_traffic, plan.sharded_memory, plan.sharded_traffic]
            cells = [f"{figure / 2**30:,.1f} GiB" for figure in figures]
            cells += [f"{plan.threshold_traffic / 2**20:.1f} MiB", f"{plan.support_traffic / 2**30:.2f} GiB"]
            lines.append(f"| {model} | {devices} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def batches(number: int, batch: int = BATCH, length: int = LENGTH) -> list[Tensor]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 1000, (batch, length), generator=generator) for _ in range(number)]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """A loss that reaches every layer."""
    hidden: Tensor = model(input_ids=ids).last_hidden_state
    return hidden.float().square().mean()


def measure_pass(
    shape: str,
    repetitions: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] = (BATCH, LENGTH),
) -> dict[str, Any]:
    """Time and memory of the pass over batches of a size beside plain forward and backward."""
    model = common.make("full", shape, dtype=dtype, device=device).eval().requires_grad_(False)
    linear = {f"{n}.{leaf}": p for n, m in model.named_modules() if isinstance(m, nn.Linear) for leaf, p in own(m)}
    data = [ids.to(device) for ids in batches(BATCHES, *size)]

    def plain(number: int = BATCHES) -> None:
        for parameter in linear.values():
            parameter.requires_grad_(True)
        for ids in data[:number]:
            loss_of(model, ids).backward()
            for parameter in linear.values():
                parameter.grad = None
        for parameter in linear.values():
            parameter.requires_grad_(False)

    def passing(number: int = BATCHES) -> None:
        accumulate(model, linear, data[:number], lambda ids: Loss(loss_of(model, ids), size[0]), progress=False)

    seconds = common.interleaved({"plain": plain, "pass": passing}, repetitions, f"{shape}, pass")
    entries = sum(parameter.numel() for parameter in linear.values())
    largest = max(parameter.numel() for parameter in linear.values())
    plan = Plan(entries, largest, 0, dtype.itemsize, 1)
    frozen = common.peak_bytes(lambda: activations(model, data[0]), device)
    return {
        "shape": shape,
        "batch": size[0],
        "length": size[1],
        "dtype": str(dtype).removeprefix("torch."),
        "candidate_entries": entries,
        "seconds": common.medians(seconds),
        "pass_over_plain": common.ratios(seconds, "plain")["pass"],
        "peak_mib": {"plain": mib(common.peak_bytes(plain, device)), "pass": mib(common.peak_bytes(passing, device))},
        "peak_mib_by_formula": mib(plan.whole_memory + frozen),
    }


def activations(model: Any, ids: Tensor) -> None:
    """Forward and backward in which no weight gets a gradient, but all that flows does."""
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _module, _args, out: out.requires_grad_())
    for module in model.modules():  # what a weight's gradient needs is kept
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(True)
    loss = loss_of(model, ids)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(False)
    handle.remove()
    del loss


def own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A module's parameters."""
    return list(module.named_parameters(recurse=False))


def mib(size: float) -> float:
    """Bytes in MiB."""
    return round(size / 2**20, 1)


def measure_threshold(
    repetitions: int, device: str, number: int = SCORES, beside: tuple[str, ...] = ("topk", "kthvalue")
) -> dict[str, Any]:
    """The k-th largest of many scores, exactly, beside torch's ways."""
    torch.manual_seed(0)
    scores = torch.randn(number, device=device).abs_()
    k = int(common.DENSITY * number)
    found: dict[str, float] = {}

    def ours() -> None:
        chunks = lambda: (bits_of(scores[at : at + CHUNK]) for at in range(0, number, CHUNK))  # noqa: E731
        bits, _ = kth_largest(chunks, k)
        found["ours"] = float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))

    def topk() -> None:
        found["topk"] = float(torch.topk(scores, k).values[-1])

    def kthvalue() -> None:
        found["kthvalue"] = float(torch.kthvalue(scores, number - k + 1).values)

    ways = {
        name: way for name, way in (("ours", ours), ("topk", topk), ("kthvalue", kthvalue)) if name in ("ours", *beside)
    }
    seconds = common.interleaved(ways, repetitions, "threshold")
    assert len(set(found.values())) == 1, found
    return {
        "scores": number,
        "seconds": common.medians(seconds),
        "ours_over": {name: ratio_of(seconds["ours"], seconds[name]) for name in beside},
        "extra_mib": {name: mib(common.peak_bytes(way, device)) for name, way in ways.items()},
    }


def ratio_of(ours: list[float], theirs: list[float]) -> float:
    """The median of ratios, repetition by repetition."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def measure_budget() -> dict[str, Any]:
    """Whether a tenth of the memory finds the same entries."""
    found = []
    for share in (None, 10):
        torch.manual_seed(0)
        model: Any = get_peft_model(common.minilm(), SamConfig(density=common.DENSITY))
        entries = sum(parameter.numel() for parameter in candidates_of(model, "default").values())
        budget = None if share is None else 4 * entries // share
        selection = select_parameters(
            model, batches(2), loss_fn=loss_of, count_fn=len, memory_budget=budget, progress=False
        )
        found.append(selection)
    whole, parts = found
    different = sum(not torch.equal(whole.indices[name], parts.indices[name]) for name in whole.indices)
    return {"memory": "1/10", "parameters_with_other_entries": different, "k": whole.k, "seconds": parts.seconds}


class Traffic(TorchDispatchMode):
    """Counts the bytes that collectives hand over, as their formulas count them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, and count."""
        name, number = str(function), dist.get_world_size()
        share = (number - 1) / number
        if "allgather_base" in name or "all_gather_into_tensor" in name:
            whole = [arg for arg in args if isinstance(arg, Tensor)]
            self.sent["gather"] += int(max(t.numel() * t.element_size() for t in whole) * share)
        elif "reduce_scatter" in name:
            whole = [arg for arg in args if isinstance(arg, Tensor)]
            self.sent["scatter"] += int(max(t.numel() * t.element_size() for t in whole) * share)
        return function(*args, **(kwargs or {}))


def work(what: str, file: Path) -> None:
    """One process of several: run a pass, and write what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, number = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = common.minilm().eval().requires_grad_(False)
    names = {f"{n}.{leaf}" for n, m in model.named_modules() if isinstance(m, nn.Linear) for leaf, _ in own(m)}
    if what == "sharded":
        kept = common.peak_bytes(lambda: activations(model, batches(1)[0]), "cpu")
        mesh = init_device_mesh("cpu", (number,))
        for layer in model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    linear = {name: parameter for name, parameter in model.named_parameters() if name in names}
    data = batches(2 if what == "sharded" else WORK)[rank::number]

    def run(these: list[Tensor]) -> None:
        processes = Processes(torch.device("cpu"))
        accumulate(
            model, linear, these, lambda ids: Loss(loss_of(model, ids), BATCH), processes=processes, progress=False
        )

    result: dict[str, Any] = {}
    if what == "sharded":
        run(data[:1])
        result["peak_mib"] = mib(common.peak_bytes(lambda: run(data[:1]), "cpu"))
    run(data[:1])
    dist.barrier()
    start = time.perf_counter()
    with Traffic() as traffic:
        run(data)
    result["seconds"] = time.perf_counter() - start
    if what == "sharded":
        entries = sum(parameter.numel() for parameter in linear.values())
        root, every = (sum(p.numel() for p in of.parameters()) for of in (model.embeddings, model))
        scattered = 4 * entries * (number - 1) / number
        # what is no candidate is gathered too, and what FSDP's root holds itself stays after the forward pass
        gathered = 4 * (2 * (every - root) + root) * (number - 1) / number
        units = [sum(p.numel() for p in layer.parameters()) for layer in model.encoder.layer]
        plan = Plan(entries, max(p.numel() for p in linear.values()), max(units), 4, number)
        assert scattered + 2 * 4 * entries * (number - 1) / number == plan.sharded_traffic
        result["peak_mib_by_formula"] = mib(plan.sharded_memory + kept + 4 * root)
        result["bytes_by_formula"] = {"gather": gathered, "scatter": scattered}
        result["bytes_measured"] = dict(traffic.sent)
    if rank == 0:
        file.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def launch(what: str, processes: int) -> dict[str, Any]:
    """Run this file in so many processes of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        subprocess.run(
            [*command, f"--nproc-per-node={processes}", __file__, "--worker", what, str(file)],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        result: dict[str, Any] = json.loads(file.read_text())
        return result


def measure_processes(repetitions: int) -> dict[str, Any]:
    """One process beside two."""
    seconds: dict[str, list[float]] = {"one": [], "two": []}
    for _ in tqdm(range(repetitions), desc="processes"):
        for name, number in (("one", 1), ("two", 2)):
            seconds[name].append(launch("whole", number)["seconds"])
    return {"seconds": common.medians(seconds), "speedup": ratio_of(seconds["one"], seconds["two"])}


def main() -> None:
    """Measure, print, write."""
    if "--worker" in sys.argv:
        work(sys.argv[2], Path(sys.argv[3]))
        return
    if "--plan" in sys.argv:
        print(show_plans())
        return
    args = common.arguments(__doc__.partition("\n")[0], repetitions=10)
    repetitions = 3 if args.quick else args.repetitions
    results: list[dict[str, Any]] = []
    for shape in [common.MINILM] if args.quick else [common.MINILM, common.ROBERTA]:
        results.append({"what": "pass", **measure_pass(shape, repetitions, args.device)})
    results.append({"what": "threshold", **measure_threshold(min(repetitions, 5), args.device)})
    results.append({"what": "memory_budget", **measure_budget()})
    results.append({"what": "processes", **measure_processes(min(repetitions, 5))})
    results.append({"what": "shards", **launch("sharded", 2)})
    for result in results:
        print(json.dumps(result, indent=1), flush=True)
    if not args.quick:
        common.write("gradient_pass", results, args)


if __name__ == "__main__":
    main()
