"""Every model class of transformers that can be built small does what the laws say, or is refused with a word.

For each class and for the default targets and "all": parameters are chosen on a batch, two steps train every delta that
has a gradient, the gradient is that of the merged model, merged and unmerged models compute and generate the same, a
saved adapter comes back to the bit, and unloading restores every bit of the base.

    PEFT_SAM_SWEEP=0/4       the first of four shards; all without it
    PEFT_SAM_SWEEP_OUT=file  where a JSON line for each class and targets is added
    PEFT_SAM_SWEEP_SECONDS   for one class and targets, 60 by default

`python -m tests.whole.test_sweep file` prints the table of such a file.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import logging

from peft_sam import SamConfig, select_parameters
from tests.shared.small import classes, first_output, small_inputs, small_model

SHARD = [int(part) for part in os.environ.get("PEFT_SAM_SWEEP", "0/1").split("/")]
OUT = os.environ.get("PEFT_SAM_SWEEP_OUT")
SECONDS = int(os.environ.get("PEFT_SAM_SWEEP_SECONDS", "60"))
TARGETS = (None, "all")
CASES = [(kind, name, targets) for kind, name in classes()[SHARD[0] :: SHARD[1]] for targets in TARGETS]
RESULTS = ("right", "refused", "late", "wrong", "not built")
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}


class Found(NamedTuple):
    """What came of a class: "right", "refused", "late" or "not built", with a word on why, or "wrong" with what is."""

    kind: str
    name: str
    targets: str | None
    result: str
    word: str


def loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    y = first_output(model(**inputs)).float()
    return (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).mean() + y.square().mean()


def afresh(model: Any, inputs: dict[str, Tensor] | None = None) -> Any:
    """A model as an epoch finds it: with nothing kept that was computed from earlier weights."""
    model.train()
    model.eval()  # LeViT keeps its biases in between
    if inputs is not None:
        with torch.no_grad():
            model(**inputs)  # what RecurrentGemma keeps from a call with gradients cannot be copied
    return model


def generated(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    given = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder_")}
    torch.manual_seed(0)
    found = model.generate(**given, max_new_tokens=3, do_sample=False, num_beams=1)
    return found if isinstance(found, Tensor) else found.sequences


def examine(kind: str, name: str, targets: str | None) -> Found:
    """Build a class small and hold it against the laws."""
    try:
        base = small_model(name)
        inputs = small_inputs(base, kind)
        loss(base, inputs).backward()
    except TimeoutError:
        raise
    except Exception as error:
        return Found(kind, name, targets, "not built", f"{type(error).__name__}: {error}"[:200])
    for parameter in base.parameters():
        parameter.grad = None
    generates = hasattr(base, "generate") and base.can_generate()
    try:
        with torch.no_grad():
            generated(base, inputs)
    except Exception:
        generates = False
    bits = {n: p.detach().clone() for n, p in base.named_parameters()}
    try:
        model = get_peft_model(copy.deepcopy(afresh(base, inputs)), SamConfig(density=0.02, target_modules=targets))
        select_parameters(afresh(model), [inputs], loss_fn=loss, progress=False)
    except ValueError as error:
        return Found(kind, name, targets, "refused", str(error)[:200])
    word = _wrong(model, base, inputs, bits, generates)
    return Found(kind, name, targets, "wrong" if word else "right", word)


def _wrong(model: Any, base: nn.Module, inputs: dict[str, Tensor], bits: dict[str, Tensor], generates: bool) -> str:
    for _ in range(2):
        loss(afresh(model), inputs).backward()
        deltas = model.base_model.sparse_deltas()
        for parameter, delta in deltas.items():
            if delta.values.grad is None:
                return f"no gradient reaches {parameter}"
        grads = {parameter: delta.values.grad.clone() for parameter, delta in deltas.items()}
        merged = copy.deepcopy(afresh(model, inputs)).merge_and_unload().requires_grad_()
        loss(merged, inputs).backward()
        dense = {n: p.grad for n, p in merged.named_parameters()}
        largest = max(float(grad.abs().max()) for grad in grads.values())
        for parameter, delta in deltas.items():
            expected = (
                dense[parameter].take(delta.indices) if dense.get(parameter) is not None else 0 * grads[parameter]
            )
            off, own = (float(tensor.abs().max()) for tensor in (grads[parameter] - expected, expected))
            if off > 1e-3 * own + 1e-6 * largest + 1e-9:
                return f"the gradient of {parameter} is not that of the merged model"
        with torch.no_grad():
            for parameter, delta in deltas.items():
                started, step = delta.values.any(), delta.values.grad / largest * 0.01
                delta.values -= step
                if step.any() and not started and not delta.values.any():
                    return f"{parameter} is not trained"
                delta.values.grad = None
    with torch.no_grad():
        apart = first_output(afresh(model)(**inputs))
        tokens = generated(model, inputs) if generates else None
        model.merge_adapter()
        if not torch.allclose(first_output(afresh(model)(**inputs)), apart, **CLOSE):
            return "merged and unmerged outputs differ"
        if tokens is not None and not torch.equal(generated(model, inputs), tokens):
            return "merged and unmerged models generate differently"
        model.unmerge_adapter()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        if not torch.equal(first_output(afresh(again)(**inputs)), apart):
            return "a reloaded adapter computes other bits"
        bare = model.unload()
    same = {n: torch.equal(p, bits[n]) for n, p in bare.named_parameters()}
    return "" if same.keys() == bits.keys() and all(same.values()) else "unloading does not restore the base"


def _late(*_: Any) -> None:
    raise TimeoutError(f"not done in {SECONDS} seconds")


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name", "targets"), CASES, ids=str)
def test_a_model_class_is_right_or_refused(kind: str, name: str, targets: str | None) -> None:
    found = timed(kind, name, targets)
    if OUT:
        with Path(OUT).open("a") as file:
            file.write(json.dumps(found._asdict()) + "\n")
    if found.result in ("late", "not built"):
        pytest.skip(found.word)
    assert found.result in ("right", "refused"), found.word


def timed(kind: str, name: str, targets: str | None) -> Found:
    """`examine`, with a limit of time."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        return examine(kind, name, targets)
    except TimeoutError as error:
        return Found(kind, name, targets, "late", str(error))
    except Exception as error:
        return Found(kind, name, targets, "wrong", f"{type(error).__name__}: {error}"[:200])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def table(path: Path) -> str:
    """The counts of a file of results, and those that are not simply right."""
    found = {(f.name, f.targets): f for f in (Found(**json.loads(line)) for line in path.read_text().splitlines())}
    lines = ["| input | targets | run | " + " | ".join(RESULTS) + " |", "|---|---" + "|---:" * (1 + len(RESULTS)) + "|"]
    for kind in ("text", "vision", "audio"):
        for targets in TARGETS:
            of = Counter(f.result for f in found.values() if (f.kind, f.targets) == (kind, targets))
            counts = [of.total(), *(of[result] for result in RESULTS)]
            lines.append(f"| {kind} | {targets or 'default'} | " + " | ".join(map(str, counts)) + " |")
    for result in RESULTS[1:]:
        lines += ["", f"{result}:"]
        lines += [f"* {f.name} ({f.targets or 'default'}): {f.word}" for f in found.values() if f.result == result]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:  # without pytest, for long runs: shard and file come from the environment
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        for case in CASES:
            with Path(OUT or "sweep.jsonl").open("a") as to:
                to.write(json.dumps(timed(*case)._asdict()) + "\n")
    else:
        print(table(Path(sys.argv[1])))
