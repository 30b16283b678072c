"""What the model card of an adapter says about it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from peft_sam.config import SamConfig

HEADING = "## SAM sparse adapter"


def complete_card(config: SamConfig, path: Path) -> None:
    """Put the section about this adapter into the model card at `path`, once, and tag the card."""
    card = ModelCard.load(path)
    before, _, rest = card.text.partition(HEADING)
    # the section ends where the next heading of its rank begins
    after = rest[rest.index("\n## ") :] if "\n## " in rest else ""
    card.text = f"{before.rstrip()}\n\n{section(config)}\n{after}".lstrip()
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "sam-sparse", "peft-sam"})
    card.save(path)


def section(config: SamConfig) -> str:
    """The section: what the adapter is, how it was selected, how to load it."""
    chosen = config.selection or {}
    rows = {
        "base model": f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "not recorded",
        "trained entries": _of(chosen.get("k"), chosen.get("m")),
        "density": f"{chosen.get('density', config.density):g}",
        "score": f"`{chosen.get('score', config.score)}`",
        "budget": f"`{chosen.get('budget', config.budget)}`",
        "selected from": _pass(chosen),
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

The import teaches PEFT this kind of adapter (`pip install peft-sam`):

```python
import peft_sam
from peft import {auto}

model = {auto}.from_pretrained("this repository")
```
"""


def _of(k: int | None, m: int | None) -> str:
    if k is None:
        return "not recorded"
    return f"{k:,}" if m is None else f"{k:,} of {m:,} candidate entries"


def _pass(chosen: dict[str, object]) -> str:
    if chosen.get("batches"):
        return f"{chosen['samples']:,.0f} samples in {chosen['batches']:,} batches"
    return "no data" if "batches" in chosen else "not recorded"
