"""A table of small models: a new kind of module or model is one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

VOCABULARY = 50


class Sequential(nn.Sequential):
    """Layers one after the other, called with one tensor and returning one tensor."""


class Attention(nn.Module):
    """Self-attention by `nn.MultiheadAttention`, which reads its output projection without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    """torch's own transformer encoder, which reads its children's weights past them in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Lists(nn.Module):
    """A module with lists of parameters, which it reads, since they cannot be called."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.ParameterList([torch.randn(8, 8) / 3 for _ in range(2)])
            self.shifts = nn.ParameterDict({"first": torch.randn(8), "last": torch.randn(8)})

        def forward(self, x: Tensor) -> Tensor:
            for matrix, shift in zip(self.matrices, self.shifts.values(), strict=True):
                x = x @ matrix + shift
            return x

    def __init__(self) -> None:
        super().__init__()
        self.scales = self.Scales()

    def forward(self, x: Tensor) -> Tensor:
        return self.scales(x)


class Recurrent(nn.Module):
    """An LSTM, which reads its weights from a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Nested(nn.Module):
    """A module that owns a parameter and a child that is a target too."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(8) + 0.5)
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Experts(nn.Module):
    """3-D expert tensors, contracted per expert."""

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 8) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bti,eio->bto", x, self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.bank = self.Bank()

    def forward(self, x: Tensor) -> Tensor:
        return self.bank(x)


class TiedPair(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 5))


@dataclass(frozen=True)
class ModuleCase:
    """A plain module that maps one tensor to one tensor."""

    name: str
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    target_modules: Any = "all"


MODULES = [
    ModuleCase("linear", lambda: Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), _numbers(3, 5, 8)),
    ModuleCase("linear without bias", lambda: Sequential(nn.Linear(8, 6, bias=False)), _numbers(7, 8)),
    ModuleCase("linear of a vector", lambda: Sequential(nn.Linear(8, 6)), _numbers(8)),
    ModuleCase("Conv1D", lambda: Sequential(Conv1D(6, 8)), _numbers(3, 5, 8)),
    ModuleCase("embedding", lambda: Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 4)), _ids),
    ModuleCase("scaled embedding", lambda: Sequential(BartScaledWordEmbedding(VOCABULARY, 8, 1, 3.0)), _ids),
    ModuleCase("Gemma's embedding", lambda: Sequential(Gemma3TextScaledWordEmbedding(VOCABULARY, 8, 0, 3.1)), _ids),
    ModuleCase("conv1d", lambda: Sequential(nn.Conv1d(4, 6, 3)), _numbers(2, 4, 9)),
    ModuleCase("depthwise conv1d", lambda: Sequential(nn.Conv1d(4, 8, 3, groups=4, bias=False)), _numbers(2, 4, 9)),
    ModuleCase("grouped conv2d", lambda: Sequential(nn.Conv2d(4, 6, 3, groups=2)), _numbers(2, 4, 6, 6)),
    ModuleCase("conv3d", lambda: Sequential(nn.Conv3d(2, 3, 2)), _numbers(2, 2, 4, 4, 4)),
    ModuleCase("layer norm", lambda: Sequential(nn.LayerNorm(8), nn.RMSNorm(8)), _numbers(3, 8)),
    ModuleCase("multi-head attention", Attention, _numbers(2, 5, 8)),
    ModuleCase("transformer encoder", Encoder, _numbers(2, 5, 8)),
    ModuleCase("lists of parameters", Lists, _numbers(2, 8)),
    ModuleCase("LSTM", Recurrent, _numbers(2, 5, 8)),
    ModuleCase("nested targets", Nested, _numbers(3, 8)),
    ModuleCase("experts", Experts, _numbers(2, 5, 8)),
    ModuleCase("tied weights", TiedPair, _ids),
]


@dataclass(frozen=True)
class NetCase:
    """A transformers model with its task type and a batch with labels."""

    name: str
    make: Callable[[], nn.Module]
    task_type: str | None
    batch: Callable[[int], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)


def _classification(n: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (n, 7)), "labels": torch.randint(0, 2, (n,))}


def _language(n: int) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (n, 7))
    return {"input_ids": ids, "labels": ids.clone()}


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def _llama_shape() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }


def llama(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**_llama_shape(), **more))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**_llama_shape(), num_local_experts=2, num_experts_per_tok=1))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def _images(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, 8, 8), "labels": torch.randint(0, 2, (n,))}


