"""The command line: `python -m benchmarks.recipe run --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.recipe.beds import BEDS, GRID_SEED, LRS, methods
from benchmarks.recipe.plots import draw
from benchmarks.recipe.report import report
from benchmarks.rig.methods import canonical
from benchmarks.rig.run import Run, execute
from benchmarks.rig.runs import Search, carry_out, plan, read


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    main = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description="Which recipe beats LoRA.")
    commands = main.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="do runs; those that are done are skipped")
    add = runs.add_argument
    add("--source", help='folder with <task>/train.jsonl, val.jsonl and test.jsonl, or "hub"', required=True)
    add("--beds", nargs="+", default=list(BEDS), choices=BEDS, metavar="BED", help=f"of {' '.join(BEDS)}")
    add("--ranks", nargs="+", type=int, help="LoRA's, which say the sizes; by default the bed's")
    add("--methods", nargs="+", type=canonical, help="instead of those of the beds: name or name:key=value,...")
    add("--lrs", nargs="+", type=float, default=LRS, help="the grid, wider where the best is at an end; or one rate")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help=f"besides {GRID_SEED}, which chooses the rate")
    add("--model", help="another than the beds': a folder or Hub name")
    add("--jobs", type=int, default=1, help="processes")
    add("--threads", type=int, default=1, help="of each process")
    for command in (runs, commands.add_parser("report", help="tables"), commands.add_parser("plots", help="figures")):
        command.add_argument("--out", type=Path, default=RESULTS / "recipe", help="folder of the results")
    return main


def searches_of(args: argparse.Namespace) -> list[Search]:
    """One search for each bed, size and method; with one rate only there is nothing to search, and no seed for it."""
    found, search = [], len(args.lrs) > 1
    for name in args.beds:
        bed = BEDS[name]
        every = [method for rank in args.ranks or bed.ranks for method in methods(bed, rank)]
        told = {**bed.run, **({"model": args.model} if args.model else {})}
        source = "hub" if args.source == "hub" else "folder"
        runs = [
            Run(method=method, seed=0, lr=0.0, density=bed.density, source=source, **told)
            for method in args.methods or map(canonical, every)
        ]
        found += plan(runs, args.seeds, args.lrs, GRID_SEED if search else args.seeds[0], widen=search)
    return found


def main(texts: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    args = parser().parse_args(texts)
    if args.command == "run":
        return carry_out(searches_of(args), args.out, partial(execute, source=args.source), args.jobs, args.threads)
    lines = list(read(args.out).values())
    if args.command == "report":
        print(report(lines))
    else:
        for path in draw(lines, args.out):
            print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
