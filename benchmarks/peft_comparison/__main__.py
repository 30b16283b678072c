"""A SAM adapter in the method comparison of PEFT's repository: its own `run.py`, with a selection before the training.

    python -m benchmarks.peft_comparison PEFT/method_comparison/MetaMathQA \
        experiments/sam_sparse/llama-3.2-3B-density-0.003 -v
    python -m benchmarks.peft_comparison PEFT/method_comparison/image-gen \
        experiments/sam_sparse/flux2-klein-density-0.0131 -v

PEFT is a checkout of its repository; experiments are looked for beside this file. All that follows the experiment's
path goes to `run.py`, which trains, evaluates and writes its results where it always does. Before the training,
select_parameters runs on the benchmark's own data for it, in its batches, with its loss; the time that takes is in the
total time of the results and not in the training time. Experiments of other methods, and scores that need no data, run
as without this.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peft_comparison import images, metamath


class Task(NamedTuple):
    """What the selection is in one of PEFT's comparisons.

    Attributes:
        install: (settings of the run, batches) → None: puts the selection in before `run.py` starts.
        batches: that the selection sees by default.
    """

    install: Callable[[Any, int], None]
    batches: int


# by the comparison's folder
TASKS = {"MetaMathQA": Task(metamath.install, batches=500), "image-gen": Task(images.install, batches=70)}


def main() -> None:
    """Run an experiment of the harness."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("harness", type=Path, help="a folder of PEFT's method_comparison/: " + ", ".join(TASKS))
    parser.add_argument("experiment", help="the experiment's path: experiments/<method>/<name>")
    parser.add_argument("--selection-batches", type=int, help="batches that the selection sees")
    args, others = parser.parse_known_args()
    harness = args.harness.resolve()
    if harness.name not in TASKS:
        parser.error(f"no comparison that SAM takes part in: {harness.name}; there are {', '.join(TASKS)}")
    task = TASKS[harness.name]
    os.chdir(Path(__file__).parent)
    sys.path.insert(0, str(harness))
    utils = importlib.import_module("utils")
    settings = utils.get_train_config(str(Path(args.experiment) / utils.FILE_NAME_TRAIN_PARAMS))
    task.install(settings, args.selection_batches or task.batches)
    sys.argv = ["run.py", args.experiment, *others]
    runpy.run_path(str(harness / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()
