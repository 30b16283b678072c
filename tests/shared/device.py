"""The device that the tests run on: PEFT_SAM_TEST_DEVICE=cuda for a GPU, "pretended" for `pretended`, else the CPU.

Tests marked `on_device` make everything on it: in the code of a test nothing changes. Those with a Trainer leave that
to the Trainer, whose loaders do not go with another default device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from tests.shared.pretended import pretended_gpu

WHERE = os.environ.get("PEFT_SAM_TEST_DEVICE", "cpu")
# that of a Trainer, which asks torch what there is
DEVICE = torch.device("cuda" if WHERE == "cuda" else "cpu")

# Tests that cannot run on a pretended GPU, by part of their name, and why.
NOT_PRETENDED = {
    "Mixtral": "transformers asks torch.cuda how experts are best multiplied",
    "test_compile": "torch.compile asks torch.cuda, too",
    "LSTM": "a torch without cuDNN says so",
    "any_memory_format": "torch.unravel_index makes a tensor where nobody sees it",
    "gradcheck": "autograd makes zeros where nobody sees them",
    "autocast": "autocast asks torch.cuda, too",
    "_the_same_bits[BERT-True": "PEFT loads the head of a file to where torch.cuda says that there is a GPU",
    "_the_same_bits[BERT, all modules-True": "PEFT does so, too",
    "test_an_auto_class": "transformers does so, too",
}

# dtype → relative and absolute tolerance where they are others than on the CPU. A GPU's sums have another order in
# each shape of a product, and its products in half precision may add in half precision.
ON_GPU = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (3e-2, 1e-3),
    torch.float16: (3e-3, 1e-4),
}


def skip_unless_it_can_run(name: str) -> None:
    """Leave out what a pretended GPU cannot answer."""
    for part, reason in NOT_PRETENDED.items():
        if WHERE == "pretended" and part in name:
            pytest.skip(reason)


@contextmanager
def on_the_device() -> Iterator[None]:
    """Make tensors and modules on the device, and compare numbers as its arithmetic asks for."""
    if WHERE == "cpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch, pretended_gpu() if WHERE == "pretended" else nullcontext():
        for dtype, tolerance in ON_GPU.items():
            patch.setitem(torch.testing._comparison._DTYPE_PRECISIONS, dtype, tolerance)
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        with torch.device("cuda"):
            yield
