"""What a training step costs: SAM beside LoRA, PEFT's other sparse tuners and full fine-tuning, in one run.

    python benchmarks/step.py            # all shapes; --quick for fewer repetitions of one shape

Every figure is a ratio to the *floor*: the same model, frozen, with gradients flowing through it down to the first
layer. Methods are interleaved, and medians over repetitions are compared; the trained entries of the sparse methods
are as many as SAM's. The support of MiniLM is a real one, selected on the examples' text; the other shapes get
supports with the same share of active rows and columns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

from peft_sam import SamConfig, Selection, select_parameters
from peft_sam.model import candidates_of

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import tasks

RESULTS = Path(__file__).parent / "results"
DENSITY = 0.005
# Active rows and columns of a layer under a real support make about 5.5 % of its product (measured with MiniLM).
ACTIVE = 0.055**0.5


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 without its pooler, which gets no gradient from the hidden states."""
    return AutoModel.from_pretrained(tasks.default_model_path(), add_pooling_layer=False)


def roberta_base_shape() -> nn.Module:
    """Four layers of RoBERTa-base's shape with random weights."""
    return BertModel(BertConfig(num_hidden_layers=4), add_pooling_layer=False)


def llama_shape() -> nn.Module:
    """About 100 million parameters in Llama's shape, random."""
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        use_cache=False,
    )
    return LlamaModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MiniLM": minilm,
    "RoBERTa-base shape, 4 layers": roberta_base_shape,
    "Llama shape, 100 M": llama_shape,
}


def real_support(model: Any) -> None:
    """Select on sentences in their natural and a scrambled order, by a linear head on the mean hidden state."""
    task = tasks.embedded_task(train_sentences=128)
    tokenizer = AutoTokenizer.from_pretrained(tasks.default_model_path())
    torch.manual_seed(0)
    head = torch.randn(2, model.get_base_model().config.hidden_size)

    def loss(model: Any, rows: dict[str, list[Any]]) -> Tensor:
        batch = tokenizer(rows["text"], padding=True, return_tensors="pt").to(model.device)
        logits = model(**batch).last_hidden_state.mean(1) @ head.to(model.device).t()
        return nn.functional.cross_entropy(logits.float(), torch.tensor(rows["label"], device=model.device))

    batches = [task.train[start : start + 16] for start in range(0, len(task.train), 16)]
    select_parameters(model, batches, loss_fn=loss, count_fn=lambda rows: len(rows["label"]), progress=False)


def clustered_support(model: Any) -> None:
    """k entries of each weight inside a random share of its rows and columns."""
    generator = torch.Generator().manual_seed(0)
    indices = {}
    candidates = candidates_of(model, "default")
    for name, parameter in candidates.items():
        indices[name] = torch.empty(0, dtype=torch.int64)
        if parameter.ndim == 2:
            rows, columns = (
                torch.randperm(size, generator=generator)[: max(1, int(ACTIVE * size))] for size in parameter.shape
            )
            inside = (rows[:, None] * parameter.shape[1] + columns).flatten()
            k = int(DENSITY * parameter.numel())
            indices[name] = inside[torch.randperm(len(inside), generator=generator)[:k]].sort().values
    shapes = {name: parameter.shape for name, parameter in candidates.items()}
    select_parameters(model, selection=Selection(indices, shapes, "sam", "global", DENSITY, 0.0))


def floor(model: nn.Module, trained: int) -> Any:
    """Frozen; the embeddings' output asks for gradients."""
    return model.requires_grad_(False)


def sam(model: nn.Module, trained: int) -> Any:
    """The sparse adapter on its clustered support."""
    real = isinstance(model, BertModel) and model.config.hidden_size == 384
    adapted = get_peft_model(model, SamConfig(density=DENSITY))
    (real_support if real else clustered_support)(adapted)
    return adapted


def sam_random(model: nn.Module, trained: int) -> Any:
    """The sparse adapter on a support without clusters."""
    return get_peft_model(model, SamConfig(density=DENSITY, score="random"))


def lora(model: nn.Module, trained: int) -> Any:
    """LoRA of rank 8 on all linear layers, no dropout."""
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))


