"""Laws of which modules and parameters are candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from peft_sam import SamConfig, select_parameters
from peft_sam._peft import NoMatchingPeftModuleError
from peft_sam.tuner.candidates import candidates_of, trained_besides
from tests.shared.cases import NETS, NetCase, bert, gpt2, names, t5


def candidates(model: nn.Module, **options: Any) -> set[str]:
    return set(candidates_of(get_peft_model(model, SamConfig(**options)), "default"))


def modules(found: set[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in found}


def test_by_default_every_linear_layer_but_the_head_is_targeted() -> None:
    found = modules(candidates(bert()))
    linear = {n for n, m in bert().named_modules() if isinstance(m, nn.Linear)}
    assert found == linear - {"classifier"}
    assert "lm_head" not in modules(candidates(gpt2()))
    assert modules(candidates(t5())) == {
        n for n, m in t5().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    }


def test_weight_and_bias_of_a_target_are_candidates_alike() -> None:
    found = candidates(bert(), target_modules=["query"])
    assert {name.rpartition(".")[2] for name in found} == {"weight", "bias"}


@pytest.mark.parametrize("case", NETS, ids=names)
def test_all_targets_every_parameter_that_a_module_below_the_root_owns(case: NetCase) -> None:
    base = case.make()
    expected = {name for name, _ in base.named_parameters() if "." in name}
    assert candidates(case.make(), target_modules="all") == expected


def test_all_leaves_the_modules_to_save_alone() -> None:
    found = candidates(bert(), target_modules="all", task_type="SEQ_CLS")
    assert not any("classifier" in name for name in found)
    assert "bert.embeddings.word_embeddings.weight" in found


@pytest.mark.parametrize("shorthand", [None, "all-linear", "all", ["pre_classifier", "q_lin"]])
def test_what_peft_takes_for_the_head_by_the_end_of_its_name_is_trained_densely_alone(shorthand: Any) -> None:
    base = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    )
    model = get_peft_model(base, SamConfig(task_type="SEQ_CLS", target_modules=shorthand))
    found = set(candidates_of(model, "default"))
    assert "distilbert.transformer.layer.0.attention.q_lin.weight" in found
    assert not any("classifier" in name for name in found)
    assert {name for name, _ in trained_besides(model).items() if "pre_classifier" in name}


@pytest.mark.parametrize("shorthand", [None, "all-linear", "all"])
def test_layers_to_transform_narrows_the_shorthands(shorthand: str | None) -> None:
    found = candidates(bert(), target_modules=shorthand, layers_to_transform=[1])
    assert found
    assert all("layer.1." in name for name in found)


def test_a_list_a_regex_and_exclusions_select_as_in_peft() -> None:
    assert modules(candidates(bert(), target_modules=["query"])) == {
        f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)
    }
    assert modules(candidates(bert(), target_modules=r".*layer\.0\..*(query|key)")) == {
        f"bert.encoder.layer.0.attention.self.{n}" for n in ("query", "key")
    }
    found = modules(candidates(bert(), exclude_modules=["dense"]))
    assert found
    assert not any(name.endswith("dense") for name in found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["querty", "vaule"]}, r"Target modules .* not found in the base model"),
        ({"target_modules": "no_such.*"}, r"Target modules no_such\.\* not found in the base model"),
        (
            {"target_modules": ["query"], "layers_to_transform": [7], "layers_pattern": "layer"},
            r"not found in the base model.*layers_to_transform=\[7\] and layers_pattern='layer'",
        ),
        (
            {"target_modules": ["query", "nothing"], "exclude_modules": ["query"]},
            "No modules were targeted for adaptation",
        ),
        ({"target_modules": ["dropout"]}, "No modules were targeted for adaptation.*owns parameters"),
        ({"target_modules": ["nothing"], "modules_to_save": ["classifier"]}, "No modules were targeted for adaptation"),
        ({"target_modules": "all", "exclude_modules": ".*"}, "All modules were excluded"),
    ],
)
def test_where_nothing_matches_peft_s_words_say_so_and_what_could_be_targeted(options: Any, words: str) -> None:
    base = bert()
    before = [type(m) for m in base.modules()]
    with pytest.raises(
        NoMatchingPeftModuleError, match=rf"{words}.* could be targeted: .*Embedding: .*Linear: .*query"
    ):
        get_peft_model(base, SamConfig(**options))
    assert [type(m) for m in base.modules()] == before
    assert all(p.requires_grad for p in base.parameters())


def test_a_model_without_linear_layers_is_told_that_they_are_the_default_and_what_to_pass() -> None:
    base = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"No `target_modules` passed.*default are linear layers.*'all'.*Conv2d: 0"
    ):
        candidates(base)
    assert modules(candidates(base, target_modules="all")) == {"0", "1"}


def test_names_of_other_models_beside_those_that_match_are_passed_over() -> None:
    many = ["q_proj", "query", "v_proj", "value", "query_key_value", "c_attn", "out_proj", "gate_up_proj"]
    assert modules(candidates(bert(), target_modules=many)) == modules(
        candidates(bert(), target_modules=["query", "value"])
    )


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [("querry", "'querry', did you mean 'query'"), ("self.valeu", "'self.valeu', did you mean 'self.value'")],
)
def test_a_misspelt_name_beside_those_that_match_is_warned_of(wanted: str, meant: str) -> None:
    with pytest.warns(UserWarning, match=meant):
        assert modules(candidates(bert(), target_modules=["key", wanted])) == modules(
            candidates(bert(), target_modules=["key"])
        )


def test_an_integer_weight_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight is torch\.int8 and cannot take a delta.*targeted: Linear: 1\."):
        get_peft_model(model, SamConfig(target_modules=["0"]))


def test_a_score_of_the_weights_on_the_meta_device_is_refused_and_the_model_kept() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="meta device"):
        get_peft_model(base, SamConfig(target_modules="all", score="magnitude", density=0.5))
    assert type(base[0]) is nn.Linear
    assert base[0].weight.requires_grad


def test_selecting_by_data_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(base, SamConfig(target_modules="all", density=0.5))
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device: load the weights"):
        select_parameters(model, [torch.ones(1, 4)], loss_fn=lambda model, x: model(x).sum(), progress=False)


def test_a_tied_parameter_is_one_candidate_under_its_first_name() -> None:
    found = candidates(gpt2(), target_modules="all")
    assert "transformer.wte.weight" in found
    assert "lm_head.weight" not in found
    assert candidates(gpt2(), target_modules=["lm_head"]) == {"transformer.wte.weight"}


class ListAtTheRoot(nn.Module):
    """A root that owns a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scales, self.linear = nn.ParameterList([torch.ones(4)]), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scales[0]


def test_a_child_that_the_root_reads_without_calling_it_is_a_target() -> None:
    model = get_peft_model(
        nn.MultiheadAttention(8, 2), SamConfig(target_modules=["out_proj"], score="random", density=0.5)
    )
    assert set(candidates_of(model, "default")) == {"out_proj.weight", "out_proj.bias"}


@pytest.mark.parametrize("targets", ["all", ["linear", "scales"]])
def test_a_list_of_parameters_that_the_root_owns_is_left_alone(targets: Any) -> None:
    model = get_peft_model(ListAtTheRoot(), SamConfig(target_modules=targets, score="random", density=0.5))
    assert set(candidates_of(model, "default")) == {"linear.weight", "linear.bias"}
    assert model(torch.ones(2, 4)).shape == (2, 4)
