"""Laws of training by the libraries on top: TRL's trainers and sentence-transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_sam import SamConfig, WeightReceiver, WeightStream, merged, select_parameters
from peft_sam.layers.found import deltas_of
from tests.shared.cases import VOCABULARY, bert, llama
from tests.shared.reference import largest, mean_loss_gradients
from tests.shared.versions import takes_adapters

pytestmark = [  # the libraries still use names that transformers has renamed
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is not supported for the current backend:UserWarning"),
]

OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One that reads the words w0, w1, ..."""
    special = ["[PAD]", "[EOS]", "[UNK]"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(VOCABULARY - len(special)))])}
    model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", model_max_length=16
    )


def words(*numbers: int) -> str:
    return " ".join(f"w{number % 40}" for number in numbers)


def values(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {key: delta.values.detach().clone() for key, delta in deltas_of(model, name).items()}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def texts() -> Dataset:
    return Dataset.from_list([{"text": words(*range(i, i + 3 + i % 4))} for i in range(12)])


def preferences() -> Dataset:
    return Dataset.from_list(
        [{"prompt": words(i), "chosen": " " + words(3 * i, 5), "rejected": " " + words(7 * i)} for i in range(12)]
    )


def sft(folder: Path, base: Any, **options: Any) -> SFTTrainer:
    args = SFTConfig(str(folder), bf16=False, **OPTIONS)
    return SFTTrainer(base, args=args, train_dataset=texts(), processing_class=tokenizer(), **options)


def dpo(folder: Path, model: Any, peft_config: SamConfig | None = None, **options: Any) -> DPOTrainer:
    args = DPOConfig(str(folder), bf16=False, **{**OPTIONS, **options})
    return DPOTrainer(
        model, args=args, train_dataset=preferences(), processing_class=tokenizer(), peft_config=peft_config
    )


def test_trl_s_fine_tuning_selects_by_its_loss_trains_and_saves_an_adapter(tmp_path: Path) -> None:
    base = llama()
    untouched = copy.deepcopy(base)
    trainer = sft(tmp_path, base, peft_config=SamConfig(task_type="CAUSAL_LM", density=0.1))
    selection = select_parameters(trainer)
    assert trainer._total_train_tokens == 0
    assert not any(trainer._metrics.values())  # nothing of the pass gets into the logs
    tokens = [tokenizer()(text + "[EOS]", return_tensors="pt")["input_ids"] for text in texts()["text"]]
    number = sum(ids.numel() - 1 for ids in tokens)
    assert selection.samples == number
    gradients = mean_loss_gradients(
        untouched,
        selection.indices,
        [{"input_ids": ids, "labels": ids} for ids in tokens],
        lambda model, batch: model(**batch).loss * (batch["labels"].numel() - 1),
        number,
    )
    expected = largest({name: gradients[name].double() ** 2 for name in selection.indices}, selection.k)
    found = {name: indices.tolist() for name, indices in selection.indices.items()}
    assert sum(len(set(found[name]) ^ set(expected[name])) for name in found) <= 2  # ties to rounding
    trainer.train()
    assert all(bool(tensor.any()) for tensor in values(trainer.model).values())
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(untouched, tmp_path / "adapter")
    torch.testing.assert_close(values(loaded), values(trainer.model), rtol=0, atol=0)


@pytest.mark.parametrize("precomputed", [False, True])
def test_trl_s_preference_training_compares_with_the_base_model(tmp_path: Path, precomputed: bool) -> None:
    base = llama()
    trainer = dpo(
        tmp_path,
        copy.deepcopy(base),
        SamConfig(task_type="CAUSAL_LM", density=0.1),
        precompute_ref_log_probs=precomputed,
    )
    select_parameters(trainer)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)  # log 2: the policy starts as the reference
    assert losses(trainer)[-1] < 0.69
    batch = next(iter(trainer.get_train_dataloader()))
    if precomputed:
        got = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    else:
        got = torch.cat(trainer.compute_ref_log_probs(trainer.model, dict(batch)))
    ids = batch["input_ids"]
    with torch.no_grad():
        logits = base.eval()(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    of_tokens = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(got, (of_tokens * batch["completion_mask"][:, 1:]).sum(1))


def test_trl_s_preference_training_goes_on_from_an_adapter_as_its_reference(tmp_path: Path) -> None:
    config = SamConfig(task_type="CAUSAL_LM", density=0.1, score="random", init_weights=False)
    model: Any = get_peft_model(llama(), config)
    trained = values(model)
    trainer = dpo(tmp_path, model)
    torch.testing.assert_close(values(model, "ref"), trained, rtol=0, atol=0)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    torch.testing.assert_close(values(model, "ref"), trained, rtol=0, atol=0)
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in values(model).items())


