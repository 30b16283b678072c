"""Laws of SAM's place in PEFT's method comparison; the last is held against the harness itself, where it is at hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.peft_comparison.__main__ import main
from benchmarks.peft_comparison.metamath import Batches, selecting
from peft_sam import SamConfig
from peft_sam.layers.found import deltas_of
from tests.benchmarks.harness import experiments, modules_of, needs_harness
from tests.shared.reference import largest, mean_loss_gradients

EXPERIMENTS = experiments("llama")
WORDS = ["<end>", "?", *(f"w{i}" for i in range(30))]


def tokenizer() -> Any:
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    model.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    found = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<end>", unk_token="?")
    found.padding_side = "right"
    return found


def llama() -> LlamaForCausalLM:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), eos_token_id=0, bos_token_id=0, **size))


ROWS = [{"input_ids": [[2, 3, 4, 5], [6, 7]]}, {"input_ids": [[8, 9, 10]]}]


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_is_a_pending_or_data_free_config_of_peft_s_layout(folder: Path) -> None:
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, SamConfig)
    assert config.selection is None
    model = get_peft_model(llama(), config)
    assert bool(deltas_of(model, "default"))


def test_a_text_ends_once_and_padding_beyond_does_not_count() -> None:
    batches = list(Batches(ROWS, tokenizer(), torch.device("cpu")))
    assert batches[0]["labels"].tolist() == [[2, 3, 4, 5], [6, 7, 0, -100]]
    assert batches[1]["labels"].tolist() == [[8, 9, 10]]
    assert next(iter(Batches(ROWS, tokenizer(), torch.device("cpu"))))["input_ids"].tolist() == [
        [2, 3, 4, 5],
        [6, 7, 0, 0],
    ]


def harness_of(rows: list[Any]) -> tuple[Any, Any, Any]:
    """Stand-ins for what the harness's modules offer, and its settings."""
    utils = SimpleNamespace(get_tokenizer=lambda **_: tokenizer(), BucketIterator=lambda *_, **__: rows)
    data = SimpleNamespace(get_train_valid_test_datasets=lambda **_: (None, None, None))
    return utils, data, SimpleNamespace(model_id="", max_seq_length=8, query_template="{query}", batch_size=2)


def test_the_selection_is_that_of_the_mean_loss_over_the_benchmark_s_tokens() -> None:
    base = llama()
    select = selecting(lambda peft_config, **_: get_peft_model(llama_like(base), peft_config), *harness_of(ROWS), 2)
    model: Any = select(peft_config=SamConfig(task_type="CAUSAL_LM", density=0.05), compile=False)
    found = {name: delta.indices.tolist() for name, delta in model.base_model.sparse_deltas().items()}
    batches = [dict(batch) for batch in Batches(ROWS, tokenizer(), torch.device("cpu"))]

    def total(model: Any, batch: dict[str, Any]) -> Any:
        return model(**batch).loss * (batch["labels"][:, 1:] != -100).sum()

    number = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    names = {name: None for name in dict(base.named_parameters()) if "proj" in name}
    gradients = mean_loss_gradients(base, names, batches, total, number)
    expected = largest(
        {name: gradient.double() ** 2 for name, gradient in gradients.items()}, sum(map(len, found.values()))
    )
    assert found == {name: positions for name, positions in expected.items() if positions}


def llama_like(base: LlamaForCausalLM) -> LlamaForCausalLM:
    model = llama()
    model.load_state_dict(base.state_dict())
    return model


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["q_proj"]), SamConfig(score="random", density=0.1), None]
)
def test_what_needs_no_data_runs_as_without(config: Any) -> None:
    def get_model(peft_config: Any, **_: Any) -> Any:
        return llama() if peft_config is None else get_peft_model(llama(), peft_config)

    model = selecting(get_model, None, None, None, 2)(peft_config=config)
    assert isinstance(model, torch.nn.Module)


