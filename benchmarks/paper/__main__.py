"""The command line: `python -m benchmarks.paper run --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.paper.plots import draw
from benchmarks.paper.table import report
from benchmarks.rig.compare import compare
from benchmarks.rig.methods import METHODS, canonical
from benchmarks.rig.models import pooling_of
from benchmarks.rig.run import Run, execute
from benchmarks.rig.runs import carry_out, plan, read
from benchmarks.rig.tasks import TASKS


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    main = argparse.ArgumentParser(prog="python -m benchmarks.paper", description="The paper's experiments.")
    commands = main.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="do runs; those that are done are skipped")
    add = runs.add_argument
    add("--source", help='folder with <task>/train.jsonl, val.jsonl and test.jsonl, or "hub"', required=True)
    add("--out", type=Path, default=RESULTS / "paper", help="folder of the results")
    add("--model", default="minilm", help="minilm, or a model's folder or Hub name")
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK", help=f"of {' '.join(TASKS)}")
    kinds = f"name or name:key=value,...; of {' '.join(METHODS)}"
    add("--methods", nargs="+", type=canonical, default=list(METHODS), help=kinds)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--lrs", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3], help="the grid, the same for all methods")
    add("--grid-seed", type=int, help="the seed on which the grid is run; by default the first of --seeds")
    add("--density", type=float, default=0.005)
    add("--candidates", choices=["linear", "all"], default="linear")
    add("--max-steps", type=int, default=1000)
    add("--eval-every", type=int, default=50, help="steps between validations")
    add("--patience", type=int, default=10, help="validations without a better one that end a run")
    add("--batch", type=int, default=16)
    add("--max-length", type=int, default=128, help="tokens")
    add("--drop", type=float, default=0.0, help="share of the training rows that each seed leaves out")
    add("--pooling", choices=["first", "mean"], help="by default as the model's folder says, else first")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast in all forward passes")
    add("--dropout", type=float, help="of all layers; by default the model's")
    add("--curve", action="store_true", help="record the loss of each step")
    add("--jobs", type=int, default=1, help="processes")
    add("--threads", type=int, default=1, help="of each process")
    table = commands.add_parser("table", help="Markdown tables of the results")
    pairs = commands.add_parser("compare", help="a method against others, seed by seed")
    pairs.add_argument("methods", nargs="+", type=canonical, help="as they were run; the first against the others")
    pairs.add_argument("--seeds", nargs="+", type=int, default=[], help="those to compare on; by default all")
    for command in (table, pairs):
        command.add_argument("--split", choices=["test", "val"], default="test", help="val: to choose settings by")
    plots = commands.add_parser("plots", help="figures of the results")
    plots.add_argument("--to", type=Path, default=RESULTS / "paper", help="folder of the figures")
    for command in (table, pairs, plots):
        command.add_argument("--out", type=Path, default=RESULTS / "paper", help="folder of the results")
    return main


def runs_of(args: argparse.Namespace) -> list[Run]:
    """One run for each task and method, to be multiplied by seeds and learning rates."""
    pooling = args.pooling or pooling_of(args.model)
    source = "hub" if args.source == "hub" else "folder"
    same = ("model", "density", "candidates", "drop", "precision", "dropout", "max_length", "batch", "eval_every")
    told = {name: getattr(args, name) for name in (*same, "patience")}
    return [
        Run(task=task, method=method, seed=0, lr=0.0, steps=args.max_steps, source=source, pooling=pooling, **told)
        for task in args.tasks
        for method in args.methods
    ]


def main(texts: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    args = parser().parse_args(texts)
    if args.command == "run":
        grid_seed = args.seeds[0] if args.grid_seed is None else args.grid_seed
        searches = plan(runs_of(args), args.seeds, args.lrs, grid_seed)
        do = partial(execute, source=args.source, curve=args.curve)
        return carry_out(searches, args.out, do, args.jobs, args.threads, args.curve)
    lines = list(read(args.out).values())
    if args.command == "table":
        print(report(lines, args.split))
    elif args.command == "compare":
        print(compare(lines, args.methods, args.split, args.seeds))
    else:
        for path in draw(lines, args.to):
            print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
