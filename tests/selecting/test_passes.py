"""Laws of the passes within a memory budget, and of what is refused before one starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from peft_sam import Loss, SamConfig, accumulate, select_parameters
from peft_sam.selecting.passes import PASSES_WORTH_THE_HOST, plan_passes
from peft_sam.selecting.twin import sharded_twin
from tests.shared.cases import bert

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@given(st.integers(1, 500), st.integers(1, 4), st.integers(4, 4000), st.integers(0, 4000))
def test_host_memory_is_used_where_it_saves_many_passes_and_is_there(
    entries: int, statistics: int, budget: int, host: int
) -> None:
    entry = 4 * statistics
    if budget < entry:
        return
    sizes, number = {"a": entries, "b": entries}, -(-2 * entries // (budget // entry))
    on_gpu, on_cpu = (plan_passes(sizes, entry, budget, device, host) for device in (GPU, CPU))
    assert not on_cpu.in_host_memory
    assert len(on_cpu.groups) == number
    assert on_gpu.in_host_memory == (number > PASSES_WORTH_THE_HOST and 2 * entries * entry <= host)
    assert len(on_gpu.groups) == (1 if on_gpu.in_host_memory else number)


def test_the_plan_says_how_many_passes_and_where_the_accumulators_are() -> None:
    sizes = {"a": 100}
    assert str(plan_passes(sizes, 4, 400, GPU, 10**6)) == "1 pass over the data, accumulators next to the parameters"
    assert str(plan_passes(sizes, 4, 40, CPU, 10**6)) == "10 passes over the data, accumulators next to the parameters"
    assert str(plan_passes(sizes, 4, 40, GPU, 10**6)) == "1 pass over the data, accumulators in host memory"


def test_accumulators_in_host_memory_are_the_same() -> None:
    model = torch.nn.Linear(5, 3)
    batches = [torch.randn(4, 5), torch.randn(2, 5)]
    found = [
        accumulate(
            model,
            dict(model.named_parameters()),
            batches,
            lambda x: Loss(model(x).square().mean(), len(x)),
            statistics=["gradient", "squared_gradient", "hessian"],
            in_host_memory=in_host_memory,
            progress=False,
        ).tensors
        for in_host_memory in (False, True)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_fsdp1_is_refused_in_favour_of_fsdp2() -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match=r"FSDP1 flattens the parameters.*fsdp_version: 2"):
        sharded_twin(bert(), accelerator)


def test_a_model_that_zero_3_has_taken_apart_is_refused() -> None:
    model: Any = get_peft_model(bert(), SamConfig(task_type="SEQ_CLS"))
    next(model.parameters()).ds_id = 0  # as deepspeed.zero.Init marks them
    with pytest.raises(ValueError, match=r"ZeRO-3 has taken the parameters apart.*FSDP2"):
        select_parameters(model, [])
