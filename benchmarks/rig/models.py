"""A pretrained encoder and the head of a task.

The head is freshly initialised and trained densely by every method; nothing else in the model is new. It is the same
for all encoders, so that results differ by what is done to the encoder:

* texts: dropout, a dense layer as wide as the encoder, tanh, dropout, a linear layer to the classes, on one vector of
  the text. This is transformers' head of RoBERTa, whose vector is the first token's last hidden state; jiant puts it
  on the encoder's pooler. Sentence models such as MiniLM (the default) were trained on the mean over tokens; BERT's
  pooler, which their files still carry, was not trained with them. So where the model's folder says that it pools by
  the mean (`1_Pooling/config.json`), the vector is the mean; and a pooler is left out, as it would be one more
  pretrained layer in some models and none in others.
* choices: the same head with one output, for each choice; cross-entropy over the choices, as in jiant.
* spans: the vectors of both spans, one after the other, dropout, a linear layer to the classes. The vector of a span is
  the mean of its tokens' last hidden states h weighted by the softmax of w·h + b within the span. This is jiant's
  `SpanComparisonHead` (github.com/nyu-mll/jiant, jiant/proj/main/modeling/heads.py) with AllenNLP's
  `SelfAttentiveSpanExtractor` (the head finding of Lee et al. 2017, arXiv 1707.07045).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.common import tasks as known
from benchmarks.rig.method import Setup
from benchmarks.rig.tasks import PaperTask

HEAD = ("head",)
BODY = "body"
# Standard deviation of the head's new weights, as in BERT and RoBERTa.
INIT_STD = 0.02


class Head(nn.Module):
    """Dropout, dense, tanh, dropout, linear: (…, width) → (…, outputs)."""

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(width, width)
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs for vectors x."""
        return self.out(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


class SpanHead(nn.Module):
    """(batch, tokens, width) and two spans each → (batch, outputs)."""

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.Linear(width, 1)
        self.out = nn.Linear(2 * width, outputs)

    def forward(self, states: Tensor, spans: Tensor) -> Tensor:
        """The outputs; `spans` (batch, 2, 2) holds first token and last + 1."""
        places = torch.arange(states.shape[1], device=states.device)
        inside = (places >= spans[..., :1]) & (places < spans[..., 1:])
        weights = self.attention(states).squeeze(-1)[:, None].expand(inside.shape)
        weights = weights.masked_fill(~inside, -torch.inf).softmax(-1)
        return self.out(self.dropout((weights @ states).flatten(1)))


class TaskModel(nn.Module):
    """`body`, an encoder, and `head`; called with a batch, it returns logits and, given labels, the mean loss.

    Args:
        pooling: "first" or "mean": what of the tokens' last hidden states is the vector of a text.
        precision: "fp32", or "bf16" for autocast in every forward pass; parameters are float32 in both.
    """

    def __init__(self, body: nn.Module, task: PaperTask, pooling: str, precision: str = "fp32") -> None:
        super().__init__()
        if pooling not in ("first", "mean"):
            raise ValueError(f"pooling must be 'first' or 'mean'; got {pooling!r}.")
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16'; got {precision!r}.")
        config: Any = body.config
        dropout = getattr(config, "hidden_dropout_prob", 0.1)
        self.body, self.kind, self.regression, self.pooling = body, task.kind, task.regression, pooling
        self.precision = precision
        self.head = (SpanHead if task.kind == "spans" else Head)(config.hidden_size, task.num_labels, dropout)
        for name, parameter in self.head.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=INIT_STD)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        spans: Tensor | None = None,
        **tokens: Tensor,
    ) -> SequenceClassifierOutput:
        """Logits (batch, classes), (batch, choices) or (batch, 1); the loss is a mean over the batch."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self._logits(input_ids, attention_mask, spans, tokens).float()
        loss = None
        if labels is not None and self.regression:
            loss = nn.functional.mse_loss(logits.squeeze(-1), labels.float())
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _logits(self, ids: Tensor, attention_mask: Tensor, spans: Tensor | None, tokens: dict[str, Tensor]) -> Tensor:
        flat = {name: tensor.flatten(0, -2) for name, tensor in {"input_ids": ids, **tokens}.items()}
        mask = attention_mask.flatten(0, -2)
        states = self.body(attention_mask=mask, **flat).last_hidden_state
        if self.kind == "spans":
            return self.head(states, spans)
        logits = self.head(self._vector(states, mask)).view(*ids.shape[:-1], -1)
        return logits.squeeze(-1) if self.kind == "choices" else logits

    def _vector(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "first":
            return states[:, 0]
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def where_is(name: str) -> str:
    """The folder or Hub name of a model; "minilm" is the one that comes as a Python package."""
    return known.default_model_path() if name == "minilm" else name


def pooling_of(name: str) -> str:
    """How a model makes one vector of a text, as far as its folder says; else by the first token."""
    file = Path(where_is(name), "1_Pooling", "config.json")
    return "mean" if file.is_file() and json.loads(file.read_text()).get("pooling_mode_mean_tokens") else "first"


def build(
    name: str, task: PaperTask, pooling: str, seed: int, precision: str = "fp32", dropout: float | None = None
) -> TaskModel:
    """The pretrained encoder with a new head; the same for the same seed.

    Args:
        dropout: of all layers; None for what the model was pretrained with.
    """
    # fused attention has no fast bfloat16 on CPUs
    eager = precision == "bf16" and not torch.cuda.is_available()
    body = AutoModel.from_pretrained(where_is(name), attn_implementation="eager" if eager else None)
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    torch.manual_seed(seed)
    model = TaskModel(body, task, pooling, precision)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout
    return model


def candidate_modules(model: TaskModel, which: str, exclude: str = "") -> tuple[str, ...]:
    """Modules of the body whose parameters are candidates: "linear" layers, or "all" that own parameters.

    Args:
        exclude: names or parts of names to leave out, joined by "|".
    """
    if which not in ("linear", "all"):
        raise ValueError(f"candidates must be 'linear' or 'all'; got {which!r}.")
    out = [part for part in exclude.split("|") if part]
    return tuple(
        f"{BODY}.{name}"
        for name, module in model.body.named_modules()
        if (isinstance(module, nn.Linear) if which == "linear" else list(module.parameters(recurse=False)))
        and not any(part in f"{BODY}.{name}." for part in out)
    )


def setup_of(
    model: TaskModel, batches: Any, *, density: float, seed: int, steps: int, candidates: str, exclude: str
) -> Setup:
    """What a method may know of a run with this model."""
    return Setup(density, seed, steps, batches, HEAD, candidate_modules(model, candidates, exclude))
