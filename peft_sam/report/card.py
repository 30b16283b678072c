"""What the model card of an adapter says about it."""

from __future__ import annotations

import functools
import io
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from peft_sam.config import SamConfig
from peft_sam.layers.found import has_support
from peft_sam.report.report import counts_of, draw, selection_of, title_of
from peft_sam.selection import Selection

HEADING = "## SAM sparse adapter"
PICTURE = "selection.png"
SHOWN = 12
LONGEST = 200
# what could end a cell or a piece of code
UNSAFE = str.maketrans(dict.fromkeys("`|<>", "?"))


def complete_card(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Put the section about this adapter into the model card in `folder`, once, and tag the card.

    The picture of where the entries lie is put beside it, where matplotlib is installed.
    """
    configs: Any = model.peft_config
    places = ""
    if has_support(model, adapter_name):
        selection = selection_of(model, adapter_name)
        places = where(selection, picture_beside(selection, folder))
    text = section(configs[adapter_name], places)
    path = folder / "README.md"
    card = ModelCard.load(path)
    before, _, rest = card.text.partition(HEADING)
    # the section ends where the next heading of its rank begins
    after = rest[rest.index("\n## ") :] if "\n## " in rest else ""
    card.text = f"{before.rstrip()}\n\n{text}\n{after}".lstrip()
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "sam-sparse", "peft-sam"})
    card.save(path)


def section(config: SamConfig, places: str) -> str:
    """The section: what the adapter is, how it was selected, where its entries lie, how to load it."""
    chosen = config.selection or {}
    rows = {
        "base model": code(config.base_model_name_or_path) if config.base_model_name_or_path else "not recorded",
        "trained entries": _of(chosen.get("k"), chosen.get("m")),
        "density": f"{chosen.get('density', config.density):g}",
        "score": code(chosen.get("score", config.score)),
        "budget": code(chosen.get("budget", config.budget)),
        "selected from": _pass(chosen),
        "low-rank pairs": f"r = {config.r}, α = {config.lora_alpha:g}" if config.r else "none",
        "threshold": f"{chosen['threshold']:.4g}" if "threshold" in chosen else "not recorded",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    auto = {
        "SEQ_CLS": "AutoPeftModelForSequenceClassification",
        "CAUSAL_LM": "AutoPeftModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
        "TOKEN_CLS": "AutoPeftModelForTokenClassification",
        "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
    }.get(str(getattr(config.task_type, "value", config.task_type)), "AutoPeftModel")
    return f"""{HEADING}

This adapter changes a few entries of its base model's parameters: those where the score below, measured on the
training data, was largest. SAM is the Second-order Approximation Method of [Fu et al.
2022](https://arxiv.org/abs/2211.15583), neither sharpness-aware minimisation nor Segment Anything.

| | |
|---|---|
{table}

{places}The import teaches PEFT this kind of adapter (`pip install peft-sam`):

```python
import peft_sam
from peft import {auto}

model = {auto}.from_pretrained("this repository")
```
"""


def where(selection: Selection, picture: bool) -> str:
    """Where the entries lie: by module type, over all layers; the picture shows the layers."""
    of_kind: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for (_, kind), pair in counts_of(selection).items():
        of_kind[kind].append(pair)
    rows = []
    for kind, pairs in of_kind.items():
        touched = sum(selected > 0 for selected, _ in pairs)
        k, m = sum(selected for selected, _ in pairs), sum(candidates for _, candidates in pairs)
        rows.append((k, m, code(kind), f"{touched} of {len(pairs)}"))
    rows.sort(reverse=True)
    if rest := rows[SHOWN:]:
        others = (sum(row[0] for row in rest), sum(row[1] for row in rest), f"{len(rest)} more", "")
        rows[SHOWN:] = [others]
    lines = [f"| {name} | {k:,} | {k / selection.k:.1%} | {k / m:.3%} | {layers} |" for k, m, name, layers in rows]
    head = ["| module | entries | of all entries | density | layers with entries |", "|---|---:|---:|---:|---:|"]
    image = [f"![Selected entries by layer and module type]({PICTURE})", ""] if picture else []
    return "\n".join([*image, *head, *lines, "", ""])


def picture_beside(selection: Selection, folder: Path) -> bool:
    """Write the picture into `folder`; whether there is one."""
    try:
        picture = _png(tuple(counts_of(selection).items()), title_of(selection))
        (folder / PICTURE).write_bytes(picture)
    except ImportError:
        return False
    except Exception as error:  # training goes on, and the adapter is saved, whatever a library or a disk does
        (folder / PICTURE).unlink(missing_ok=True)
        warnings.warn(f"no picture of the selection in the model card: {error!r}", stacklevel=2)
        return False
    return True


@functools.lru_cache(maxsize=8)  # a Trainer saves the same selection at every checkpoint
def _png(counts: tuple[tuple[tuple[str, str], tuple[int, int]], ...], title: str) -> bytes:
    file = io.BytesIO()
    draw(dict(counts), title).savefig(file, format="png", dpi=100)
    return file.getvalue()


def code(text: Any) -> str:
    """A name, which may be a stranger's, as code in one cell of a table: on one line, with nothing that ends it."""
    line = " ".join(str(text)[:LONGEST].split())
    return f"`{''.join(c for c in line if c.isprintable()).translate(UNSAFE)}`" if line else "no name"


def _of(k: int | None, m: int | None) -> str:
    if k is None:
        return "not recorded"
    return f"{k:,}" if m is None else f"{k:,} of {m:,} candidate entries"


def _pass(chosen: dict[str, Any]) -> str:
    if chosen.get("batches"):
        steps = chosen.get("head_warmup_steps")
        warm = f", after {steps:,} steps of training the head alone" if steps else ""
        seen = f"{chosen.get('samples') or 0:,.0f} {chosen.get('unit', 'samples')}"
        return f"{seen} in {chosen['batches']:,} batches{warm}"
    return "no data" if "batches" in chosen else "not recorded"
