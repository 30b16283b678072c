"""Laws of adapters in formats that need no plugin."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from peft_sam import PendingAdapterError, SamConfig, Selection, export_adapter, select_parameters
from peft_sam.export import formats, low_rank, way_back
from peft_sam.export.parts import Adapter
from peft_sam.export.stock_sparse import addends, common_sparsity, kept_entries, target_names
from peft_sam.sparse.delta import SparseDelta
from tests.layers.test_quantised import quantised
from tests.shared.cases import Attention, Sequential, TiedPair, bert, gpt2, llama, mixtral, t5, vit

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # stock SHiRA
IDS = torch.arange(1, 13).view(2, 6)
RANDOM: dict[str, Any] = {"score": "random", "init_weights": False}


def llama_with_head() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(LlamaConfig(**llama().config.to_dict() | {"pad_token_id": 0}))


def dinov2() -> Dinov2ForImageClassification:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, use_swiglu_ffn=True
    )
    return Dinov2ForImageClassification(config)


class Saved:
    """A model on disk, and with an adapter."""

    def __init__(
        self, folder: Path, make: Callable[[], Any], dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self.path = folder / "base"
        made = make().to(dtype)
        made.save_pretrained(self.path)
        self.load = lambda: type(made).from_pretrained(self.path, dtype=dtype).eval()
        self.model: Any = get_peft_model(self.load(), SamConfig(**{"density": 0.05, **RANDOM, **options})).eval()
        for name, parameter in self.model.named_parameters():
            if "modules_to_save" in name:
                parameter.data.add_(1)

    def merged(self) -> dict[str, Tensor]:
        return copy.deepcopy(self.model).merge_and_unload().state_dict()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(here: dict[str, Tensor], there: dict[str, Tensor]) -> None:
    assert here.keys() == there.keys()
    for name in here:
        assert here[name].dtype == there[name].dtype, name
        assert torch.equal(here[name].view(torch.uint8), there[name].view(torch.uint8)), name


STOCK = [
    (llama, torch.float32, {}),
    (llama, torch.bfloat16, {}),
    (t5, torch.float16, {}),
    (llama_with_head, torch.float32, {"task_type": "SEQ_CLS"}),
    (llama, torch.float32, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
]


@pytest.mark.parametrize("format", ["supertuning", "shira"])
@pytest.mark.parametrize(("make", "dtype", "options"), STOCK)
def test_a_sparse_twin_in_stock_peft_has_the_bits_of_the_merged_model(
    make: Any, dtype: torch.dtype, options: Any, format: str, tmp_path: Path
) -> None:
    saved = Saved(tmp_path, make, dtype, **options)
    before = bits(saved.model)
    report = export_adapter(saved.model, tmp_path / "twin", format)
    assert_same_bits(bits(saved.model), before)
    assert (report.errors, report.error) == ({}, 0.0)
    assert report.size == sum(file.stat().st_size for file in (tmp_path / "twin").iterdir())
    twin: Any = PeftModel.from_pretrained(saved.load(), tmp_path / "twin").eval()
    assert twin.peft_config["default"].peft_type.value == format.upper()
    saved.model.merge_adapter()
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if make is t5 else {})}
    assert torch.equal(twin(**inputs).logits, saved.model(**inputs).logits)
    saved.model.unmerge_adapter()
    assert_same_bits(twin.merge_and_unload().state_dict(), saved.merged())


@pytest.mark.parametrize("format", ["supertuning", "shira"])
def test_layers_with_few_entries_are_padded_with_what_changes_no_bit(format: str, tmp_path: Path) -> None:
    base = Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(12)))
    base[1].weight.data.fill_(-0.0)
    supports = {f"{i}.weight": torch.arange(1 + (i == 3) * 14) for i in range(12)}
    shapes = {name: torch.Size((8, 8)) for name in supports}
    adapted: Any = get_peft_model(copy.deepcopy(base), SamConfig(target_modules="all", init_weights=False))
    select_parameters(adapted, selection=Selection(supports, shapes, "sam", "global", 0.1, 0.0))
    export_adapter(adapted, tmp_path / "twin", format)
    file = load_file(tmp_path / "twin" / "adapter_model.safetensors")
    assert {t.shape[-1] for t in file.values()} == {15 if format == "supertuning" else 16}
    twin = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "twin")
    assert_same_bits(twin.merge_and_unload().state_dict(), copy.deepcopy(adapted).merge_and_unload().state_dict())


def test_a_layer_that_would_need_more_entries_than_it_has_is_refused() -> None:
    with pytest.raises(ValueError, match="would need 5 entries for 'a', which has 4"):
        common_sparsity({"a": 5, "b": 1}, {"a": 4, "b": 4})


def test_targets_match_no_other_module_whose_name_ends_alike() -> None:
    assert target_names(["a.0"], ["a.0", "b.0"]) == ["a.0"]
    assert target_names(["0", "a.x"], ["0", "a.0", "a.x"]) == r"0|a\.x"


@settings(max_examples=40)
@given(st.lists(st.integers(1, 10**8).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))), min_size=1))
def test_one_sparsity_makes_room_for_every_layer_and_no_more_than_the_fullest_needs(layers: Any) -> None:
    counts, numels = ({str(name): pair[i] for name, pair in enumerate(layers)} for i in (0, 1))
    sparsity = common_sparsity(counts, numels)
    assert 0 <= sparsity < 1
    kept = {name: kept_entries(n, sparsity) for name, n in numels.items()}
    assert all(counts[name] <= kept[name] <= numels[name] for name in counts)
    assert any(kept[name] == counts[name] for name in counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 0.05, 3.0])
def test_every_sum_on_a_half_precision_base_is_reached_by_super_tuning(dtype: torch.dtype, size: float) -> None:
    base = Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
    model: Any = get_peft_model(base, SamConfig(target_modules="all", density=0.5, **RANDOM))
    (delta,) = model.base_model.sparse_deltas().values()
    delta.values.data.normal_().mul_(size)
    (part,) = Adapter(model, "default").parts
    goal = copy.deepcopy(model).merge_and_unload()[0].weight.detach().flatten()
    indices, values = (tensor.detach() for tensor in addends(part))
    start = part.base.detach().flatten()
    in_float32 = start.float().scatter_add(0, indices, values.float()).to(dtype)
    in_turn = start.clone()
    for index, value in zip(indices.tolist(), values, strict=True):
        in_turn[index] += value
    assert torch.equal(in_turn, goal)
    assert torch.equal(in_float32, goal)
    assert torch.equal(start.scatter_add(0, indices, values), goal)


def test_a_twin_knows_its_base_and_brings_a_resized_vocabulary_along(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    export_adapter(saved.model, tmp_path / "twin", "supertuning")
    twin: Any = AutoPeftModel.from_pretrained(tmp_path / "twin")
    assert twin.peft_config["default"].base_model_name_or_path == str(saved.path)
    assert_same_bits(twin.merge_and_unload().state_dict(), saved.merged())
    base = saved.load()
    base.resize_token_embeddings(53, mean_resizing=False)
    resized: Any = get_peft_model(copy.deepcopy(base), SamConfig(density=0.05, target_modules=["q_proj"], **RANDOM))
    resized.get_input_embeddings().weight.data.add_(1)
    export_adapter(resized, tmp_path / "resized", "supertuning")
    twin = PeftModel.from_pretrained(base, tmp_path / "resized")
    assert_same_bits(twin.merge_and_unload().state_dict(), resized.merge_and_unload().state_dict())


# LoRA

LORA = [
    (llama, {}),
    (bert, {"task_type": "SEQ_CLS"}),
    (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    (gpt2, {"target_modules": ["wpe"], "density": 0.1}),
    (mixtral, {"target_modules": ["model.embed_tokens", "q_proj"]}),
]


@pytest.mark.parametrize(("make", "options"), LORA)
def test_a_lora_twin_of_sufficient_rank_is_the_adapter(make: Any, options: Any, tmp_path: Path) -> None:
    saved = Saved(tmp_path, make, **{"density": 0.02, **options})
    report = export_adapter(saved.model, tmp_path / "twin", "lora", rank=64)
    assert report.error < 1e-6
    twin: Any = PeftModel.from_pretrained(saved.load(), tmp_path / "twin").eval()
    assert twin.peft_config["default"].r <= 16
    torch.testing.assert_close(twin(IDS).logits, saved.model(IDS).logits)
    here, there = twin.merge_and_unload().state_dict(), saved.merged()
    assert here.keys() == there.keys()
    torch.testing.assert_close(here, there)


@pytest.mark.parametrize("way", ["exact", "iterated"])
def test_a_lora_twin_loses_what_the_best_approximation_loses_and_says_so(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "EXACT", 0 if way == "iterated" else low_rank.EXACT)
    base = Sequential(nn.Linear(90, 120), nn.Linear(120, 60))
    model: Any = get_peft_model(copy.deepcopy(base), SamConfig(target_modules="all", density=0.1, **RANDOM))
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"is an approximation. [\d,]+ entries as 'lora'.*relative error"):
        report = export_adapter(model, tmp_path / "twin", "lora", rank=5)
    assert torch.equal(torch.get_rng_state(), state)
    twin = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "twin").merge_and_unload().state_dict()
    goal, start = copy.deepcopy(model).merge_and_unload().state_dict(), base.state_dict()
    missing = whole = 0.0
    for name in ("0.weight", "1.weight"):
        delta = (goal[name] - start[name]).double()
        tail = torch.linalg.svdvals(delta)[5:].square().sum() / delta.square().sum()
        found = (goal[name] - twin[name]).double().square().sum() / delta.square().sum()
        assert report.errors[name] ** 2 == pytest.approx(float(found), rel=1e-4)
        assert tail * (1 - 1e-4) <= found <= tail * (1.005 if way == "iterated" else 1 + 1e-4)
    for name in start:
        missing += float((goal[name] - twin[name]).square().sum())
        whole += float((goal[name] - start[name]).square().sum())
    assert report.error == pytest.approx((missing / whole) ** 0.5, rel=1e-4)
    assert {name: report.errors[name] for name in ("0.bias", "1.bias")} == {"0.bias": 0.0, "1.bias": 0.0}


@pytest.mark.parametrize("kind", ["torchao", "hqq"])
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_has_a_lora_twin_but_not_of_biases(kind: str, tmp_path: Path) -> None:
    layers = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)]
    bases = [quantised(kind, Sequential(*copy.deepcopy(layers))) for _ in range(2)]
    options = {"target_modules": "all-linear", "density": 0.2, **RANDOM}
    if kind == "torchao":
        with pytest.raises(ValueError, match=r"0.bias.*No format can"):
            export_adapter(get_peft_model(bases[0], SamConfig(**options)), tmp_path / "twin", "lora")
        bases = [quantised(kind, Sequential(*copy.deepcopy(layers))) for _ in range(2)]
        for base in bases:
            base[0].bias = base[2].bias = None
    model: Any = get_peft_model(bases[0], SamConfig(**options))
    assert export_adapter(model, tmp_path / "twin", "lora", rank=64).error < 1e-6
    twin = PeftModel.from_pretrained(bases[1], tmp_path / "twin")
    x = torch.randn(5, 64)
    torch.testing.assert_close(twin(x), model(x), atol=1e-5, rtol=1e-5)


def test_only_active_rows_and_columns_take_part_in_an_approximation() -> None:
    indices = torch.tensor([7 * 100_000 + 3, 7 * 100_000 + 99_999, 50_000 * 100_000 + 3])
    delta = SparseDelta(torch.Size((100_000, 100_000)), indices, torch.tensor([3.0, 4.0, 1.0]))
    found = low_rank.approximate(delta, 1)
    assert found.left.shape == (100_000, 1)
    assert found.right.shape == (1, 100_000)
    block = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    assert found.missing == pytest.approx(float(torch.linalg.svdvals(block)[1] ** 2))


# The whole model, and the base's files

MODELS = [
    (bert, {"task_type": "SEQ_CLS"}),
    (bert, {"target_modules": "all"}),
    (llama, {"density": 1.0}),
    (gpt2, {"target_modules": "all"}),
    (mixtral, {"target_modules": "all"}),
    (vit, {"target_modules": "all"}),
    (dinov2, {"target_modules": "all"}),
]


def patched(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """A checkpoint with a patch applied."""
    patch, found = load_file(folder / "checkpoint_patch.safetensors"), dict(tensors)
    about = json.loads((folder / "checkpoint_patch.json").read_text())
    for name, of in about["tensors"].items():
        values = patch.pop(f"{name}.values")
        assert str(values.dtype) == f"torch.{of['dtype']}"
        if (indices := patch.pop(f"{name}.indices", None)) is None:
            found[name] = values.view(of["shape"])
        else:
            assert indices.dtype == torch.int32
            assert (indices[1:] > indices[:-1]).all()
            assert list(found[name].shape) == of["shape"]
            found[name].view(-1)[indices.long()] = values
    assert not patch
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "options"), MODELS)
def test_the_base_s_files_with_a_patch_are_the_files_of_the_merged_model(
    make: Any, options: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = Saved(tmp_path, make, dtype, **options)
    before = bits(saved.model)
    for format in ("merged", "checkpoint_patch"):
        assert export_adapter(saved.model, tmp_path / format, format).error == 0.0
        assert_same_bits(bits(saved.model), before)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(saved.path / "model.safetensors")
    assert_same_bits(patched(base, tmp_path / "checkpoint_patch"), merged)
    assert_same_bits(type(saved.load()).from_pretrained(tmp_path / "merged").state_dict(), saved.merged())
    k, size = saved.model.peft_config["default"].selection["k"], dtype.itemsize
    heads = sum(p.numel() for n, p in saved.model.named_parameters() if "modules_to_save" in n)
    assert (tmp_path / "checkpoint_patch" / "checkpoint_patch.safetensors").stat().st_size < (
        k * (4 + size) + heads * size + 400 * len(base)
    )


def test_a_patch_finds_a_tensor_of_the_checkpoint_that_is_made_of_several_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Saved(tmp_path, dinov2, target_modules="all")
    export_adapter(saved.model, tmp_path / "one", "checkpoint_patch")
    monkeypatch.setattr(way_back, "LAYER", re.compile(r".*\."))  # gate and up come apart
    export_adapter(saved.model, tmp_path / "two", "checkpoint_patch")
    both = [load_file(tmp_path / name / "checkpoint_patch.safetensors") for name in ("one", "two")]
    assert_same_bits(*both)
    assert any("weights_in" in name for name in both[0])


def headless(path: Any) -> Any:
    """A model with a head on the file of one without, whose names lack a prefix, and an adapter."""
    base = BertForSequenceClassification.from_pretrained(path)
    config = SamConfig(task_type="SEQ_CLS", density=0.05, target_modules="all", **RANDOM)
    return get_peft_model(base, config)


def test_names_of_a_patch_are_those_of_the_file_that_the_base_was_loaded_from(tmp_path: Path) -> None:
    BertModel(bert().config).save_pretrained(tmp_path / "base")
    model = headless(tmp_path / "base")
    export_adapter(model, tmp_path / "patch", "checkpoint_patch")
    base = load_file(tmp_path / "base" / "model.safetensors")
    found = patched(base, tmp_path / "patch")
    merged = model.merge_and_unload().state_dict()
    assert found.keys() - base.keys() == {"classifier.weight", "classifier.bias"}
    for name, tensor in found.items():
        assert torch.equal(tensor, merged[name if name in merged else f"bert.{name}"]), name


@pytest.mark.parametrize("shards", ["50GB", "20kB"])
def test_names_come_from_the_cache_of_the_hub_too(hub: Any, shards: str, tmp_path: Path) -> None:
    BertModel(bert().config).push_to_hub("me/base", max_shard_size=shards)
    model = headless("me/base")
    export_adapter(model, tmp_path / "patch", "checkpoint_patch")
    about = json.loads((tmp_path / "patch" / "checkpoint_patch.json").read_text())
    assert about["base_model"] == "me/base"
    assert not any(name.startswith("bert.") for name in about["tensors"])


def test_a_tied_tensor_that_the_file_holds_twice_is_changed_twice(tmp_path: Path) -> None:
    saved = Saved(tmp_path, gpt2, target_modules=["wte"])
    file = saved.path / "model.safetensors"
    base = load_file(file)
    save_file({**base, "lm_head.weight": base["transformer.wte.weight"].clone()}, file, metadata={"format": "pt"})
    export_adapter(saved.model, tmp_path / "patch", "checkpoint_patch")
    found = patched(load_file(file), tmp_path / "patch")
    merged = saved.merged()
    assert not torch.equal(found["lm_head.weight"], base["transformer.wte.weight"])
    assert all(torch.equal(found[name], merged[name]) for name in ("lm_head.weight", "transformer.wte.weight"))


def test_a_base_whose_files_are_gone_has_the_names_that_it_would_save(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    export_adapter(saved.model, tmp_path / "before", "checkpoint_patch")
    shutil.rmtree(saved.path)
    export_adapter(saved.model, tmp_path / "after", "checkpoint_patch")
    assert_same_bits(*(load_file(tmp_path / name / "checkpoint_patch.safetensors") for name in ("before", "after")))


def test_a_change_that_no_checkpoint_holds_is_refused(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    names = [name for name in saved.model.base_model.sparse_deltas() if "o_proj" in name]
    saved.model.base_model.model._keys_to_ignore_on_save = names
    shutil.rmtree(saved.path)
    with pytest.raises(ValueError, match=r"arrive in the checkpoint of LlamaForCausalLM.*'merged'"):
        export_adapter(saved.model, tmp_path / "out", "checkpoint_patch")


def test_a_plain_module_has_a_patch_of_its_state_dict(tmp_path: Path) -> None:
    base = TiedPair()
    model: Any = get_peft_model(copy.deepcopy(base), SamConfig(target_modules="all", density=0.1, **RANDOM))
    export_adapter(model, tmp_path / "patch", "checkpoint_patch")
    found = patched(bits(base), tmp_path / "patch")
    assert torch.equal(found["embedding.weight"], model.merge_and_unload().embedding.weight)


# One process without the plugin

WITHOUT_PLUGIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, ids = sys.argv[1], torch.arange(1, 13).view(2, 6)
found = {}
for path in sys.argv[2:]:
    name = path.rpartition("/")[2]
    if name == "merged":
        model = AutoModelForCausalLM.from_pretrained(path)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    found[name] = model.eval()(ids).logits.tolist()
assert "peft_sam" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.slow
def test_twins_load_and_compute_the_same_where_the_plugin_is_not_imported(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama, task_type="CAUSAL_LM")
    formats = ["supertuning", "shira", "lora", "merged"]
    for format in formats:
        export_adapter(saved.model, tmp_path / format, format)
    paths = [str(tmp_path / name) for name in ("base", *formats)]
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_PLUGIN, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    saved.model.merge_adapter()
    expected = saved.model(IDS).logits
    for format in formats:
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if format == "lora" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(torch.tensor(found[format]), expected, **tolerance)


def test_stock_classes_load_what_a_head_belongs_to(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama_with_head, task_type="SEQ_CLS")
    export_adapter(saved.model, tmp_path / "merged", "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.eval()(IDS).logits, saved.model.merge_and_unload()(IDS).logits)


# Which adapter, and what is refused


@pytest.mark.parametrize("format", list(formats.FORMATS))
def test_only_the_named_adapter_is_written_whatever_is_active(format: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama_with_head, task_type="SEQ_CLS")
    export_adapter(saved.model, tmp_path / "alone", format)
    saved.model.add_adapter("second", SamConfig(target_modules=["q_proj"], seed=5, density=0.1, **RANDOM))
    saved.model.set_adapter("second")
    active = saved.model.active_adapters
    export_adapter(saved.model, tmp_path / "next", format)
    assert saved.model.active_adapters == active
    for file in (tmp_path / "alone").glob("*.safetensors"):
        assert_same_bits(load_file(file), load_file(tmp_path / "next" / file.name))
    export_adapter(saved.model, tmp_path / "second", format, adapter_name="second")
    assert not saved.model.base_model.model.model.layers[0].self_attn.q_proj.merged
    if format == "merged":
        second = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
        both = (second.state_dict(), saved.load().state_dict())
        assert {name for name in both[0] if not torch.equal(both[0][name], both[1][name])} == {
            f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)
        }


def pending(folder: Path) -> Any:
    return get_peft_model(llama(), SamConfig())


def merged(folder: Path) -> Any:
    model = Saved(folder, llama).model
    model.merge_adapter()
    return model


def plain(base: nn.Module, density: float = 0.3) -> Callable[[Path], Any]:
    return lambda folder: get_peft_model(base, SamConfig(target_modules="all", density=density, **RANDOM))


class Hidden(Tensor):
    """A weight that nobody can read."""


def hidden() -> nn.Module:
    model = Sequential(nn.Linear(8, 8, bias=False))
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Hidden), requires_grad=False)
    return model


def broken(folder: Path) -> Any:
    model = Saved(folder, llama).model
    next(iter(model.base_model.sparse_deltas().values())).values.data[0] = torch.nan
    return model


REFUSED: list[tuple[Any, str, type[Exception], str]] = [
    (pending, "merged", PendingAdapterError, r"cannot be exported[\s\S]*select_parameters"),
    (merged, "supertuning", ValueError, r"\['default'\] are merged: call model.unmerge_adapter"),
    (lambda folder: llama(), "merged", TypeError, "made by get_peft_model.*got LlamaForCausalLM"),
    (plain(gpt2()), "supertuning", ValueError, r"nn.Linear.*\(Conv1D, float32\).*\['merged'"),
    (plain(Sequential(nn.Linear(2, 8)), 1.0), "shira", ValueError, r"0.bias \(Linear, float32\)\. .*\['lora',"),
    (plain(Attention()), "lora", ValueError, r"attention.out_proj.weight \(MultiheadAttention, float32\)"),
    (plain(TiedPair()), "lora", ValueError, r"embedding.weight \(Embedding, float32, tied\)\. .*\['merged'"),
    (plain(hidden()), "supertuning", ValueError, r"0.weight \(Linear, not plain in memory\)\. .*\['lora'\]"),
    (plain(hidden()), "merged", ValueError, "not plain in memory"),
    (plain(Sequential(nn.Linear(8, 4, bias=False)).double()), "supertuning", ValueError, r"\(Linear, float64\)"),
    (plain(Sequential(nn.Linear(4, 4, bias=False))), "merged", ValueError, "which Sequential does not have"),
    (plain(Sequential(nn.Linear(4, 1, bias=False))), "shira", ValueError, "r = 1, .*need 5 of its 4"),
    (plain(Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))), "lora", ValueError, "either biases or embeddings"),
    (broken, "checkpoint_patch", ValueError, "has NaNs"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "format", "error", "message"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(
    make: Any, format: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = make(tmp_path)
    before, there = bits(model), set(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        export_adapter(model, tmp_path / "out", format)
    assert set(tmp_path.iterdir()) == there
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "gguf"}, r"one of \['supertuning', .*got 'gguf'"),
        ({"format": "merged", "rank": 4}, "for format 'lora'; got rank=4 for 'merged'"),
        ({"format": "lora", "rank": 0}, "positive integer.*got rank=0"),
        ({"format": "merged", "adapter_name": "x"}, r"no adapter 'x'; there are \['default'\]"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    model = plain(Sequential(nn.Linear(4, 4)))(tmp_path)
    with pytest.raises(ValueError, match=message):
        export_adapter(model, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_what_lies_at_the_path_is_not_overwritten_and_an_error_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Saved(tmp_path, llama)
    saved.model.save_pretrained(tmp_path / "adapter")
    kept = (tmp_path / "adapter" / "adapter_config.json").read_text()
    with pytest.raises(FileExistsError, match="not empty: export to a new folder"):
        export_adapter(saved.model, tmp_path / "adapter", "supertuning")
    assert (tmp_path / "adapter" / "adapter_config.json").read_text() == kept
    before = bits(saved.model)

    def fails(self: Any, folder: Any, **_: Any) -> None:
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", fails)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="disk full"):
        export_adapter(saved.model, tmp_path / "empty", "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "empty"]
    assert not list((tmp_path / "empty").iterdir())
    assert_same_bits(bits(saved.model), before)
    export_adapter(saved.model, tmp_path / "empty", "supertuning")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_report_reads_as_text(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama)
    report = export_adapter(saved.model, tmp_path / "new" / "folder", "shira")
    assert str(report).startswith(f"{report.entries:,} entries as 'shira' in {tmp_path / 'new' / 'folder'}: ")
    assert str(report).splitlines()[0].endswith("bytes, exact")
    assert report.entries == saved.model.peft_config["default"].selection["k"]