NETS = [
    NetCase("BERT", bert, "SEQ_CLS", _classification),
    NetCase("BERT, all modules", bert, "SEQ_CLS", _classification, {"target_modules": "all"}),
    NetCase("GPT-2", gpt2, "CAUSAL_LM", _language),
    NetCase("GPT-2, all modules, tied head", gpt2, "CAUSAL_LM", _language, {"target_modules": "all"}),
    NetCase("Llama", llama, "CAUSAL_LM", _language),
    NetCase("Mixtral, all modules", mixtral, "CAUSAL_LM", _language, {"target_modules": "all"}),
    NetCase("T5", t5, "SEQ_2_SEQ_LM", _language),
    NetCase("ViT, all modules, nested", vit, None, _images, {"target_modules": "all"}),
]


@dataclass(frozen=True)
class FamilyCase:
    """A model of a family, with a batch whose loss can be had, and the linear layers of its head."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    head: tuple[str, ...]


def _encoder_shape() -> dict[str, Any]:
    shape = bert().config.to_dict()
    return {key: number for key, number in shape.items() if type(number) is int and key.startswith(SHAPE)}


SHAPE = ("vocab_size", "hidden_size", "num_hidden", "num_attention", "intermediate", "max_position")


def _disentangled() -> dict[str, Any]:
    return {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], **_encoder_shape()}


def _experts() -> dict[str, Any]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, **_llama_shape()}


def bart() -> BartForConditionalGeneration:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _BART_SIDE.items()}
    config = BartConfig(vocab_size=VOCABULARY, d_model=16, max_position_embeddings=32, scale_embedding=True, **sides)
    return BartForConditionalGeneration(config)


_BART_SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


def whisper() -> WhisperForConditionalGeneration:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _BART_SIDE.items()}
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        **sides,
    )
    return WhisperForConditionalGeneration(config)


def clip() -> CLIPModel:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, **shape}
    vision = {"image_size": 8, "patch_size": 4, **shape}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def _speech(n: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(n, 8, 20), "labels": torch.randint(4, VOCABULARY, (n, 5))}


def _pairs(n: int) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (n, 7))
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": torch.randn(n, 3, 8, 8), "return_loss": True}


FAMILIES = [
    FamilyCase("BERT", bert, _classification, ("classifier",)),
    FamilyCase(
        "RoBERTa",
        lambda: RobertaForSequenceClassification(RobertaConfig(**_encoder_shape())),
        _classification,
        ("classifier.dense", "classifier.out_proj"),
    ),
    FamilyCase(
        "DeBERTa",
        lambda: DebertaForSequenceClassification(DebertaConfig(**_disentangled())),
        _classification,
        ("pooler.dense", "classifier"),
    ),
    FamilyCase(
        "DeBERTa-v2",
        lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**_disentangled())),
        _classification,
        ("pooler.dense", "classifier"),
    ),
    FamilyCase("GPT-2", gpt2, _language, ("lm_head",)),
    FamilyCase("Llama", llama, _language, ("lm_head",)),
    FamilyCase(
        "Gemma 3",
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(head_dim=8, pad_token_id=0, **_llama_shape())),
        _language,
        ("lm_head",),
    ),
    FamilyCase("Qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**_llama_shape())), _language, ("lm_head",)),
    FamilyCase("Qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, **_llama_shape())), _language, ("lm_head",)),
    FamilyCase("Mixtral", mixtral, _language, ("lm_head",)),
    FamilyCase(
        "Qwen2 MoE",
        lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(shared_expert_intermediate_size=8, **_experts())),
        _language,
        ("lm_head",),
    ),
    FamilyCase(
        "Qwen3 MoE",
        lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=8, **_experts())),
        _language,
        ("lm_head",),
    ),
    FamilyCase("T5", t5, _language, ("lm_head",)),
    FamilyCase("BART", bart, _language, ("lm_head",)),
    FamilyCase("ViT", vit, _images, ("classifier",)),
    FamilyCase("Whisper", whisper, _speech, ("proj_out",)),
    FamilyCase("CLIP", clip, _pairs, ()),
]


def shown(value: object) -> str:
    """The id of a parameter that may be a function: the same in every process."""
    return getattr(value, "__name__", str(value))


def names(case: ModuleCase | NetCase | FamilyCase) -> str:
    return case.name
