"""A SAM adapter in PEFT's comparison on MetaMathQA: its own `run.py`, with a selection after the adapter is made.

    cd benchmarks/peft_comparison
    python metamath.py PEFT/method_comparison/MetaMathQA experiments/sam_sparse/llama-3.2-3B-density-0.003 -v

PEFT is a checkout of its repository. All that follows the experiment's path goes to `run.py`, which trains, evaluates
and writes its results where it always does. Before it starts, `get_model` runs select_parameters on the benchmark's own
training rows, in its batches, with its labels; the time that takes is in the total time of the results and not in the
training time. Experiments of other methods, and scores that need no data, run as without this file.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
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


def main() -> None:
    """Run an experiment of the harness."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("harness", type=Path, help="the folder method_comparison/MetaMathQA of PEFT's repository")
    parser.add_argument("experiment", help="the experiment's path: experiments/<method>/<name>")
    parser.add_argument("--selection-batches", type=int, default=500, help="batches that the selection sees")
    args, others = parser.parse_known_args()
    sys.path.insert(0, str(args.harness.resolve()))
    import data
    import utils

    settings = utils.get_train_config(str(Path(args.experiment) / utils.FILE_NAME_TRAIN_PARAMS))
    utils.get_model = selecting(utils.get_model, utils, data, settings, args.selection_batches)
    sys.argv = ["run.py", args.experiment, *others]
    runpy.run_path(str(args.harness / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()