@pytest.mark.parametrize(("task", "makes"), [("MetaMathQA", "get_model"), ("image-gen", "get_pipeline")])
def test_run_py_gets_its_own_arguments_and_a_function_that_selects(
    task: str, makes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness, found = tmp_path / task, tmp_path / "found.json"
    harness.mkdir()
    (harness / "utils.py").write_text(
        f"FILE_NAME_TRAIN_PARAMS = 'training_params.json'\nget_train_config = str\n{makes} = print\n"
    )
    (harness / "data.py").touch()
    (harness / "run.py").write_text(
        "import json, sys, utils\nif __name__ == '__main__':\n"
        f"    with open({str(found)!r}, 'w') as file:\n"
        f"        json.dump([sys.argv, utils.{makes}.__name__], file)\n"
    )
    experiment = f"experiments/sam_sparse/{EXPERIMENTS[0].name}"
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["", str(harness), experiment, "--selection-batches", "3", "-v"])
    monkeypatch.chdir(tmp_path)
    try:
        main()
    finally:
        for name in ("utils", "data", "run"):
            sys.modules.pop(name, None)
    assert json.loads(found.read_text()) == [[str(harness / "run.py"), experiment, "-v"], f"{makes}_and_select"]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The harness's modules `utils` and `data`."""
    with modules_of("MetaMathQA", ("utils", "data"), monkeypatch) as found:
        yield found["utils"], found["data"]


@pytest.mark.extra
@needs_harness
@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_the_harness_s_own_functions_make_select_train_and_save(
    folder: Path, harness: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils, data = harness
    monkeypatch.chdir(folder.parents[2])
    assert utils.validate_experiment_path(str(folder.relative_to(folder.parents[2]))) == f"sam_sparse/{folder.name}"
    settings = utils.get_train_config(str(folder / utils.FILE_NAME_TRAIN_PARAMS))
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    settings.model_id, settings.query_template = str(tmp_path / "base"), "w1 {query} w2"
    texts = [" ".join(WORDS[2 + (i + j) % 30] for j in range(3 + i % 4)) for i in range(24)]
    rows = {"query": texts, "response": texts, "type": texts, "original_question": texts}
    math = {"question": texts * 3, "answer": texts * 3}
    sets = {
        "meta-math/MetaMathQA": {"train": Dataset.from_dict(rows)},
        "openai/gsm8k": datasets_like({"train": Dataset.from_dict(math), "test": Dataset.from_dict(math)}),
    }
    monkeypatch.setattr(data, "load_dataset", lambda name, *_: sets[name])
    config = PeftConfig.from_pretrained(folder)
    config.density = 0.05
    model: Any = selecting(utils.get_model, utils, data, settings, 4)(
        model_id=settings.model_id,
        dtype="float32",
        compile=False,
        use_gc=False,
        attn_implementation=None,
        peft_config=config,
        autocast_adapter_dtype=True,
    )
    deltas = model.base_model.sparse_deltas()
    assert deltas
    optimizer, scheduler = utils.get_optimizer_and_scheduler(
        model, optimizer_type="AdamW", max_steps=2, lr_scheduler_arg="cosine", **settings.optimizer_kwargs
    )
    train_set, _, _ = data.get_train_valid_test_datasets(
        tokenizer=tokenizer(), query_template=settings.query_template, print_fn=print
    )
    buckets = utils.BucketIterator(train_set, batch_size=4, bucket_factor=2, delete_cols=["response"])
    for batch, _ in zip(Batches(buckets, tokenizer(), model.device), range(2), strict=False):
        optimizer.zero_grad()
        model(**batch, num_items_in_batch=batch["attention_mask"].sum().item()).loss.backward()
        optimizer.step()
        scheduler.step()
    assert any(bool(delta.values.any()) for delta in deltas.values())
    size = utils.get_file_size(model, peft_config=config, clean=True, print_fn=print)
    entries = sum(len(delta.values) for delta in deltas.values())
    assert entries * 5 < size < 99999999


class datasets_like(dict[str, Dataset]):
    """A DatasetDict as far as the harness uses one."""

    def rename_columns(self, names: dict[str, str]) -> datasets_like:
        return datasets_like({split: rows.rename_columns(names) for split, rows in self.items()})
