"""Laws of batches in which each sample has an adapter of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaConfig,
    DebertaModel,
    ViTConfig,
    XLNetConfig,
    XLNetModel,
)

from peft_sam import SamConfig
from tests.shared.cases import VOCABULARY, bert, gpt2, llama, mixtral, t5, vit

NAMES = ["first", "__base__", "second", "first", "second"]


def adapted(base: Any, **options: Any) -> Any:
    options = {"score": "random", "init_weights": False, "density": 0.1, **options}
    model = get_peft_model(base, SamConfig(**options), adapter_name="first")
    model.add_adapter("second", SamConfig(**{**options, "seed": 1}))
    return model.eval()


def sample_by_sample(model: Any, ids: Tensor, names: list[str]) -> Tensor:
    found = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                found.append(model(input_ids=row[None]).logits)
        else:
            model.set_adapter(name)
            found.append(model(input_ids=row[None]).logits)
    return torch.cat(found)


@pytest.mark.parametrize("options", [{}, {"task_type": "SEQ_CLS"}, {"target_modules": ["query", "LayerNorm"]}])
@torch.no_grad()
def test_each_sample_gets_what_its_adapter_gives_it_alone(options: dict[str, Any]) -> None:
    model = adapted(bert(), **options)
    for head in getattr(model.get_base_model().classifier, "modules_to_save", {}).values():
        nn.init.normal_(head.weight)
    ids = torch.randint(1, VOCABULARY, (5, 7))
    expected = sample_by_sample(model, ids, NAMES)
    model.set_adapter("first")
    torch.testing.assert_close(model(input_ids=ids, adapter_names=NAMES).logits, expected)
    torch.testing.assert_close(model(input_ids=ids).logits, sample_by_sample(model, ids, ["first"] * 5))
    assert len({tuple(row.tolist()) for row in expected}) > 1


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's
@pytest.mark.parametrize("heads", [None, ["lm_head"]])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_each_sample_alone(beams: int, heads: list[str] | None) -> None:
    model = adapted(gpt2(), task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=heads)
    for head in getattr(model.get_base_model().lm_head, "modules_to_save", {}).values():
        nn.init.normal_(head.weight)
    ids = torch.randint(1, VOCABULARY, (3, 4))
    names = ["second", "first", "second"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    expected = []
    for row, name in zip(ids, names, strict=True):
        model.set_adapter(name)
        expected.append(model.generate(input_ids=row[None], **options)[0])
    found = model.generate(input_ids=ids, adapter_names=names, **options)
    assert torch.equal(found, torch.stack(expected))


@torch.no_grad()
def test_trained_rows_of_embeddings_follow_the_names() -> None:
    model = adapted(bert(), trainable_token_indices={"word_embeddings": [1, 2, 3]})
    model.add_adapter("third", SamConfig(score="random", init_weights=False, density=0.1, seed=2))
    rows = model.get_base_model().bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta
    for values in rows.values():
        nn.init.normal_(values)
    ids = torch.arange(1, 6).repeat(5, 1)
    for names in (NAMES, ["first", "third", "second", "__base__", "third"]):
        expected = sample_by_sample(model, ids, names)
        model.set_adapter("first")
        torch.testing.assert_close(model(input_ids=ids, adapter_names=names).logits, expected)


@pytest.mark.parametrize(
    ("names", "before", "message"),
    [
        (["first", "other"], lambda m: None, r"adapter_names has \['other'\]; the adapters are \['first', 'second'\]"),
        (["first", "first"], lambda m: m.train(), "call model.eval"),
        (["first", "first"], lambda m: m.merge_adapter(["second"]), "please call `unmerge_adapter` first"),
        (["first"] * 3, lambda m: None, "got 3 and 2 respectively"),
        (["first"], lambda m: None, "got 1 and 2 respectively"),
    ],
)
def test_names_that_do_not_fit_are_refused_and_leave_nothing_behind(names: Any, before: Any, message: str) -> None:
    model = adapted(bert())
    ids = torch.randint(1, VOCABULARY, (2, 7))
    alone = copy.deepcopy(model)
    before(model)
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, adapter_names=names)
    model.eval()
    if model.base_model.model.bert.encoder.layer[0].attention.self.query.merged:
        model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_a_module_that_is_called_with_more_than_one_tensor_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.bilinear(x, x)

    model = adapted(Two(), target_modules=["bilinear"], density=0.5)
    with pytest.raises(ValueError, match=r"for modules of one tensor, which 'bilinear' .Bilinear. is not"):
        model(x=torch.randn(2, 3), adapter_names=["first", "second"])


def one_by_one(model: Any, inputs: dict[str, Tensor], names: list[str]) -> Tensor:
    alone = {}
    for name in set(names):
        model.set_adapter(name)
        alone[name] = model(**inputs)[0]
    return torch.stack([alone[name][i] for i, name in enumerate(names)])


def of_a_bart() -> Any:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
        )
    )  # fmt: skip


def of_a_deberta() -> Any:
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 32}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return DebertaModel(DebertaConfig(vocab_size=VOCABULARY, **shape, **options))


def of_an_xlnet() -> Any:
    return XLNetModel(XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24))


def of_routed_experts() -> Any:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            y, to = torch.zeros_like(x), input_ids % 2
            for i, expert in enumerate(self.experts):
                y[to == i] = expert(x[to == i])
            return y[None]

    return Routed()


ALL = {"target_modules": "all"}
# model, options, batch, length: batches as large as the sequences are long, dividing that, and not
RIGHT = [
    (bert, ALL, 4, 7),
    (bert, ALL, 4, 4),
    (bert, ALL, 4, 8),
    (gpt2, ALL, 3, 3),
    (gpt2, {"task_type": "CAUSAL_LM"}, 2, 6),
    (llama, ALL, 4, 4),
    (mixtral, {}, 2, 2),
    (t5, {}, 4, 4),
    (t5, {**ALL, "exclude_modules": ["relative_attention_bias"]}, 4, 12),
    (of_a_bart, {}, 3, 3),
    (vit, {}, 3, 8),
    (vit, {}, 5, 8),
]
REFUSED = [
    (t5, ALL, 4, 4, "relative_attention_bias"),
    (t5, ALL, 4, 12, "relative_attention_bias"),
    (t5, ALL, 4, 7, "relative_attention_bias"),
    (t5, ALL, 4, 1, "relative_attention_bias"),
    (of_a_deberta, {}, 4, 6, "pos_proj"),
    (of_an_xlnet, {}, 4, 4, "layer"),
    (of_an_xlnet, {}, 4, 8, "layer"),
    (of_an_xlnet, ALL, 4, 7, "word_embedding"),
    (of_routed_experts, {"target_modules": ["0", "1"]}, 4, 6, "experts"),
]


def inputs_for(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    config = getattr(model.get_base_model(), "config", None)
    if isinstance(config, ViTConfig):
        return {"pixel_values": torch.randn(batch, 3, 8, 8)}
    ids = torch.randint(3, VOCABULARY, (batch, length))
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, **decoder}


def case(row: Any) -> str:
    return row.__name__ if callable(row) else str(row)


@pytest.mark.parametrize(("make", "options", "batch", "length"), RIGHT, ids=case)
@torch.no_grad()
def test_the_batch_is_told_from_the_sequences(make: Any, options: Any, batch: int, length: int) -> None:
    model = adapted(make(), density=0.5, **options)
    names = ["first", "second", "second", "first", "second"][:batch]
    inputs = inputs_for(model, batch, length)
    expected = one_by_one(model, inputs, names)
    torch.testing.assert_close(model(**inputs, adapter_names=names)[0], expected)
    same = one_by_one(model, inputs, ["second"] * batch)
    assert torch.equal(model(**inputs, adapter_names=["second"] * batch)[0], same)


@pytest.mark.parametrize(("make", "options", "batch", "length", "where"), REFUSED, ids=case)
@torch.no_grad()
def test_a_module_that_is_not_called_with_the_batch_is_refused(
    make: Any, options: Any, batch: int, length: int, where: str
) -> None:
    model = adapted(make(), density=0.5, **options)
    inputs = inputs_for(model, batch, length)
    with pytest.raises(ValueError, match=f"adapter_names needs the batch, 4 samples, .*'[^']*{where}[^']*'"):
        model(**inputs, adapter_names=["first", "second", "second", "first"])
    same = one_by_one(model, inputs, ["second"] * batch)
    assert torch.equal(model(**inputs, adapter_names=["second"] * batch)[0], same)


@pytest.mark.parametrize("length", [2, 4, 5])
@pytest.mark.parametrize("beams", [1, 2])
def test_an_encoder_and_its_decoder_generate_what_each_sample_gets_alone(beams: int, length: int) -> None:
    model = adapted(t5(), task_type="SEQ_2_SEQ_LM", density=0.5)
    ids, names = torch.randint(3, VOCABULARY, (2, length)), ["second", "first"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    expected = []
    for row, name in zip(ids, names, strict=True):
        model.set_adapter(name)
        expected.append(model.generate(input_ids=row[None], **options)[0])
    assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **options), torch.stack(expected))
    everywhere = adapted(t5(), task_type="SEQ_2_SEQ_LM", target_modules="all", density=0.5)
    with pytest.raises(ValueError, match="relative_attention_bias"):
        everywhere.generate(input_ids=ids, adapter_names=names, **options)


def test_heads_of_their_own_follow_the_names_where_shapes_do_not_tell_the_batch() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    options: dict[str, Any] = {"target_modules": ["0"], "modules_to_save": ["2"], "score": "random", "density": 0.3}
    model: Any = get_peft_model(base, SamConfig(init_weights=False, **options), "first")
    model.add_adapter("second", SamConfig(init_weights=False, seed=1, **options))
    model.eval()
    with torch.no_grad():
        for name in ("first", "second"):
            model.base_model.model[2].modules_to_save[name].weight.normal_()
    x, names = torch.randn(4, 8), ["second", "first", "__base__", "second"]
    found = model(x, adapter_names=names)
    for row, name in enumerate(names):
        assert torch.allclose(found[row], model(x[row : row + 1], adapter_names=[name])[0], atol=1e-6)
