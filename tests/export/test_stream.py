"""Laws of weights that travel: a stream of updates, its files, and the receiver of another process."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralForCausalLM

from peft_sam import PendingAdapterError, SamConfig, WeightPatch, WeightReceiver, WeightStream, export_adapter
from peft_sam.export.stream import _spot
from peft_sam.export.way_back import Place
from tests.export.test_export import MODELS, RANDOM, Saved, assert_same_bits, bits, hidden
from tests.shared.cases import llama, mixtral

IDS = torch.arange(1, 13).view(2, 6)
STREAMS = [*((make, options, torch.float32) for make, options in MODELS), (llama, {}, torch.bfloat16)]


def move(model: Any, seed: int) -> None:
    """What a step of training does: all that is trained gets other values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "sam_sparse" in name or "modules_to_save" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)


@pytest.mark.parametrize(("make", "options", "dtype"), STREAMS)
def test_a_plain_model_with_a_patch_is_the_merged_model_at_every_step(
    make: Any, options: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = Saved(tmp_path, make, dtype, **options)
    before, engine = bits(saved.model), saved.load()
    untouched, stream, receiver = bits(engine), WeightStream(saved.model), WeightReceiver(engine)
    for step in range(3):
        move(saved.model, step)
        merged = saved.merged()
        for _ in range(2):  # absolute: twice is once
            receiver.apply(stream.patches())
            assert_same_bits(bits(engine), merged)
    receiver.restore()
    assert_same_bits(bits(engine), untouched)
    move(saved.model, 0)
    assert bits(saved.model).keys() == before.keys()


def test_a_patch_that_comes_late_or_after_others_were_missed_leads_to_the_same_weights(tmp_path: Path) -> None:
    saved = Saved(tmp_path, mixtral, target_modules="all")
    engine, files, merged = saved.load(), [], []
    stream, receiver = WeightStream(saved.model), WeightReceiver(engine)
    for step in range(4):
        move(saved.model, step)
        files.append(tmp_path / f"{step}.safetensors")
        assert stream.write(files[-1]).model_version == step + 1
        merged.append(saved.merged())
    for step in (0, 3, 1, 1, 2):
        receiver.apply(files[step])
        assert receiver.version == step + 1
        assert_same_bits(bits(engine), merged[step])


def test_another_adapter_s_patch_finds_the_base_s_own_bits(tmp_path: Path) -> None:
    saved, other = (Saved(tmp_path / name, llama, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    other.load, engine = saved.load, saved.load()
    other.model = get_peft_model(saved.load(), SamConfig(density=0.1, **RANDOM | {"seed": 7})).eval()
    receiver = WeightReceiver(engine)
    receiver.apply(WeightStream(saved.model).patches())
    receiver.apply(WeightStream(other.model).patches())
    assert_same_bits(bits(engine), other.merged())


def test_values_are_rounded_once_to_the_engine_s_dtype(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    engine = saved.load().to(torch.bfloat16)
    WeightReceiver(engine).apply(WeightStream(saved.model, dtype=torch.bfloat16).patches())
    assert_same_bits(bits(engine), {name: t.to(torch.bfloat16) for name, t in saved.merged().items()})


# The forms of engines


class Engine(nn.Module):
    """Holds q, k and v packed in one parameter, and loads tensors of a checkpoint into parts of it.

    A sparse patch reaches it as vLLM's loader hands it on: a whole tensor with NaN where nothing changes, copied into
    the part, the present number kept at each NaN.
    """

    def __init__(self, checkpoint: dict[str, Tensor]) -> None:
        super().__init__()
        self.packed: dict[str, Tensor] = {}
        self.parts: dict[str, tuple[str, slice]] = {}
        for name, tensor in checkpoint.items():
            whole = name.replace("q_proj", "qkv").replace("k_proj", "qkv").replace("v_proj", "qkv")
            before = self.packed.get(whole, tensor[:0])
            self.packed[whole] = torch.cat([before, tensor])
            self.parts[name] = (whole, slice(len(before), len(before) + len(tensor)))

    def load(self, patches: Iterable[WeightPatch]) -> None:
        for patch in patches:
            assert patch.indices is not None
            assert patch.indices.dtype == torch.int32
            assert patch.indices.is_contiguous()
            assert patch.indices.ndim == patch.values.ndim == 1
            assert patch.values.dtype == patch.dtype
            assert patch.full_shape == patch.shape
            flat = torch.full((torch.Size(patch.shape).numel(),), torch.nan, dtype=patch.dtype)
            flat[patch.indices.long()] = patch.values
            new, (whole, rows) = flat.view(patch.shape), self.parts[patch.name]
            part = self.packed[whole][rows]
            torch.where(new.isnan(), part, new, out=part)


def test_an_engine_that_packs_parameters_takes_the_patches(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    engine = Engine(load_file(saved.path / "model.safetensors"))
    stream = WeightStream(saved.model)
    for step in range(2):
        move(saved.model, step)
        engine.load(stream.patches())
    export_adapter(saved.model, tmp_path / "merged", "merged")
    assert_same_bits(engine.packed, Engine(load_file(tmp_path / "merged" / "model.safetensors")).packed)


def test_experts_that_the_model_holds_together_travel_apart(tmp_path: Path) -> None:
    saved = Saved(tmp_path, mixtral, target_modules="all")
    names = {patch.name for patch in WeightStream(saved.model).patches()}
    assert any("experts.1.w1" in name for name in names)
    assert names <= set(load_file(saved.path / "model.safetensors"))


def test_large_tensors_have_64_bit_positions() -> None:
    spot = _spot(Place("x", torch.Size((2**16, 2**16)), torch.float32), torch.tensor([0, 1]))
    assert spot is not None
    assert spot.indices is not None
    assert (spot.indices.dtype, spot.indices.tolist()) == (torch.int64, [1])


# Files


def test_the_first_file_has_positions_and_the_others_values_only(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    stream, k = WeightStream(saved.model), saved.model.peft_config["default"].selection["k"]
    headers = [stream.write(tmp_path / f"{step}.safetensors") for step in range(3)]
    late = stream.write(tmp_path / "late.safetensors", indices=True)
    files = [load_file(tmp_path / f"{name}.safetensors") for name in (0, 1, 2, "late")]
    names = {patch.name for patch in stream.patches()}
    assert [set(file) == {f"{name}.values" for name in names} for file in files] == [False, True, True, False]
    assert all(sum(len(t) for key, t in file.items() if key.endswith("values")) == k for file in files)
    assert files[0].keys() == files[3].keys()
    assert [header.indices for header in (*headers, late)] == [True, False, False, True]
    assert len({header.layout for header in (*headers, late)}) == 1
    with safe_open(tmp_path / "1.safetensors", framework="pt") as file:
        said = file.metadata()
    whole = sum(tensor.numel() for tensor in load_file(saved.path / "model.safetensors").values())
    assert (said["sparse"], said["model_version"]) == ("True", "2")
    assert float(said["sparsity"]) == pytest.approx(1 - k / whole)
    assert set(json.loads(said["changed_params"])) == names
    engine = saved.load()
    WeightReceiver(engine).apply(tmp_path / "late.safetensors")
    assert_same_bits(bits(engine), saved.merged())


def test_a_receiver_takes_the_patch_of_an_export_too(tmp_path: Path) -> None:
    saved = Saved(tmp_path, mixtral, target_modules="all")
    export_adapter(saved.model, tmp_path / "patch", "checkpoint_patch")
    engine = saved.load()
    WeightReceiver(engine).apply(tmp_path / "patch" / "checkpoint_patch.safetensors")
    assert_same_bits(bits(engine), saved.merged())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


FILES: list[tuple[Callable[[Path], Any], str]] = [
    (flip, r"or a damaged one \(ValueError: the checksums of \[.*\] are not those of the header"),
    (cut, r"is not a file of patches, or a damaged one \(SafetensorError"),
    (lambda path: path.write_bytes(b""), "is not a file of patches, or a damaged one"),
    (lambda path: path.write_bytes((path.parent / "base" / "model.safetensors").read_bytes()), "is not a file of pat"),
]


@pytest.mark.parametrize(("damage", "message"), FILES)
def test_a_damaged_file_is_refused_and_the_model_is_as_before(damage: Any, message: str, tmp_path: Path) -> None:
    saved, path = Saved(tmp_path, llama), tmp_path / "patch.safetensors"
    stream, engine = WeightStream(saved.model), saved.load()
    receiver = WeightReceiver(engine)
    for indices in (True, False):
        before, version = bits(engine), receiver.version
        stream.write(path, indices=indices)
        kept = path.read_bytes()
        damage(path)
        with pytest.raises(ValueError, match=message):
            receiver.apply(path)
        assert_same_bits(bits(engine), before)
        assert receiver.version == version
        path.write_bytes(kept)
        receiver.apply(path)


def values_only(saved: Saved, folder: Path) -> Any:
    WeightStream(saved.model).write(folder / "values.safetensors", indices=False)
    return folder / "values.safetensors"


def patches_with(**changes: Any) -> Callable[[Saved, Path], Any]:
    def make(saved: Saved, folder: Path) -> Any:
        found = WeightStream(saved.model).patches()
        return [*found[1:], found[0]._replace(**{key: change(found[0]) for key, change in changes.items()})]

    return make


UPDATES: list[tuple[Callable[[Saved, Path], Any], type[Exception], str]] = [
    (lambda saved, folder: folder / "none.safetensors", FileNotFoundError, "no patch file at"),
    (values_only, ValueError, r"has values only, and no positions are kept here: .*indices=True"),
    (patches_with(name=lambda p: "other"), ValueError, r"of LlamaForCausalLM has no \['other'\]"),
    (patches_with(shape=lambda p: (2, *p.shape)), ValueError, "is of shape .* in the patch and .* in the checkpoint"),
    (patches_with(values=lambda p: p.values[1:]), ValueError, "has values of shape"),
    (patches_with(values=lambda p: p.values * torch.nan), ValueError, "have NaNs"),
    (patches_with(indices=lambda p: p.indices.flip(0)), ValueError, "must be sorted without repeats"),
    (patches_with(indices=lambda p: p.indices + 10**6), ValueError, "outside the parameter"),
]


@pytest.mark.parametrize(("make", "error", "message"), UPDATES)
def test_an_update_that_does_not_fit_is_refused_and_the_model_is_as_before(
    make: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    saved = Saved(tmp_path, llama)
    engine, update = saved.load(), make(saved, tmp_path)
    before = bits(engine)
    with pytest.raises(error, match=message):
        WeightReceiver(engine).apply(update)
    assert_same_bits(bits(engine), before)


def test_values_for_other_positions_are_refused(tmp_path: Path) -> None:
    saved, receiver = Saved(tmp_path, llama), WeightReceiver(llama())
    receiver.apply(WeightStream(saved.model).patches())
    other: Any = get_peft_model(saved.load(), SamConfig(density=0.1, **RANDOM))
    stream = WeightStream(other)
    stream.write(tmp_path / "values.safetensors", indices=False)
    with pytest.raises(ValueError, match="the positions kept here are others"):
        receiver.apply(tmp_path / "values.safetensors")


# What cannot be streamed


def test_a_stream_needs_an_adapter_with_a_support_in_plain_memory(tmp_path: Path) -> None:
    with pytest.raises(PendingAdapterError):
        WeightStream(get_peft_model(llama(), SamConfig()))
    model: Any = get_peft_model(hidden(), SamConfig(target_modules="all", density=0.3, **RANDOM))
    with pytest.raises(ValueError, match=r"quantised, offloaded or sharded, in \['0.weight'\]"):
        WeightStream(model)


def reselect(model: Any) -> None:
    delta = next(iter(model.base_model.sparse_deltas().values()))
    free = next(i for i in range(len(delta.indices)) if i not in set(delta.indices.tolist()))
    delta.indices[:] = torch.cat([torch.tensor([free]), delta.indices[1:]]).sort().values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.merge_adapter(), "are merged: call model.unmerge_adapter"),
        (reselect, "is not the one with which the stream began: make a new WeightStream"),
        (lambda model: next(iter(model.base_model.sparse_deltas().values())).values.data.fill_(torch.nan), "has NaNs"),
    ],
)
def test_what_would_send_wrong_weights_is_an_error(change: Any, message: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    stream = WeightStream(saved.model)
    change(saved.model)
    with pytest.raises(ValueError, match=message):
        stream.write(tmp_path / "patch.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# Two processes

RECEIVER = """
import sys, torch
torch.set_num_threads(1)  # as in the tests: sums depend on it
from peft_sam import WeightReceiver
from transformers import AutoModelForCausalLM
receivers, ids = {}, torch.arange(1, 13).view(2, 6)
for line in sys.stdin:
    base, patch, answer = line.split()
    if base not in receivers:
        receivers[base] = WeightReceiver(AutoModelForCausalLM.from_pretrained(base).eval())
    receivers[base].apply(patch)
    with torch.no_grad():
        torch.save(receivers[base].model(ids).logits, answer)
    print(receivers[base].version, flush=True)
"""


@pytest.mark.slow
def test_a_model_in_another_process_follows_the_training_bit_by_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", RECEIVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for make, dtype in ((llama, torch.float32), (llama, torch.bfloat16), (mixtral, torch.float32)):
            folder = tmp_path / f"{make.__name__}-{dtype}"
            saved = Saved(folder, make, dtype, target_modules="all" if make is mixtral else None)
            optimizer = torch.optim.AdamW([p for p in saved.model.parameters() if p.requires_grad], lr=1e-2)
            stream = WeightStream(saved.model)
            for step in range(1, 4):
                saved.model.train()(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                header = stream.write(folder / f"{step}.safetensors")
                print(saved.path, folder / f"{step}.safetensors", folder / "logits.pt", file=process.stdin, flush=True)
                assert int(process.stdout.readline()) == header.model_version == step
                merged = copy.deepcopy(saved.model).eval().merge_and_unload()
                with torch.no_grad():
                    assert torch.equal(torch.load(folder / "logits.pt"), merged(IDS).logits)
        process.stdin.close()
    assert process.returncode == 0
    assert isinstance(merged, MixtralForCausalLM)