@takes_adapters
def test_a_sentence_transformer_selects_trains_saves_and_loads(tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    modules = [Transformer(str(tmp_path / "base")), Pooling(16)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "plain"))
    model = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    sentences = [words(1, 2), words(3), words(5, 8, 2)]
    plain = model.encode(sentences, convert_to_tensor=True)
    model.add_adapter(SamConfig(task_type="FEATURE_EXTRACTION", density=0.1))
    assert torch.equal(model.encode(sentences, convert_to_tensor=True), plain)
    pairs = [{"sentence1": words(i, 1), "sentence2": words(2 * i, 5), "score": float(i % 2)} for i in range(12)]
    args = SentenceTransformerTrainingArguments(str(tmp_path / "out"), **OPTIONS)
    trainer = SentenceTransformerTrainer(model, args, Dataset.from_list(pairs), loss=CosineSimilarityLoss(model))
    selection = select_parameters(trainer)
    assert selection.samples == len(pairs)
    assert all(name.startswith("encoder.layer.") for name in selection.counts)
    trainer.train()
    trained = model.encode(sentences, convert_to_tensor=True)
    assert not torch.allclose(trained, plain)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    loaded.load_adapter(str(tmp_path / "adapter"))
    for again in (loaded, SentenceTransformer(str(tmp_path / "adapter"), device="cpu")):
        assert torch.equal(again.encode(sentences, convert_to_tensor=True), trained)


@takes_adapters
def test_a_sentence_transformer_resumes_into_a_pending_adapter_and_takes_the_best_one_back(tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    pairs = [{"sentence1": words(i, 1), "sentence2": words(2 * i, 5), "score": float(i % 2)} for i in range(12)]

    def trainer(**options: Any) -> SentenceTransformerTrainer:
        torch.manual_seed(0)
        model = SentenceTransformer(modules=[Transformer(str(tmp_path / "base")), Pooling(16)], device="cpu")
        model.add_adapter(SamConfig(task_type="FEATURE_EXTRACTION", density=0.1))
        args = SentenceTransformerTrainingArguments(str(tmp_path / "out"), **OPTIONS, **options)
        data = Dataset.from_list(pairs)
        return SentenceTransformerTrainer(model, args, data, eval_dataset=data, loss=CosineSimilarityLoss(model))

    evaluating: dict[str, Any] = {"save_steps": 2, "eval_steps": 2, "eval_strategy": "steps"}
    first = trainer(**evaluating, load_best_model_at_end=True)
    select_parameters(first)
    first.train()
    resumed = trainer(**evaluating)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    best = SentenceTransformer(str(first.state.best_model_checkpoint), device="cpu")
    assert all(torch.equal(t, best.state_dict()[key]) for key, t in first.model.state_dict().items())
    straight = trainer(**evaluating)
    select_parameters(straight)
    straight.train()
    assert values(resumed.model).keys() == values(straight.model).keys()
    for name, tensor in values(straight.model).items():
        torch.testing.assert_close(values(resumed.model)[name], tensor)


def test_two_parts_with_adapters_are_told_apart_by_the_caller() -> None:
    config = SamConfig(target_modules="all", density=0.5)
    both = nn.ModuleList([get_peft_model(nn.Sequential(nn.Linear(4, 4)), config) for _ in range(2)])
    with pytest.raises(ValueError, match=r"several parts of the ModuleList have adapters \(PeftModel, PeftModel\):"):
        select_parameters(both, [torch.randn(2, 4)])


class Streaming(TrainerCallback):
    """Writes the new weights after every step, and applies them to a plain model elsewhere."""

    def __init__(self, folder: Path, model: nn.Module, engine: nn.Module) -> None:
        self.folder, self.stream, self.engine = folder, WeightStream(model), engine
        self.receiver = WeightReceiver(engine)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stream.write(self.folder / f"{state.global_step}.safetensors")
        self.receiver.apply(self.folder / f"{state.global_step}.safetensors")


def low_numbers(completions: list[str], **_: Any) -> list[float]:
    """A rule: the share of words with a number below 15."""
    return [sum(int(word[1:]) < 15 for word in text.split()) / max(len(text.split()), 1) for text in completions]


def test_trl_s_reinforcement_by_a_rule_sends_its_weights_after_every_step(tmp_path: Path) -> None:
    base = llama()
    engine = copy.deepcopy(base)
    options = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 8}
    trainer = GRPOTrainer(
        base,
        low_numbers,
        args=GRPOConfig(str(tmp_path), bf16=False, **{**OPTIONS, **options, "max_steps": 12, "learning_rate": 3e-2}),
        train_dataset=Dataset.from_list([{"prompt": words(i)} for i in range(8)]),
        processing_class=tokenizer(),
        peft_config=SamConfig(task_type="CAUSAL_LM", density=0.3),
    )
    select_parameters(trainer)
    trainer.add_callback(Streaming(tmp_path, trainer.model, engine))
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) > sum(rewards[:3])
    ids = torch.arange(3, 9)[None]
    with merged(trainer.model.eval()), torch.no_grad():
        assert torch.equal(engine.eval()(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
