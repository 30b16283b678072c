"""Reading back what was written, by the loader that it is for, before it is handed out.

All loaders get the base's own tensors where they take them, and what they make is thrown away: "merged" and
"checkpoint_patch" take the memory of the model once more for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_sam.export.base_files import weight_files
from peft_sam.export.parts import Adapter, Part
from peft_sam.export.patch import read_file
from peft_sam.layers.found import PEFT_PREFIX
from peft_sam.sparse.delta import changed

SHOWN = 5
# of ‖Δ‖²: what the float32 of a product loses stays far below
CLOSE = 1e-6
# parameter → ‖Δ - what was written‖² and ‖Δ‖²
Squares = Mapping[str, tuple[float, float]]
Check = Callable[[Adapter, Path, Squares], None]


def check_stock(adapter: Adapter, folder: Path, lost: Squares) -> None:
    """Whether stock PEFT makes θ⁰ + Δ of what was written, but for what is `lost`, and loads all of it.

    Raises:
        ValueError: if not; says why, or names what does not come back.
    """
    written = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    base = adapter.bare_base(heads=False)
    trained = {parameter: parameter.requires_grad for parameter in base.parameters()}
    with _in_silence():
        try:
            loaded = PeftModel.from_pretrained(base, str(folder))
        except Exception as error:
            raise ValueError(f"PEFT refuses to load it ({type(error).__name__}: {error})") from error
        finally:
            for parameter, flag in trained.items():
                parameter.requires_grad_(flag)
        found = loaded.state_dict() | get_peft_model_state_dict(loaded, save_embedding_layers=False)
    missing = [key.removeprefix(PEFT_PREFIX) for key, tensor in written.items() if not _same(tensor, found.get(key))]
    if missing:
        raise ValueError(f"PEFT loads it without {', '.join(missing[:SHOWN])}")
    for part in adapter.parts:
        layer: Any = loaded.get_submodule(f"{PEFT_PREFIX}{part.module}")
        if not (_same_bias if part.parameter == "bias" else _same_weight)(part, layer, lost.get(part.name)):
            raise ValueError(f"what PEFT loads of it does not change {part.name!r} as the adapter does")
    heads = dict(base.named_parameters()).keys()
    for name, head in adapter.named_heads():
        if not any(_same(head, found.get(key)) for key in (f"{PEFT_PREFIX}{name}", name)) and name in heads:
            raise ValueError(f"PEFT loads it without the trained {name!r}")


def _same_weight(part: Part, layer: Any, squares: tuple[float, float] | None) -> bool:
    """Whether a layer of stock PEFT changes its weight by Δ, to the bit or but for the squares that are lost."""
    if not hasattr(layer, "get_delta_weight"):
        return False
    return _to_the_bit(part, layer) if squares is None else _but_for(part, layer, *squares)


def _to_the_bit(part: Part, layer: Any) -> bool:
    base, indices = part.base.detach(), part.delta.checked_indices()
    if part.pair is not None:  # which is in the file itself
        mine, alpha = dict(part.pair.named_parameters()), layer.supertuning_lora_alpha["default"]
        there = {name: getattr(layer, f"supertuning_{name}")["default"].weight for name in mine}
        if alpha != part.pair.alpha or not all(_same(mine[name], there[name]) for name in mine):
            return False
    if hasattr(layer, "supertuning_indices"):
        places, numbers = layer.supertuning_indices["default"].long(), layer.supertuning_values["default"].detach()
        found = base.flatten().scatter_add(0, places, numbers.to(base.dtype))
    else:
        found = (base + layer.get_delta_weight("default").detach()).to(base.dtype).flatten()
    expected = base.flatten()
    return _same(expected.index_copy(0, indices, changed(expected[indices], part.delta.values.detach())), found)


def _but_for(part: Part, layer: Any, missing: float, norm: float) -> bool:
    """Whether what is missing of Δ, or too much, has the squares that were lost when it was written."""
    left = layer.get_delta_weight("default").detach().double().flatten()
    whole = float(left.square().sum())
    left[part.delta.checked_indices()] -= part.delta.values.detach().double()
    if part.pair is not None:
        left -= part.pair.dense().detach().double().flatten()
    return abs(float(left.square().sum()) - missing) <= CLOSE * max(norm, whole)


def _same_bias(part: Part, layer: Any, _: Any) -> bool:
    found: Any = layer.lora_B["default"].bias
    dense = torch.zeros(part.delta.shape, device=found.device)
    return _same(dense.index_copy(0, part.delta.checked_indices(), part.delta.values.detach().float()), found)


def check_merged(adapter: Adapter, folder: Path, _: Squares) -> None:
    """Whether transformers loads the model with θ⁰ + Δ.

    Raises:
        ValueError: if not; names a parameter.
    """
    bare: Any = adapter.bare_base()
    if isinstance(bare, PreTrainedModel):
        with _in_silence():
            loaded = type(bare).from_pretrained(folder, dtype=bare.dtype)
        _check_values(adapter, bare, loaded)


def check_patch(adapter: Adapter, folder: Path, _: Squares) -> None:
    """Whether the file is whole, and the base's files with the patch, as far as at hand, load as θ⁰ + Δ.

    Raises:
        ValueError: if not; names a parameter.
    """
    header, tensors = read_file(folder / "checkpoint_patch.safetensors")
    bare: Any = adapter.bare_base()
    files = weight_files(adapter.config.base_model_name_or_path, adapter.config.revision)
    if not files or not isinstance(bare, PreTrainedModel):
        return
    state: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, shape in zip(header.changed_params, header.shapes, strict=True):
        values = tensors[f"{name}.values"]
        if name in state and list(state[name].shape) != shape:
            raise ValueError(
                f"the base's files have {name!r} with shape {tuple(state[name].shape)}, not {tuple(shape)}"
            )
        if f"{name}.indices" not in tensors:
            state[name] = values.view(shape)
        elif name in state:
            indices = tensors[f"{name}.indices"].long()
            state[name] = state[name].flatten().index_copy(0, indices, values.to(state[name].dtype)).view(shape)
        else:
            raise ValueError(f"the base's files have no {name!r}")
    with _in_silence():
        loaded = type(bare).from_pretrained(None, config=bare.config, state_dict=state, dtype=bare.dtype)
    _check_values(adapter, bare, loaded)


def _check_values(adapter: Adapter, bare: nn.Module, loaded: nn.Module) -> None:
    """Whether what the adapter changes has its new values in a loaded model, and heads and all others theirs."""
    names = {id(parameter): name for name, parameter in bare.named_parameters()}
    there: Mapping[str, Tensor] = dict(loaded.named_parameters(remove_duplicate=False))
    for part in adapter.parts:
        (indices, new), name = part.after(), names.get(id(part.base), part.name)
        found = there[name].detach().flatten() if name in there else None
        if found is None or not _same(new, found if indices is None else found[indices.to(found.device)]):
            raise ValueError(f"transformers loads other values of {name!r} than θ⁰ + Δ")
    ours = {id(part.base) for part in adapter.parts}
    for name, parameter in bare.named_parameters(remove_duplicate=False):
        if id(parameter) not in ours and not _same(parameter, there.get(name)):
            raise ValueError(f"transformers loads other values of {name!r} than the model has")


def _same(here: Tensor, there: Tensor | None) -> bool:
    """Whether numbers have the same bits in the coarser of their dtypes."""
    if there is None or here.shape != there.shape:
        return False
    here, there = here.detach().cpu(), there.detach().cpu()
    coarser = min(here.dtype, there.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(here.to(coarser), there.to(coarser))


@contextmanager
def _in_silence() -> Iterator[None]:
    """What loaders warn of is no matter here, and they draw no random numbers that would be missed."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield
