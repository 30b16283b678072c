"""Running text: its blocks, and what a language model makes of them, beside slow oracles."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.rig import language
from benchmarks.rig.batches import collate
from benchmarks.rig.models import build, candidate_modules, data_of
from tests.benchmarks.tiny import write_language_model


def test_the_documentation_s_blocks_are_whole_and_those_held_out_are_of_other_topics(data: str, llama: str) -> None:
    task = language.load(data, AutoTokenizer.from_pretrained(llama), 32, (9, 8, 3))
    assert {len(row["input_ids"]) for rows in (task.train, task.val, task.test) for row in rows} == {32}
    assert [row["labels"] for row in task.test] == [language.DOCUMENTATION] * 8 + [language.OTHER] * 3
    assert len(task.val) == 9
    train, val, test = ({tuple(row["input_ids"]) for row in rows} for rows in (task.train, task.val, task.test))
    assert not val & test
    assert len((val | test) & train) <= 1  # a line of stars may be anywhere


def test_a_language_model_s_output_is_the_mean_log_likelihood_of_a_block_after_its_first_token(
    data: str, llama: str
) -> None:
    task = data_of(language.DOCS, data, llama, 32)
    model = build(llama, task, "first", 0).eval()
    rows = [*task.test[:2], *task.test[-2:]]
    with torch.no_grad():
        found = model(**collate(rows, padding=0))
        expected = []
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            likelihoods = model.body(input_ids=ids[None]).logits[0].log_softmax(-1)
            expected.append(likelihoods[:-1].gather(1, ids[1:, None]).mean())
    torch.testing.assert_close(found.logits, torch.stack(expected))
    assert float(found.loss) == pytest.approx(-float(torch.stack(expected).mean()), rel=1e-5)
    both = language.log_likelihoods(found.logits.numpy(), [row["labels"] for row in rows])
    assert both["documentation"] == pytest.approx(float(torch.stack(expected)[:2].mean()), rel=1e-5)
    assert both["other"] == pytest.approx(float(torch.stack(expected)[2:].mean()), rel=1e-5)
    linear = candidate_modules(model, "linear")
    assert len(linear) == 2 * 7
    assert "body.lm_head" not in linear


def test_a_task_as_text_is_answered_by_the_likelier_token_after_the_prompt(
    data: str, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    monkeypatch.setattr(language, "PROMPTS", {"told": language.Prompt("cola", "{} ok?", ("n", "y"))})
    task = data_of("told", data, llama, 96)
    assert task.answers == tuple(tokenizer.convert_tokens_to_ids(["n", "y"]))
    model = build(llama, task, "first", 0).eval()
    with torch.no_grad():
        found = model(**collate(task.test, padding=0))
        expected = [  # each prompt alone, without padding
            model.body(input_ids=torch.tensor([row["input_ids"]])).logits[0, -1].log_softmax(-1)[list(task.answers)]
            for row in task.test
        ]
    torch.testing.assert_close(found.logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
    right = [row[number["labels"]] for row, number in zip(expected, task.test, strict=True)]
    assert float(found.loss) == pytest.approx(-float(torch.stack(right).mean()), rel=1e-5)
    assert set(task.metric(found.logits.numpy(), [row["labels"] for row in task.test])) == {"matthews", "accuracy"}


def test_of_a_task_of_scores_the_second_answer_is_right_from_the_cut_on(
    data: str, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    monkeypatch.setattr(language, "PROMPTS", {"told": language.Prompt("stsb", "{} = {} ?", ("n", "y"), cut=3.0)})
    task = data_of("told", data, llama, 200)
    scores = data_of("stsb", data, llama, 200)
    assert not task.regression
    for split in ("train", "val", "test"):
        rows, told = getattr(scores, split), getattr(task, split)
        assert [row["labels"] for row in told] == [int(row["labels"] >= 3.0) for row in rows]
        assert len({row["labels"] for row in told}) == 2
    assert "=" in tokenizer.decode(task.train[0]["input_ids"])
    assert task.metric([[0.0, 1.0], [1.0, 0.0]], [1, 1]) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("prompt", "length", "word"),
    [(("cola", "{}", ("no", "y")), 96, "one token for each"), (("cola", "{}", ("n", "y")), 4, "a larger --max-length")],
)
def test_answers_of_several_tokens_and_prompts_that_are_cut_off_are_told(
    prompt: tuple[str, str, tuple[str, ...]],
    length: int,
    word: str,
    data: str,
    llama: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(language, "PROMPTS", {"told": language.Prompt(*prompt)})
    with pytest.raises(ValueError, match=word):
        language.ask("told", data, AutoTokenizer.from_pretrained(llama), length)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_language_model(tmp_path_factory.mktemp("model") / "llama")
