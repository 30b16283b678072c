"""The law of files from strangers: any file whatever ends in a clear error or a correct load."""

from __future__ import annotations

import copy
import json
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_sam import SamConfig

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.norm = nn.Embedding(12, 4), nn.Linear(4, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.linear(self.embed(ids))))


def net() -> Any:
    options: dict[str, Any] = {"modules_to_save": ["head"], "target_modules": ["embed", "linear", "norm"]}
    return get_peft_model(Net(), SamConfig(density=0.2, score="random", init_weights=False, **options))


torch.manual_seed(0)
VICTIM = net().eval()
IDS = torch.arange(6).reshape(2, 3)
with tempfile.TemporaryDirectory() as _folder:
    VICTIM.save_pretrained(_folder)
    GOOD_FILE = (Path(_folder) / FILE).read_bytes()
    GOOD_TENSORS = load_file(Path(_folder) / FILE)
    GOOD_CONFIG = json.loads((Path(_folder) / CONFIG).read_text())


def saved(tensors: dict[str, Tensor]) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file.name)
        return Path(file.name).read_bytes()


def framed(header: Any) -> bytes:
    """The good file's data under another header."""
    length = struct.unpack("<Q", GOOD_FILE[:8])[0]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + GOOD_FILE[8 + length :]


GOOD_HEADER = json.loads(GOOD_FILE[8 : 8 + struct.unpack("<Q", GOOD_FILE[:8])[0]])
STRANGE = [
    "base_model.model.linear.base_layer.weight",
    "base_model.model.linear.weight",
    "base_model.model.head.original_module.weight",
    "base_model.model.head.modules_to_save.default.weight",
    "base_model.model.linear.sam_sparse_delta.default.weight.values",
    "base_model.model.head.sam_sparse_delta.weight.values",
    "base_model.model.nowhere.sam_sparse_delta.weight.values",
    "base_model.model.norm.sam_sparse_delta.weight.indices",
    "base_model.model.norm.sam_sparse_delta.scale.support",
    "sam_sparse_delta.weight.values",
    "",
]
NAMES = st.sampled_from([*GOOD_TENSORS, *STRANGE])
NUMBERS = st.one_of(st.integers(-3, 40), st.sampled_from([2**31, 2**40, 2**63 - 1, -(2**63)]))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool]
WORDS = ["linear", "weight", "head", "norm", "default", "second", "base_layer", ".*"]
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5), st.sampled_from(["(", "all", *WORDS])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    data = bytearray(GOOD_FILE)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["flip", "insert", "cut", "length"])):
            case "flip":
                data[at] ^= draw(st.integers(1, 255))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del data[at : at + draw(st.integers(1, 200))]
            case "length":
                data[:8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1)))
        if not data:
            break
    return bytes(data)


@st.composite
def mutated_header(draw: st.DrawFn) -> bytes:
    header = copy.deepcopy(GOOD_HEADER)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from([key for key in header if key != "__metadata__"] or ["none"]))
        if not isinstance(entry := header.setdefault(key, {}), dict):
            continue
        match draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "drop", "json"])):
            case "dtype":
                entry["dtype"] = draw(
                    st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X"])
                )
            case ("shape" | "data_offsets") as field:
                entry[field] = draw(st.lists(NUMBERS, max_size=3))
            case "name":
                header[draw(NAMES)] = header.pop(key)
            case "drop":
                del header[key]
            case "json":
                header[key] = draw(JSON)
    return framed(header)


