"""What the benchmarks share: models, methods of fine-tuning, interleaved timing, and the record of results."""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import profile
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

from peft_sam import SamConfig, Selection, select_parameters
from peft_sam.tuner.candidates import candidates_of

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import tasks

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

RESULTS = Path(__file__).parent / "results"
DENSITY = 0.005
# Kinds of linear layers in other models → in BERT's.
KINDS = {
    "attention.output.dense": "attention.output.dense",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "intermediate.dense": "intermediate.dense",
    "output.dense": "output.dense",
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "gate_proj": "intermediate.dense",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
}
# Repetitions that warm up and are not counted.
WARM_UP = 3


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 without its pooler, which gets no gradient from the hidden states."""
    return AutoModel.from_pretrained(tasks.default_model_path(), add_pooling_layer=False, dtype=torch.float32)


def roberta_base_shape() -> nn.Module:
    """Four layers of RoBERTa-base's shape with random weights."""
    return BertModel(BertConfig(num_hidden_layers=4), add_pooling_layer=False)


def llama(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int, shared: int = 1) -> nn.Module:
    """Llama's shape, random; `shared` heads have one key and value."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // shared,
    )
    return LlamaModel(config)


WIDE_LLAMA = "Llama 7 B shape, 2 layers"
SMOLLM = "SmolLM2-135M shape"
MINILM, ROBERTA, LLAMA, LARGE_LLAMA = "MiniLM", "RoBERTa-base shape, 4 layers", "Llama shape, 100 M", "Llama shape, 1 B"
MODELS: dict[str, Callable[[], nn.Module]] = {
    MINILM: minilm,
    ROBERTA: roberta_base_shape,
    LLAMA: partial(llama, 768, 2048, 12, 12, 8000),
    SMOLLM: partial(llama, 576, 1536, 30, 9, 49152, 3),
    LARGE_LLAMA: partial(llama, 2048, 5632, 20, 16, 32000),
    WIDE_LLAMA: partial(llama, 4096, 11008, 2, 32, 1000),
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


@functools.cache
def minilm_support() -> dict[str, Tensor]:
    """Parameter of MiniLM → mask of its real support."""
    model = get_peft_model(minilm(), SamConfig(density=DENSITY))
    real_support(model)
    masks = {}
    for name, delta in model.base_model.sparse_deltas().items():
        mask = torch.zeros(delta.shape, dtype=torch.bool)
        masks[name] = mask.view(-1).index_fill_(0, delta.indices, True).view(delta.shape)
    return masks


def stretched_support(model: Any) -> None:
    """MiniLM's support, each layer's stretched to the shape of the same kind of layer at the same relative depth.

    So the shares of entries, of touched rows and of touched columns are those of a real support.
    """
    candidates = candidates_of(model, "default")
    numbers = [int(part) for name in candidates for part in name.split(".") if part.isdigit()]
    depth, indices = max(numbers) + 1, {}
    for name, parameter in candidates.items():
        layer = next(int(part) for part in name.split(".") if part.isdigit())
        source = round((layer + 0.5) * 6 / depth - 0.5 - 1e-6)
        kind = next(there for here, there in KINDS.items() if f"{here}.{name.rpartition('.')[2]}" in name)
        mask = minilm_support().get(f"encoder.layer.{source}.{kind}.{name.rpartition('.')[2]}")
        indices[name] = torch.empty(0, dtype=torch.int64)
        if mask is not None:
            for axis, size in enumerate(parameter.shape):
                mask = mask.index_select(axis, torch.arange(size) * mask.shape[axis] // size)
            indices[name] = mask.flatten().nonzero().flatten()
    shapes = {name: parameter.shape for name, parameter in candidates.items()}
    select_parameters(model, selection=Selection(indices, shapes, "sam", "global", DENSITY, 0.0))


def floor(model: nn.Module, trained: int) -> Any:
    """Frozen; the embeddings' output asks for gradients."""
    return model.requires_grad_(False)


def sam(model: nn.Module, trained: int) -> Any:
    """The sparse adapter on a support chosen by gradients."""
    real = model.config.hidden_size == 384
    adapted = get_peft_model(model, SamConfig(density=DENSITY))
    (real_support if real else stretched_support)(adapted)
    return adapted


def sam_random(model: nn.Module, trained: int, r: int | None = None) -> Any:
    """The sparse adapter on a support without clusters, and low-rank pairs of rank r."""
    return get_peft_model(model, SamConfig(density=DENSITY, score="random", r=r))


def lora(model: nn.Module, trained: int, rank: int = 8) -> Any:
    """LoRA on all linear layers, no dropout."""
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


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
    "the same beside pairs, r=4": partial(sam_random, r=4),
    "LoRA r=8": lora,
    "LoRA r=16": partial(lora, rank=16),
    "SHiRA": shira,
    "Super-Tuning": supertuning,
    "full": full,
}


def make(method: str, shape: str, trained: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A model of `shape` adapted by `method`, the same for the same arguments."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[shape]()
    return METHODS[method](model.to(dtype), trained).to(device, dtype)


def trained_entries(model: Any) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def interleaved(steps: Mapping[str, Callable[[], None]], repetitions: int, what: str) -> dict[str, list[float]]:
    """Seconds of each repetition of each step; all steps in turn, then all again, ...

    Before a step is timed it runs once, so that it finds in the caches what it finds in training: its own traces.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in tqdm(range(repetitions + WARM_UP), desc=what, dynamic_ncols=True):
        for name, step in steps.items():
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], beside: str) -> dict[str, float]:
    """Medians of the ratios to one of the steps, repetition by repetition."""
    return {
        name: statistics.median(mine / theirs for mine, theirs in zip(times, seconds[beside], strict=True))
        for name, times in seconds.items()
    }


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds of each step."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most memory that a step has at once on top of what was there."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as recorded:
        step()
    now = most = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def environment(device: str) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def arguments(description: str, repetitions: int) -> argparse.Namespace:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="MiniLM only, few repetitions, nothing written")
    parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def carry_out(
    name: str, description: str, shapes: Sequence[str], repetitions: int, measure: Callable[..., dict[str, Any]]
) -> None:
    """A benchmark's command: measure each shape, or the first alone with --quick, and print and write what was found.

    Args:
        measure: (shape, repetitions, dtype, device) → a row; its dicts are printed.
    """
    args, results = arguments(description, repetitions), []
    for shape in shapes[:1] if args.quick else shapes:
        results.append(measure(shape, args.repetitions, getattr(torch, args.dtype), args.device))
        print(f"\n{shape}, {args.dtype}")
        for key, figures in results[-1].items():
            if isinstance(figures, dict):
                print(f"  {key}: " + ", ".join(f"{of} {figure:,.6g}" for of, figure in figures.items()), flush=True)
    if not args.quick:
        write(name, results, args)


def write(name: str, results: list[dict[str, Any]], args: argparse.Namespace) -> Path:
    """Put results and environment in a file of `benchmarks/results`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{args.device}-{args.dtype}.json"
    path.write_text(json.dumps({"environment": environment(args.device), "results": results}, indent=1) + "\n")
    print(f"written: {path}")
    return path
