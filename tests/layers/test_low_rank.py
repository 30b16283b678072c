"""Laws of low-rank pairs beside sparse deltas: what LoRA computes, and one adapter with the deltas in every respect."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from peft_sam import SamConfig, WeightStream, create_sam_optimizer, export_adapter, rounding_report, select_parameters
from peft_sam.layers.few_tokens import product_of_few
from peft_sam.layers.found import pairs_of, sam_layers
from tests.layers.test_quantised import KINDS, WRITABLE, dequantised, quantised
from tests.shared.cases import MODULES, NETS, ModuleCase, NetCase, Sequential, bert, gpt2, llama, names
from tests.shared.reference import adapted_copy
from tests.shared.versions import compiles

R, ALPHA = 3, 5.0


def adapted(base: nn.Module, **options: Any) -> Any:
    """With random pairs and deltas."""
    told = {"density": 0.1, "score": "random", "r": R, "lora_alpha": ALPHA, "init_weights": False, **options}
    return get_peft_model(base, SamConfig(**told)).eval()


def composed(base: nn.Module, model: Any) -> nn.Module:
    """The slow way."""
    return adapted_copy(base, model.base_model.sparse_deltas(), pairs_of(model, "default")).eval()


@pytest.mark.filterwarnings("ignore:adapter 'default' has r=3 and no low-rank pair")
@pytest.mark.parametrize("case", MODULES, ids=names)
def test_a_module_computes_with_both(case: ModuleCase) -> None:
    base = case.make()
    model, x = adapted(copy.deepcopy(base), target_modules="all", density=0.3), case.input()
    torch.testing.assert_close(model(x), composed(base.eval(), model)(x))


@pytest.mark.parametrize("case", NETS, ids=names)
def test_a_net_computes_with_both_merged_and_unmerged_and_gives_its_bits_back(case: NetCase) -> None:
    base = case.make().eval()
    model, batch = adapted(copy.deepcopy(base), target_modules="all-linear"), case.batch(2)
    assert pairs_of(model, "default")
    with torch.no_grad():
        expected = composed(base, model)(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(**batch).logits, expected)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, base(**batch).logits)
    bare = model.unload()
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), base.parameters(), strict=True))


@torch.no_grad()
def test_few_tokens_of_a_large_weight_have_both() -> None:
    base = nn.Sequential(nn.Linear(768, 512))
    model, x = adapted(copy.deepcopy(base), target_modules="all", density=0.003), torch.randn(2, 768)
    for delta in model.base_model.sparse_deltas().values():
        if len(delta.shape) == 1:
            model.base_model.model[0].drop("default", "bias")
    assert product_of_few(model.base_model.model[0], (x,), {}) is not None
    torch.testing.assert_close(model(x), composed(base, model)(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_pairs_alone_have_the_outputs_and_gradients_of_peft_s_lora(make: Callable[[], Any], dropout: float) -> None:
    torch.manual_seed(0)
    base = make().eval()
    ours = adapted(copy.deepcopy(base), lora_dropout=dropout)
    with torch.no_grad():
        for delta in ours.base_model.sparse_deltas().values():
            delta.values.zero_()
    pairs = pairs_of(ours, "default")
    turned = isinstance(base, GPT2LMHeadModel)
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(pairs), fan_in_fan_out=turned)
    theirs: Any = get_peft_model(copy.deepcopy(base), config).eval()
    of = {name: theirs.base_model.model.get_submodule(name) for name in pairs}
    with torch.no_grad():
        for name, pair in pairs.items():
            of[name].lora_A["default"].weight.copy_(pair.lora_A)
            of[name].lora_B["default"].weight.copy_(pair.lora_B)
    ids = torch.randint(1, 40, (2, 7))
    losses = []
    for model in (ours, theirs):
        for name, module in model.named_modules():
            module.training = "sam_sparse_low_rank" in name or "lora_dropout" in name
        torch.manual_seed(1)
        loss = model(input_ids=ids).logits.square().mean()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for name, pair in pairs.items():
        torch.testing.assert_close(pair.lora_A.grad, of[name].lora_A["default"].weight.grad)
        torch.testing.assert_close(pair.lora_B.grad, of[name].lora_B["default"].weight.grad)


def test_a_new_adapter_changes_nothing_and_starts_alike_everywhere() -> None:
    base, ids = llama().eval(), torch.randint(1, 40, (2, 7))
    expected, models = base(input_ids=ids).logits, []
    for seed in (0, 1):  # of the process, which matters no more than in which process it is
        torch.manual_seed(seed)
        models.append(adapted(copy.deepcopy(base), init_weights=True))
        assert torch.equal(models[-1](input_ids=ids).logits, expected)
    first, second = (pairs_of(model, "default") for model in models)
    assert all(torch.equal(first[name].lora_A, second[name].lora_A) for name in first)
    assert len({float(pair.lora_A.detach().std()) for pair in first.values()}) == len(first)
    bound = max(float(pair.lora_A.detach().abs().max()) * pair.lora_A.shape[1] ** 0.5 for pair in first.values())
    assert 0.9 < bound <= 1  # PEFT's LoRA starts A uniformly within 1/√inputs


def test_what_is_pending_waits_with_its_pairs_and_is_chosen_as_without_them() -> None:
    ids = torch.randint(1, 40, (2, 7))
    batch = {"input_ids": ids, "labels": ids}
    chosen = []
    for r in (None, R):
        torch.manual_seed(0)
        model: Any = get_peft_model(llama(), SamConfig(density=0.1, r=r))
        chosen.append(select_parameters(model, [batch], progress=False))
        assert all(pair.lora_A.grad is None for pair in pairs_of(model, "default").values())
    assert all(torch.equal(chosen[0].indices[name], chosen[1].indices[name]) for name in chosen[0].indices)
    optimizer = create_sam_optimizer(model, torch.optim.AdamW, lr=1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1e-4 / chosen[1].share), 3e-3]
    given = create_sam_optimizer(model, torch.optim.AdamW, lr=1e-4, lora_lr=1e-2)
    assert given.param_groups[1]["lr"] == 1e-2
    factors = {id(factor) for pair in pairs_of(model, "default").values() for factor in pair.parameters()}
    assert {id(factor) for factor in given.param_groups[1]["params"]} == factors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pairs_of_a_half_precision_base_are_float32_and_it_gets_its_bits_back(dtype: torch.dtype) -> None:
    base = llama().eval().to(dtype)
    model, ids = adapted(copy.deepcopy(base)), torch.randint(1, 40, (2, 7))
    assert {factor.dtype for pair in pairs_of(model, "default").values() for factor in pair.parameters()} == {
        torch.float32
    }
    before = model(input_ids=ids).logits
    assert before.dtype == dtype
    model.merge_adapter()
    expected = composed(base, model).state_dict()
    for name in pairs_of(model, "default"):
        assert torch.equal(sam_layers(model)[name].get_base_layer().weight, expected[f"{name}.weight"])
    model.unmerge_adapter()
    bare = model.unload()
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), base.parameters(), strict=True))


def test_merging_under_autocast_rounds_nothing() -> None:
    base = llama().eval()
    model = adapted(copy.deepcopy(base))
    expected = composed(base, model).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        merged = model.merge_and_unload()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def test_unmerging_is_exact_where_the_product_is_rounded_otherwise_by_then() -> None:
    base = llama().eval()
    model = adapted(copy.deepcopy(base))
    model.merge_adapter()
    with torch.no_grad():
        for name in pairs_of(model, "default"):  # as on another device
            weight = sam_layers(model)[name].get_base_layer().weight
            weight.copy_(torch.nextafter(weight, torch.tensor(1.0)))
    model.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(model.unload().parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("r", [None, R])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_beside_a_lora_in_the_same_layer_merging_and_unmerging_leaves_the_base_as_it_was(
    first: str, r: int | None
) -> None:
    base, ids = llama().eval(), torch.randint(1, 40, (2, 7))
    pairs = {} if r is None else {"r": r, "lora_alpha": ALPHA}
    every: dict[str, Any] = {
        "ours": SamConfig(density=0.1, score="random", init_weights=False, target_modules=["q_proj"], **pairs),
        "theirs": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    }
    second = {"ours": "theirs", "theirs": "ours"}[first]
    model: Any = get_peft_model(copy.deepcopy(base), every[first], adapter_name=first, mixed=True).eval()
    model.add_adapter(second, every[second])
    model.set_adapter([first, second])
    before = model(input_ids=ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    torch.testing.assert_close(dict(model.unload().named_parameters()), dict(base.named_parameters()))


def test_tied_weights_and_modules_that_are_no_linear_layers_have_none() -> None:
    base = gpt2()
    assert base.lm_head.weight is base.transformer.wte.weight
    model = adapted(copy.deepcopy(base), target_modules="all")
    found = pairs_of(model, "default")
    assert {type(model.base_model.model.get_submodule(name).get_base_layer()).__name__ for name in found} == {"Conv1D"}


@pytest.mark.filterwarnings("ignore")  # what the quantisers say of CPUs
@pytest.mark.parametrize("kind", ["hqq", "4 bits", "8 bits", "buffers"])
def test_a_quantised_layer_has_them_beside_its_codes_and_gets_these_back(kind: str) -> None:
    base = quantised(kind, Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)))
    plain, x = dequantised(base), torch.randn(5, 64)
    model = adapted(base, target_modules="all").train()  # to infer, bitsandbytes has a coarser kernel
    dense = composed(plain, model)
    near = {"atol": KINDS[kind], "rtol": KINDS[kind]}
    torch.testing.assert_close(model(x), dense(x), **near)
    if kind in WRITABLE:
        with torch.no_grad():
            before = model(x)
            model.merge_adapter(safe_merge=True)
            assert float((model(x) - dense(x)).norm() / dense(x).norm()) < 0.3  # new codes, rounded
            model.unmerge_adapter()
            assert torch.equal(model(x), before)


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_has_one_graph_with_them() -> None:
    model, x = (
        adapted(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), target_modules="all"),
        torch.randn(3, 16),
    )
    factors = [factor for pair in pairs_of(model, "default").values() for factor in pair.parameters()]
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(run(x).square().sum(), factors)
    torch.testing.assert_close(found, torch.autograd.grad(model(x).square().sum(), factors))


# Files


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Any, Path]:
    """A base, a model, and the folder of its adapter."""
    torch.manual_seed(0)
    base = llama().eval()
    model = adapted(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    return base, model, tmp_path


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_comes_back_bit_for_bit(saved: tuple[Any, Any, Path], low_cpu_mem_usage: bool) -> None:
    base, model, folder = saved
    ids = torch.randint(1, 40, (2, 7))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    kept = json.loads((folder / "adapter_config.json").read_text())
    assert (kept["r"], kept["lora_alpha"], kept["lora_dropout"]) == (R, ALPHA, 0.0)
    assert f"| low-rank pairs | r = {R}, α = {ALPHA:g} |" in (folder / "README.md").read_text()


def _without(state: dict[str, Tensor], key: str) -> None:
    del state[key]


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], str], None], str]] = {
    "one is missing": (_without, "has nothing as lora_A .* lora_A of shape"),
    "another rank": (
        lambda s, k: s.update({k: torch.zeros(R + 1, s[k].shape[1])}),
        r"shape \(4, 24\) .* lora_A of shape \(3, 24\)",
    ),
    "integers": (lambda s, k: s.update({k: s[k].int()}), "torch.int32"),
    "too large": (lambda s, k: s.update({k: s[k].double() * 1e300}), "too large for float32"),
    "of another module": (
        lambda s, k: s.update({"base_model.model.lm_head.sam_sparse_low_rank.lora_A": s[k].clone()}),
        "no low",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_words_and_changes_nothing(saved: tuple[Any, Any, Path], damage: str) -> None:
    base, model, folder = saved
    change, message = DAMAGES[damage]
    state = load_file(folder / "adapter_model.safetensors")
    change(state, next(key for key in state if key.endswith("lora_A")))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fresh = copy.deepcopy(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(fresh, folder)
    assert fresh.state_dict().keys() == base.state_dict().keys()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(folder), "default")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_that_has_lost_pairs_takes_no_adapter_s_place(saved: tuple[Any, Any, Path]) -> None:
    _, model, folder = saved
    state = load_file(folder / "adapter_model.safetensors")
    pairs = [key for key in state if "sam_sparse_low_rank" in key]
    before = copy.deepcopy(model.state_dict())
    for lost in (pairs[:2], pairs):
        left = {key: tensor for key, tensor in state.items() if key not in lost}
        save_file(left, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="low-rank pair"):
            hotswap_adapter(model, str(folder), "default")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_room_is_made_for_the_rank_that_a_config_announces(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 10**15}))
    with pytest.raises(ValueError, match=r"lora_A of shape \(1000000000000000, "):
        PeftModel.from_pretrained(copy.deepcopy(base), folder)


def test_another_adapter_of_the_rank_takes_its_place_in_the_same_tensors(saved: tuple[Any, Any, Path]) -> None:
    base, model, folder = saved
    other = adapted(copy.deepcopy(base), seed=1, lora_alpha=2.0)
    tensors = [factor for pair in pairs_of(other, "default").values() for factor in pair.parameters()]
    hotswap_adapter(other, str(folder), "default")
    ids = torch.randint(1, 40, (2, 7))
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    now = [factor for pair in pairs_of(other, "default").values() for factor in pair.parameters()]
    assert list(map(id, now)) == list(map(id, tensors))
    assert other.peft_config["default"].lora_alpha == ALPHA


def test_an_adapter_without_pairs_there_takes_the_place_of_one_that_has_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, ids = llama().eval(), torch.randint(1, 40, (2, 7))
    sparse, few = (
        adapted(copy.deepcopy(base), seed=1, r=r, lora_alpha=a, **o)
        for r, a, o in ((None, None, {}), (R, 2.0, {"target_modules": ["q_proj"]}))
    )
    for number, other in enumerate((sparse, few)):
        other.save_pretrained(tmp_path / str(number))
        model = adapted(copy.deepcopy(base))
        hotswap_adapter(model, str(tmp_path / str(number)), "default")
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_values_and_pairs_are_saved_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    adapted(llama(), save_dtype="bfloat16").save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for key, tensor in state.items() if not key.endswith("support")} == {torch.bfloat16}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r is the rank of low-rank pairs, a positive integer, or None for none; got 0"),
    ({"r": 2.0}, "got 2.0"),
    ({"r": True}, "got True"),
    ({"r": 2, "lora_alpha": 0}, "lora_alpha must be a positive number, or None for 2 * r; got 0"),
    ({"r": 2, "lora_alpha": 10**400}, "lora_alpha must be a positive number"),
    ({"r": 2, "lora_dropout": 1.0}, "0 <= lora_dropout < 1; got 1.0"),
    ({"lora_alpha": 4}, "r=None asks for none"),
    ({"lora_dropout": 0.1}, "r=None asks for none"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_a_wrong_option_is_an_error_that_says_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SamConfig(**options)


def test_without_an_alpha_it_is_twice_the_rank() -> None:
    assert SamConfig(r=4).lora_alpha == 8.0
    assert SamConfig().lora_alpha is None


# Several adapters


def test_a_sum_of_adapters_has_pairs_of_the_sum_of_their_ranks() -> None:
    model = adapted(llama())
    layers = [layer for layer in sam_layers(model).values() if layer.pair("default") is not None]
    model.add_adapter("other", SamConfig(density=0.05, score="random", seed=1, r=2, init_weights=False))
    model.add_adapter("third", SamConfig(density=0.05, score="random", seed=2, init_weights=False))
    of, weights = ["default", "other", "third"], [0.5, -2.0, 1.5]
    model.add_weighted_adapter(of, weights, "sum", combination_type="linear")
    config = model.peft_config["sum"]
    assert (config.r, config.lora_alpha) == (R + 2, R + 2)
    for layer in layers:
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in zip(of, weights, strict=True))
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)
    with pytest.raises(ValueError, match=r"'ties' picks entries, and adapters \['default', 'other'\] have low-rank"):
        model.add_weighted_adapter(of, weights, "ties", combination_type="ties", density=0.5)
    assert "ties" not in model.peft_config
    model.add_weighted_adapter(["third"], [2.0], "twice", combination_type="linear")
    assert model.peft_config["twice"].r is None


def test_a_pending_adapter_counts_as_nothing_in_a_sum_pairs_included() -> None:
    model = adapted(llama())
    model.add_adapter("pending", SamConfig(r=2, init_weights=False))
    with pytest.warns(UserWarning, match="combined as nothing"):
        model.add_weighted_adapter(["default", "pending"], [1.0, 1.0], "sum", combination_type="linear")
    assert model.peft_config["sum"].r == R
    for layer in sam_layers(model).values():
        if layer.pair("default") is not None:
            torch.testing.assert_close(layer.get_delta_weight("sum"), layer.get_delta_weight("default"))


def test_a_sum_keeps_pairs_of_layers_that_have_no_entries() -> None:
    few: dict[str, Any] = {"score": "random", "density": 0.002, "init_weights": False}
    model = get_peft_model(llama(), SamConfig(r=2, **few)).eval()
    model.add_adapter("other", SamConfig(r=1, seed=1, target_modules=["q_proj"], **few))
    assert len(model.base_model.sparse_deltas()) < len(pairs_of(model, "default"))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")
    assert pairs_of(model, "sum").keys() == pairs_of(model, "default").keys()
    model.base_model.set_adapter(["default", "other"])
    ids = torch.randint(1, 40, (2, 7))
    expected = model(input_ids=ids).logits
    model.set_adapter("sum")
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert all(bool(pair.lora_A.any(1).all()) for pair in pairs_of(model, "sum").values())  # they can be trained on


def test_samples_with_adapters_of_their_own_have_their_pairs() -> None:
    model, ids = adapted(llama()), torch.randint(1, 40, (3, 7))
    model.add_adapter("other", SamConfig(density=0.05, score="random", seed=1, r=2, init_weights=False))
    names_of = ["other", "__base__", "default"]
    together = model(input_ids=ids, adapter_names=names_of).logits
    for row, name in enumerate(names_of):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=ids[row : row + 1]).logits
        else:
            model.set_adapter(name)
            alone = model(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(together[row], alone[0])


def test_a_scale_counts_for_both() -> None:
    model = adapted(llama())
    for layer in sam_layers(model).values():
        once = layer.get_delta_weight("default") if layer.pair("default") is not None else None
        layer.set_scale("default", 0.5)
        if once is not None:
            torch.testing.assert_close(layer.get_delta_weight("default"), once * 0.5)
            x = torch.randn(2, once.shape[1])
            weight = layer.get_base_layer().weight
            torch.testing.assert_close(layer(x), x @ (weight + once * 0.5).t())


# Other formats


FEW = {"target_modules": r".*(q_proj|o_proj|up_proj)"}


@pytest.mark.parametrize("format", ["supertuning", "lora"])
def test_stock_peft_loads_them_as_they_are(format: str, tmp_path: Path) -> None:
    base, ids = llama().eval(), torch.randint(1, 40, (2, 7))
    model = adapted(copy.deepcopy(base), **FEW)
    report = export_adapter(model, tmp_path / "there", format, **({"rank": 16} if format == "lora" else {}))
    assert report.error < 1e-6
    assert f"low-rank pairs (r={R})" in str(report)
    loaded = PeftModel.from_pretrained(base, tmp_path / "there").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_factors_in_half_precision_lose_nothing_in_stock_lora(tmp_path: Path) -> None:
    told: dict[str, Any] = {"score": "random", "density": 0.1, "r": R, "init_weights": False, **FEW}
    model = get_peft_model(llama().to(torch.bfloat16), SamConfig(**told), autocast_adapter_dtype=False)
    assert {pair.lora_A.dtype for pair in pairs_of(model, "default").values()} == {torch.bfloat16}
    assert export_adapter(model, tmp_path / "there", "lora", rank=16).error < 1e-3


def test_a_smaller_rank_loses_of_the_deltas_alone(tmp_path: Path) -> None:
    model = adapted(llama(), **FEW)
    with pytest.warns(UserWarning, match="is an approximation"):
        report = export_adapter(model, tmp_path / "there", "lora", rank=2)
    assert json.loads((tmp_path / "there" / "adapter_config.json").read_text())["r"] == 2 + R
    lost, whole = 0.0, 0.0
    for layer in sam_layers(model).values():
        if (pair := layer.pair("default")) is not None:
            dense = layer.get_delta_weight("default").double()
            lost += float(torch.linalg.svdvals((dense - pair.dense().double()).detach())[2:].square().sum())
            whole += float(dense.detach().square().sum())
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


def test_the_merged_model_is_written(tmp_path: Path) -> None:
    model, ids = adapted(llama()), torch.randint(1, 40, (2, 7))
    expected = model(input_ids=ids).logits
    export_adapter(model, tmp_path / "there", "merged")
    loaded = type(model.get_base_model()).from_pretrained(tmp_path / "there").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


@pytest.mark.parametrize("what", ["shira", "checkpoint_patch", "stream", "rounding"])
def test_what_is_of_single_entries_refuses_them_in_words(what: str, tmp_path: Path) -> None:
    model = adapted(llama(), **FEW)
    does: dict[str, Callable[[], Any]] = {
        "stream": lambda: WeightStream(model),
        "rounding": lambda: rounding_report(model),
    }
    with pytest.raises(ValueError, match="change every entry of their layers"):
        does.get(what, lambda: export_adapter(model, tmp_path / "there", what))()
    assert not (tmp_path / "there").exists()