@st.composite
def mutated_tensors(draw: st.DrawFn) -> bytes:
    tensors = {key: tensor.clone() for key, tensor in GOOD_TENSORS.items()}
    for _ in range(draw(st.integers(1, 3))):
        key = draw(NAMES)
        match draw(st.sampled_from(["new", "entry", "drop", "rename", "positions"])):
            case "new":
                shape = draw(st.lists(st.integers(0, 5), max_size=2))
                tensors[key] = torch.full(shape, draw(st.integers(0, 200))).to(draw(st.sampled_from(DTYPES)))
            case "entry" if key in tensors and tensors[key].numel():
                tensors[key].view(-1)[draw(st.integers(0, tensors[key].numel() - 1))] = draw(st.integers(0, 255))
            case "drop":
                tensors.pop(key, None)
            case "rename" if key in tensors:
                tensors[draw(NAMES)] = tensors.pop(key)
            case "positions" if key.endswith(".support"):
                positions = torch.tensor(draw(st.lists(NUMBERS, max_size=8)), dtype=torch.int64)
                tensors.pop(key, None)
                tensors[key.removesuffix("support") + "indices"] = positions
    return saved({key: tensor for key, tensor in tensors.items() if key})


@st.composite
def mutated_config(draw: st.DrawFn) -> str:
    config = copy.deepcopy(GOOD_CONFIG)
    of_peft = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"}
    for _ in range(draw(st.integers(1, 2))):
        where = draw(st.sampled_from(["field", "selection", "counts", "base", "text"]))
        if where == "field":
            config[draw(st.sampled_from(sorted(config.keys() - of_peft)))] = draw(JSON)
        elif where == "text":
            text = json.dumps(config)
            return text[: draw(st.integers(0, len(text)))]
        else:
            found = GOOD_CONFIG["selection"] if where == "selection" else GOOD_CONFIG["selection"][where]
            name = draw(st.one_of(st.sampled_from(sorted(found)), st.text(max_size=3)))
            changed = {**found, name: draw(st.one_of(JSON, NUMBERS)) if where != "base" else draw(st.text(max_size=40))}
            if where == "selection":
                config["selection"] = changed
            elif isinstance(config["selection"], dict):
                config["selection"][where] = changed
    return json.dumps(config)


def looks(model: Any) -> dict[str, Any]:
    """All that an adapter could change in a model."""
    tensors = {name: (t.numpy().tobytes(), t.requires_grad) for name, t in model.state_dict(keep_vars=False).items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    return {
        "tensors": tensors,
        "flags": flags,
        "kinds": kinds,
        "adapters": (*model.peft_config, *model.active_adapters),
    }


BEFORE = looks(VICTIM)
FUZZED = st.one_of(
    st.tuples(st.just("bytes"), mutated_bytes()),
    st.tuples(st.just("header"), mutated_header()),
    st.tuples(st.just("tensors"), mutated_tensors()),
    st.tuples(st.just("config"), mutated_config()),
)


@pytest.mark.slow
@settings(max_examples=2500)
@given(FUZZED)
def test_any_file_ends_in_a_clear_error_or_a_correct_load_and_nothing_else_changes(case: tuple[str, Any]) -> None:
    kind, content = case
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / FILE).write_bytes(GOOD_FILE if kind == "config" else content)
        (Path(folder) / CONFIG).write_text(content if kind == "config" else json.dumps(GOOD_CONFIG))
        try:
            VICTIM.load_adapter(folder, "second")
        except (ValueError, RuntimeError, TypeError) as error:
            event(f"{kind}: refused")
            by_peft = ("size mismatch", "modules_to_save cannot be applied")
            assert isinstance(error, ValueError) or any(text in str(error) for text in by_peft)  # noqa: PT017
            assert len(str(error)) > 20  # noqa: PT017
        else:
            event(f"{kind}: loaded")
            for delta in VICTIM.base_model.sparse_deltas("second").values():
                indices = delta.indices.tolist()
                assert indices == sorted(set(indices))
                assert indices[0] >= 0
                assert indices[-1] < delta.shape.numel()
                assert len(indices) == len(delta.values)
            VICTIM.set_adapter("second")
            VICTIM(IDS)
            VICTIM.set_adapter("default")
            VICTIM.delete_adapter("second")
    assert looks(VICTIM) == BEFORE
