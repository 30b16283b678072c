"""Laws of `adapter_model.bin`: written, read as safetensors files are, and nothing else comes out of a pickle."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.files.test_checkpoint import FILE, logits, trained
from tests.files.test_untrusted import as_format_1
from tests.shared.cases import NETS, NetCase, bert, names
from tests.shared.versions import takes_adapters

BIN = "adapter_model.bin"


def saved(path: Path, case: NetCase = NETS[0]) -> tuple[Any, Any]:
    """A model saved with a pickle, and its base."""
    model, base = trained(case)
    model.save_pretrained(path, safe_serialization=False, save_embedding_layers=False)
    assert not (path / FILE).exists()
    return model, base


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", NETS, ids=names)
def test_a_pickle_holds_what_the_safetensors_file_does_and_loads_to_the_same_bits(
    tmp_path: Path, case: NetCase, low_cpu_mem_usage: bool
) -> None:
    model, base = saved(tmp_path / "bin", case)
    model.save_pretrained(tmp_path / "safe", save_embedding_layers=False)
    held, expected = torch.load(tmp_path / "bin" / BIN, weights_only=True), load_file(tmp_path / "safe" / FILE)
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[key], tensor) for key, tensor in expected.items())
    loaded = PeftModel.from_pretrained(base, tmp_path / "bin", low_cpu_mem_usage=low_cpu_mem_usage)
    batch = case.batch(2)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@takes_adapters
def test_transformers_reads_a_pickle(tmp_path: Path) -> None:
    model, base = saved(tmp_path)
    base.load_adapter(str(tmp_path), use_safetensors=False)  # by itself it looks for the other file alone
    assert torch.equal(logits(base), logits(model))


def test_a_pickle_of_format_1_is_read(tmp_path: Path) -> None:
    model, base = trained()
    model.save_pretrained(tmp_path)
    torch.save(as_format_1(tmp_path, model), tmp_path / BIN)
    (tmp_path / FILE).unlink()
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


class Harmful:
    """What would touch a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(change(torch.load(path, weights_only=True)), path)

    return write


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in parts.items():
            archive.writestr(entry, content)


def first(state: dict[str, Any], part: str) -> str:
    return next(key for key in state if key.endswith(part))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "code": (lambda path: torch.save({"a": Harmful(path.parent / "touched")}, path), "a pickle of more than tensors"),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})) and None, "truncated or damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]) and None, "truncated or damaged"),
    "empty": (lambda path: path.write_bytes(b"") and None, "truncated or damaged"),
    "the old format of torch": (
        lambda path: torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False),
        "truncated or damaged",
    ),
    "compressed": (compressed, "is compressed"),
    "a list": (rewritten(lambda state: list(state.values())), "other things than plain tensors"),
    "a text": (rewritten(lambda state: state | {first(state, "values"): "text"}), "other things than plain tensors"),
    "a tensor by number": (rewritten(lambda state: state | {1: torch.zeros(1)}), "other things than plain tensors"),
    "a sparse tensor": (
        rewritten(lambda state: state | {first(state, "values"): torch.eye(3).to_sparse()}),
        "other things than plain tensors",
    ),
    "a tensor without data": (
        rewritten(lambda state: state | {first(state, "values"): torch.empty(10**12, device="meta")}),
        "other things than plain tensors",
    ),
    "one number a million million times": (
        rewritten(lambda state: state | {first(state, "values"): torch.zeros(1).expand(10**12)}),
        "other things than plain tensors",
    ),
    "values of integers": (
        rewritten(lambda state: state | {(key := first(state, "values")): state[key].int()}),
        "expected floating-point numbers",
    ),
    "a support too long": (
        rewritten(lambda state: state | {(key := first(state, "support")): state[key].repeat(2)}),
        "must have .* bytes for",
    ),
    "a tensor of the base": (
        rewritten(lambda state: state | {"base_model.model.bert.embeddings.LayerNorm.bias": torch.zeros(16)}),
        "a parameter of the base model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_pickle_that_is_no_adapter_is_refused_and_the_model_stays(tmp_path: Path, damage: str) -> None:
    _, base = saved(tmp_path)
    change, message = DAMAGES[damage]
    change(tmp_path / BIN)
    before = {name: p.clone() for name, p in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not (tmp_path / "touched").exists()


def test_another_method_s_pickles_are_peft_s_matter(tmp_path: Path) -> None:
    other = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    other.save_pretrained(tmp_path, safe_serialization=False)
    PeftModel.from_pretrained(bert(), tmp_path)
