"""Laws of running a model: layers on disk, generation of all kinds, compiled or not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from peft_sam import SamConfig, select_parameters
from peft_sam.layers.found import pairs_of
from tests.shared.cases import NETS, VOCABULARY, gpt2, llama, t5
from tests.shared.versions import compiles

BATCH = NETS[4].batch(3)
PROMPT = {"input_ids": torch.randint(1, VOCABULARY, (2, 4)), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def values(model: Any) -> dict[str, Tensor]:
    return {name: delta.values.detach() for name, delta in model.base_model.sparse_deltas().items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits


@pytest.mark.filterwarnings("ignore:.*offloaded:UserWarning")
@pytest.mark.parametrize("r", [None, 3])
def test_a_model_with_a_layer_on_disk_selects_trains_loads_and_merges_as_one_in_memory(
    r: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT writes the offloaded layers anew below the working directory
    llama().save_pretrained(tmp_path / "base")
    parts = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    places = {name: "disk" if name == "model.layers.1" else "cpu" for name in parts}

    def load(device_map: Any) -> Any:
        # the head has copies of its own in the two models that are compared
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "off", dtype=torch.float32
        )

    models = []
    for device_map in (None, dict(places)):
        model: Any = get_peft_model(load(device_map), SamConfig(task_type="CAUSAL_LM", density=0.1, r=r))
        select_parameters(model, [BATCH], progress=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            model(**BATCH).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    whole, offloaded = models
    assert offloaded.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.is_meta
    torch.testing.assert_close(values(offloaded), values(whole))
    expected = logits(whole)
    torch.testing.assert_close(logits(offloaded), expected)
    assert torch.equal(offloaded.generate(**PROMPT, **GREEDY), whole.generate(**PROMPT, **GREEDY))
    offloaded.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        load(dict(places)),
        tmp_path / "adapter",
        device_map={f"base_model.model.{name}": place for name, place in places.items()},
        offload_dir=tmp_path / "again",
    )
    assert torch.equal(logits(loaded), logits(offloaded))
    factors = [factor for pair in pairs_of(loaded, "default").values() for factor in pair.parameters()]
    assert {factor.device.type for factor in factors} == (set() if r is None else {"cpu"})
    for model in (offloaded, loaded):
        before = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected)
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}, {}],
    ids=["beams", "beams without cache", "two of two beams", "greedy"],
)
@pytest.mark.parametrize("make", [gpt2, t5], ids=["GPT-2", "T5"])
def test_generation_agrees_with_the_merged_model(make: Any, options: dict[str, Any]) -> None:
    config = SamConfig(target_modules="all", density=0.3, score="random", init_weights=False)
    model: Any = get_peft_model(make(), config).eval()
    found = model.generate(**PROMPT, **GREEDY, **options)
    assert torch.equal(model.merge_and_unload().generate(**PROMPT, **GREEDY, **options), found)


@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_compiled_model_generates_what_it_generates_in_eager_mode() -> None:
    base = llama().eval()
    base.model.layers = base.model.layers[:1]
    model: Any = get_peft_model(base, SamConfig(task_type="CAUSAL_LM", density=0.3, score="random", init_weights=False))
    expected = model.generate(**PROMPT, **GREEDY)
    calls = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal calls
        calls += 1
        return graph.forward

    torch._dynamo.reset()
    base.compile(backend=backend, dynamic=True)
    assert torch.equal(model.generate(**PROMPT, **GREEDY), expected)
    assert calls > 0


def test_a_seq_2_seq_trainer_selects_trains_and_predicts_by_generating(tmp_path: Path) -> None:
    rows = [{key: tensor[0].tolist() for key, tensor in NETS[6].batch(1).items()} for _ in range(6)]
    model: Any = get_peft_model(t5(), SamConfig(task_type="SEQ_2_SEQ_LM", density=0.1))
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
        predict_with_generate=True,
        generation_max_length=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows))
    selection = select_parameters(trainer)
    assert selection.samples == 6 * 7  # target tokens
    trainer.train()
    predicted = trainer.predict(Dataset.from_list(rows)).predictions
    inputs = {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    merged = copy.deepcopy(model).merge_and_unload()
    assert predicted[:, :5].tolist() == merged.generate(**inputs, max_length=5).tolist()  # and padding after that
