"""Laws of hot swapping: one adapter's deltas in place of another's, in a compiled model too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_sam import OtherBaseWarning, SamConfig
from peft_sam.layers.found import deltas_of, sam_layers
from tests.shared.cases import bert

pytestmark = [  # torch.compile's own
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

FILE = "adapter_model.safetensors"
BASE = nn.Sequential(nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
LINEAR = nn.Sequential(nn.Linear(16, 48)).eval()
IDS = torch.arange(12).view(2, 6)


def adapted(base: nn.Module = BASE, **options: Any) -> Any:
    options = {"target_modules": "all", "score": "random", "density": 0.1, "init_weights": False, **options}
    return get_peft_model(copy.deepcopy(base), SamConfig(**options)).eval()


def saved(path: Path, **options: Any) -> Any:
    model = adapted(**options)
    model.save_pretrained(path)
    return model


def clustered(columns: int, seed: int, base: nn.Module = BASE) -> Any:
    """An adapter with as many entries in each parameter as any other, those of linear layers in so many columns."""
    model = adapted(base, budget="tensor", seed=seed)
    for layer in sam_layers(model).values():
        delta = layer.deltas("default")["weight"]
        if isinstance(layer.get_base_layer(), nn.Linear):
            inside = torch.randperm(layer.in_features)[:columns]
            places = (torch.arange(layer.out_features)[:, None] * layer.in_features + inside).flatten()
            support = places[torch.randperm(len(places))[: len(delta.values)]].sort().values
            supports = {"weight": support, "bias": layer.deltas("default")["bias"].indices}
            layer.set_support("default", supports, {name: torch.randn(len(i)) for name, i in supports.items()})
    return model


def compiled(model: Any) -> tuple[Callable[..., Tensor], Any]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True), counter


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("options", [{"seed": 1}, {"density": 0.02, "target_modules": ["0", "4"]}, {"density": 0.5}])
def test_a_swapped_adapter_is_the_one_from_the_file_and_so_is_the_old_one_when_it_comes_back(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", **options)
    model = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "one", is_trainable=True)
    for other, path in ((two, "two"), (one, "one"), (two, "two")):
        hotswap_adapter(model, tmp_path / path, adapter_name="default")
        assert torch.equal(model(IDS), other(IDS))
        assert model.peft_config["default"].selection == other.peft_config["default"].selection
        assert all(p.requires_grad == ("sam_sparse_" in name) for name, p in model.named_parameters())
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / path / FILE) for path in ("again", "two"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "again")
    assert torch.equal(loaded(IDS), two(IDS))


def test_a_compiled_model_infers_with_other_supports_of_the_same_sizes_as_it_is(tmp_path: Path) -> None:
    others = [clustered(columns, seed) for seed, columns in enumerate((12, 5, 9))]
    others.append(adapted(budget="tensor", seed=3))
    for number, other in enumerate(others):
        other.save_pretrained(tmp_path / str(number))
    run, counter = compiled(PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "0"))
    with torch.no_grad():
        torch.testing.assert_close(run(IDS), others[0](IDS))
        for number in (1, 2, 3, 0):
            hotswap_adapter(run, tmp_path / str(number), adapter_name="default")
            torch.testing.assert_close(run(IDS), others[number](IDS))
        assert counter.frame_count == 1
        smaller = saved(tmp_path / "smaller", density=0.05, target_modules=["0", "2"])
        hotswap_adapter(run, tmp_path / "smaller", adapter_name="default")
        torch.testing.assert_close(run(IDS), smaller(IDS))
        assert counter.frame_count == 2


def test_a_compiled_model_trains_on_as_it_is_if_the_blocks_of_the_plans_have_the_same_sizes(tmp_path: Path) -> None:
    others, x = [clustered(columns, seed, LINEAR) for seed, columns in enumerate((6, 6, 4))], torch.randn(5, 16)
    for number, other in enumerate(others):
        other.save_pretrained(tmp_path / str(number))
    model = PeftModel.from_pretrained(copy.deepcopy(LINEAR), tmp_path / "0", is_trainable=True)
    run, counter = compiled(model)
    for number, frames in ((0, 1), (1, 1), (2, 2)):
        hotswap_adapter(run, tmp_path / str(number), adapter_name="default")
        for one in (run, others[number]):
            one.zero_grad()
            one(x).square().sum().backward()
        ours, theirs = (m.base_model.sparse_deltas() for m in (model, others[number]))
        for name, delta in theirs.items():
            torch.testing.assert_close(ours[name].values.grad, delta.values.grad)
        assert counter.frame_count == frames


def test_heads_are_swapped_too(tmp_path: Path) -> None:
    base, batch = bert().eval(), {"input_ids": IDS}
    for name in ("one", "two"):
        model = saved(tmp_path / name, base=base, task_type="SEQ_CLS", target_modules=None)
        nn.init.normal_(model.get_base_model().classifier.modules_to_save["default"].weight)
        model.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")
    hotswap_adapter(loaded, tmp_path / "two", adapter_name="default")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    without = saved(tmp_path / "three", base=base, target_modules=None)
    assert without.peft_config["default"].modules_to_save is None
    before = state(loaded)
    with pytest.raises(ValueError, match=r"lacks the tensor .*classifier"):
        hotswap_adapter(loaded, tmp_path / "three", adapter_name="default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_a_file_that_is_a_pickle_is_swapped_in(tmp_path: Path) -> None:
    model, two = adapted(), adapted(seed=1)
    two.save_pretrained(tmp_path, safe_serialization=False)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(model(IDS), two(IDS))


def test_a_model_without_peft_s_around_it_swaps_state_dicts(tmp_path: Path) -> None:
    base, batch = bert().eval(), {"input_ids": IDS}
    one, two = (saved(tmp_path / n, base=base, seed=s, target_modules=None) for n, s in (("one", 0), ("two", 1)))
    model = copy.deepcopy(base)
    inject_adapter_in_model(one.peft_config["default"], model)
    tensors = {k.removeprefix("base_model.model."): t for k, t in load_file(tmp_path / "two" / FILE).items()}
    named = {k.replace("sam_sparse_delta.", "sam_sparse_delta.default."): t for k, t in tensors.items()}
    hotswap.hotswap_adapter_from_state_dict(model, named, "default", two.peft_config["default"], "sam_sparse_")
    assert torch.equal(model(**batch).logits, two(**batch).logits)


def test_supports_that_transformers_loaded_keep_their_tensors(tmp_path: Path) -> None:
    base, batch = bert().eval(), {"input_ids": IDS}
    options = {"target_modules": None, "budget": "tensor", "base": base}
    saved(tmp_path / "one", **options)
    two = saved(tmp_path / "two", seed=1, **options)
    model = copy.deepcopy(base)
    model.load_adapter(str(tmp_path / "one"))
    deltas = deltas_of(model, "default")
    tensors = {k: t for k, t in two.state_dict().items() if "sam_sparse_" in k}
    named = {k.removeprefix("base_model.model."): t for k, t in tensors.items()}
    hotswap.hotswap_adapter_from_state_dict(model, named, "default", two.peft_config["default"], "sam_sparse_")
    assert torch.equal(model(**batch).logits, two(**batch).logits)
    assert all(deltas_of(model, "default")[name] is delta for name, delta in deltas.items())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("merged", ValueError, r"'default' cannot be swapped while it is merged: call model.unmerge_adapter"),
        ("another method", ValueError, "Incompatible PEFT types found: SAM_SPARSE and IA3"),
        ("another target", RuntimeError, r"unexpected keys found: base_model\.model\.2\.sam_sparse_delta"),
        ("another file", ValueError, "the two files do not belong together"),
        ("damaged", ValueError, "is truncated or damaged"),
        ("a pickle of more", ValueError, "a pickle of more than tensors"),
        ("another base", ValueError, "the base model is not the one"),
        ("other rows", ValueError, r"trains rows \{'0': \[3, 4\]\} .*, and this one \{'0': \[1, 2\]\}"),
    ],
)
def test_what_cannot_be_swapped_is_refused_and_the_model_stays(
    tmp_path: Path, wrong: str, error: type[Exception], message: str
) -> None:
    narrow = ["0", "1", "4"] if wrong == "another target" else "all"
    model, path, options = adapted(target_modules=narrow), tmp_path / "other", {}
    saved(path, seed=1)
    if wrong == "other rows":
        model = adapted(target_modules=["2"], trainable_token_indices={"0": [1, 2]})
        saved(path, target_modules=["2"], trainable_token_indices={"0": [3, 4]})
    tensors = load_file(path / FILE)
    if wrong == "merged":
        model.merge_adapter()
    elif wrong == "another method":
        get_peft_model(copy.deepcopy(BASE), IA3Config(target_modules=["4"], feedforward_modules=[])).save_pretrained(
            path
        )
    elif wrong == "another file":
        saved(tmp_path / "third", seed=2)
        save_file(load_file(tmp_path / "third" / FILE), path / FILE)
    elif wrong == "damaged":
        (path / FILE).write_bytes((path / FILE).read_bytes()[:-10])
    elif wrong == "a pickle of more":
        torch.save(tensors | {"path": path}, path / "adapter_model.bin")
        (path / FILE).unlink()
    elif wrong == "another base":
        saved(path, base=nn.Sequential(*(type(m)(*size) for m, size in zip(BASE, SIZES, strict=True))))
        options["strict_base"] = True
    before = state(model)
    with pytest.raises(error, match=message):
        hotswap_adapter(model, path, adapter_name="default", **options)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


SIZES: list[tuple[int, ...]] = [(50, 16), (16,), (16, 48), (), (48, 16)]


def test_a_swap_onto_another_base_warns(tmp_path: Path) -> None:
    saved(tmp_path, base=nn.Sequential(*(type(m)(*size) for m, size in zip(BASE, SIZES, strict=True))))
    model = adapted()
    with pytest.warns(OtherBaseWarning, match="the base model is not the one that the adapter was made for"):
        hotswap_adapter(model, tmp_path, adapter_name="default")


def test_a_swapped_adapter_has_no_scale_of_the_old_one_s(tmp_path: Path) -> None:
    model, two = adapted(), saved(tmp_path, seed=1)
    for layer in sam_layers(model).values():
        layer.set_scale("default", 0.5)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(model(IDS), two(IDS))


def test_an_adapter_for_inference_stays_one_when_its_parameters_come_back(tmp_path: Path) -> None:
    saved(tmp_path / "wide")
    saved(tmp_path / "narrow", target_modules=["0"])
    model = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "wide")
    for name in ("narrow", "wide"):
        hotswap_adapter(model, tmp_path / name, adapter_name="default")
        assert not any(p.requires_grad for p in model.parameters())


def test_an_adapter_beside_a_merged_one_can_be_swapped(tmp_path: Path) -> None:
    two = saved(tmp_path, seed=1)
    model = adapted()
    model.add_adapter("other", SamConfig(target_modules="all", score="random", density=0.1, init_weights=False))
    model.merge_adapter(["other"])
    hotswap_adapter(model, tmp_path, adapter_name="default")
    model.unmerge_adapter()
    assert torch.equal(model(IDS), two(IDS))


def test_nothing_has_to_be_prepared(tmp_path: Path) -> None:
    model = adapted()
    before = state(model)
    prepare_model_for_compiled_hotswap(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(BASE)
