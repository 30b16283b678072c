"""A SAM adapter in PEFT's comparison on MetaMathQA: a selection after the adapter is made.

`get_model` runs select_parameters on the benchmark's own training rows, in its batches, with its labels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from peft_sam import SamConfig, select_parameters

# as in `run.py`
BUCKET_FACTOR = 20


class Batches:
    """The batches that `run.py` trains on, with labels, as often as they are asked for.

    Args:
        rows: of the harness's BucketIterator: lists of token ids.
        tokenizer: pads on the right; the padding token ends a text.
    """

    def __init__(self, rows: Iterable[Any], tokenizer: Any, device: torch.device) -> None:
        self.rows, self.tokenizer, self.device = rows, tokenizer, device

    def __iter__(self) -> Iterator[Any]:
        for of_batch in self.rows:
            lengths = torch.tensor([len(ids) for ids in of_batch["input_ids"]])
            batch = self.tokenizer.pad(of_batch, return_tensors="pt")
            beyond_the_end = torch.arange(batch["input_ids"].shape[1]) > lengths[:, None]
            batch["labels"] = batch["input_ids"].masked_fill(beyond_the_end, -100)
            yield batch.to(self.device)


def selecting(
    get_model: Callable[..., nn.Module], utils: Any, data: Any, train_config: Any, max_batches: int
) -> Callable[..., nn.Module]:
    """The harness's `get_model`, followed by the selection.

    Args:
        utils, data: the harness's modules of these names.
        train_config: its settings of the run.
    """

    def get_model_and_select(*, peft_config: Any, **options: Any) -> nn.Module:
        model = get_model(peft_config=peft_config, **options)
        if not isinstance(peft_config, SamConfig) or not peft_config.needs_data:
            return model
        adapted: Any = getattr(model, "_orig_mod", model)  # compiled
        tokenizer = utils.get_tokenizer(model_id=train_config.model_id, max_seq_length=train_config.max_seq_length)
        train_set, _, _ = data.get_train_valid_test_datasets(
            tokenizer=tokenizer, query_template=train_config.query_template, print_fn=print
        )
        rows = utils.BucketIterator(
            train_set, batch_size=train_config.batch_size, bucket_factor=BUCKET_FACTOR, delete_cols=["response"]
        )
        print(select_parameters(adapted, Batches(rows, tokenizer, adapted.device), max_batches=max_batches))
        return model

    return get_model_and_select


def install(settings: Any, max_batches: int) -> None:
    """Let the benchmark's `run.py` select."""
    utils, data = importlib.import_module("utils"), importlib.import_module("data")
    utils.get_model = selecting(utils.get_model, utils, data, settings, max_batches)