def shira(model: nn.Module, trained: int) -> Any:
    """SHiRA, whose count is a rank's: the rank nearest to as many entries."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    rank = max(1, round(trained / sum(m.in_features + m.out_features for m in linear)))
    return get_peft_model(model, ShiraConfig(r=rank, target_modules="all-linear"))


def supertuning(model: nn.Module, trained: int) -> Any:
    """Super-Tuning with the same share of entries in each layer."""
    entries = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    config = SupertuningConfig(sparsity=1 - trained / entries, target_modules="all-linear")
    return get_peft_model(model, config)


def full(model: nn.Module, trained: int) -> Any:
    """All parameters."""
    return model


METHODS: dict[str, Callable[[nn.Module, int], Any]] = {
    "floor": floor,
    "SAM": sam,
    "SAM, random support": sam_random,
    "LoRA r=8": lora,
    "SHiRA": shira,
    "Super-Tuning": supertuning,
    "full": full,
}


class Step:
    """One method's model and the forward and backward pass that is timed."""

    def __init__(self, model: Any, batch: int, length: int, dtype: torch.dtype, device: str) -> None:
        self.model = model.to(device, dtype).train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_())
        self.ids = torch.randint(5, 5000, (batch, length), device=device)
        self.grad = torch.randn(batch, length, base.config.hidden_size, dtype=dtype, device=device) / 1e3

    def __call__(self) -> None:
        """Forward and backward once."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self.model(input_ids=self.ids).last_hidden_state.backward(self.grad)
        if self.ids.is_cuda:
            torch.cuda.synchronize()

    def saved_bytes(self) -> int:
        """Bytes of the distinct tensors that autograd keeps for backward, parameters apart."""
        known = {p.untyped_storage().data_ptr() for p in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
                storage = part.untyped_storage()
                if storage.data_ptr() not in known:
                    kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.model(input_ids=self.ids).last_hidden_state
        total = sum(kept.values())
        out.backward(self.grad)
        return total


def trained_entries(model: Any) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def measure(shape: str, batch: int, length: int, repetitions: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Time and memory of every method on one shape, interleaved."""
    steps: dict[str, Step] = {}
    trained = 0
    counts = {}
    for name, method in METHODS.items():
        torch.manual_seed(0)
        model = method(MODELS[shape](), trained)
        counts[name] = trained_entries(model)
        trained = trained or (counts[name] if name == "SAM" else 0)
        steps[name] = Step(model, batch, length, dtype, device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in tqdm(range(repetitions + 2), desc=f"{shape}, {batch} x {length}", dynamic_ncols=True):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repetition >= 2:
                seconds[name].append(time.perf_counter() - start)
    saved = {name: step.saved_bytes() for name, step in steps.items()}
    return {
        "shape": shape,
        "batch": batch,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "trained": counts,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": {
            name: statistics.median(t / f for t, f in zip(times, seconds["floor"], strict=True))
            for name, times in seconds.items()
        },
        "saved_mib": {name: bytes_ / 2**20 for name, bytes_ in saved.items()},
    }


def environment(device: str) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(result: dict[str, Any]) -> str:
    """One shape as a Markdown table."""
    lines = [
        f"**{result['shape']}**, {result['batch']} x {result['length']} tokens, {result['dtype']}",
        "",
        "| method | trained | step / floor | saved for backward |",
        "|---|---:|---:|---:|",
    ]
    for name, ratio in result["ratio"].items():
        lines.append(f"| {name} | {result['trained'][name]:,} | {ratio:.2f} | {result['saved_mib'][name]:.0f} MiB |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="MiniLM only, few repetitions")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    shapes = [("MiniLM", 16, 64), ("MiniLM", 8, 16)]
    if not args.quick:
        shapes += [("MiniLM", 8, 128)]
        shapes += [("RoBERTa-base shape, 4 layers", *size) for size in ((16, 64), (8, 128), (8, 16))]
        shapes += [("Llama shape, 100 M", 4, 128)]
    results = []
    for shape, batch, length in shapes:
        repetitions = 8 if args.quick else args.repetitions
        results.append(measure(shape, batch, length, repetitions, getattr(torch, args.dtype), args.device))
        print(f"\n{show(results[-1])}\n", flush=True)
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"step-{args.device}-{args.dtype}.json"
        path.write_text(json.dumps({"environment": environment(args.device), "results": results}, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
