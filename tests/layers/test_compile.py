"""Laws of compiled models: one graph, from the first call, with the numbers of eager mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_sam import SamConfig
from peft_sam.layers.base import SamLayer
from tests.shared.cases import MODULES, NETS, ModuleCase, NetCase, names
from tests.shared.versions import compiles

pytestmark = [
    compiles,
    pytest.mark.on_device,
    # torch.compile's own
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

COMPILABLE = [case for case in MODULES if case.name != "LSTM"]  # torch.compile itself gives up on nn.LSTM


def adapted(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(
        base, SamConfig(target_modules="all", density=0.3, score="random", init_weights=False, **options)
    )


def compiled(model: Any, backend: str = "aot_eager") -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: delta.values.grad.clone() for name, delta in model.base_model.sparse_deltas().items()}


@pytest.mark.parametrize("case", COMPILABLE, ids=names)
def test_a_module_trains_and_infers_in_one_graph_without_an_eager_call_before(case: ModuleCase) -> None:
    model, x = adapted(case.make()), case.input()
    run = compiled(model)
    loss = run(x).square().sum()
    got, expected = gradients(model, loss), gradients(model, model(x).square().sum())
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))


def _gated(case: NetCase) -> Any:
    """Compiling a net takes long: two of them are for the gate."""
    gated = case.name in ("Llama", "GPT-2, all modules, tied head")
    return pytest.param(case, marks=() if gated else pytest.mark.extra)


@pytest.mark.parametrize("case", [_gated(case) for case in NETS], ids=[names(case) for case in NETS])
def test_a_net_trains_in_one_graph(case: NetCase) -> None:
    base: Any = case.make()
    base.loss_type = base.loss_type or "ForCausalLM"  # without one, GPT-2 logs a warning, which does not compile
    model, batch = adapted(base, task_type=case.task_type), case.batch(2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()
    loss = compiled(model)(**batch).loss
    torch.testing.assert_close(gradients(model, loss), gradients(model, model(**batch).loss), rtol=1e-4, atol=1e-5)


def test_inductor_s_kernels_give_the_numbers_of_eager_mode() -> None:
    model = adapted(nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)))
    ids = torch.randint(0, 50, (3, 9))
    loss = compiled(model, "inductor")(ids).square().sum()
    torch.testing.assert_close(gradients(model, loss), gradients(model, model(ids).square().sum()))


@pytest.mark.parametrize("how", ["moved", "copied", "pickled", "loaded"])
def test_a_model_compiles_at_once_after_it_was(how: str) -> None:
    options = {"budget": "tensor"}  # the same number of entries whatever the seed
    model = adapted(nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 4)), **options)
    ids = torch.randint(0, 50, (3, 9))
    if how == "moved":
        model.double()
    elif how == "copied":
        model = copy.deepcopy(model)
    elif how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    else:
        other = adapted(nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 4)), seed=1, **options)
        model.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(model)(ids), model(ids))


def test_another_support_of_the_same_size_is_seen_by_the_compiled_model() -> None:
    model = adapted(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)))
    run, x = compiled(model), torch.randn(3, 16)
    run(x)
    layer = next(module for module in model.modules() if isinstance(module, SamLayer))
    number = len(layer.deltas("default")["weight"].indices)
    supports = {"weight": torch.randperm(512)[:number].sort().values, "bias": layer.deltas("default")["bias"].indices}
    layer.set_support("default", supports, {name: torch.randn(len(indices)) for name, indices in supports.items()})
    torch.testing.assert_close(run(x), model(x))
    loss = run(x).square().sum()
    torch.testing.assert_close(gradients(model, loss), gradients(model, model(x).square().sum()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_compiles(dtype: torch.dtype) -> None:
    model = adapted(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)))
    run, x = compiled(model), torch.randn(3, 16)
    with torch.autocast(x.device.type, dtype):
        got, expected = run(x), model(x)
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(model, got.float().sum()), gradients(model, expected.float().sum()))


def test_disabling_merging_and_a_second_adapter_are_seen_by_the_compiled_model() -> None:
    model = adapted(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)))
    model.add_adapter("other", SamConfig(target_modules="all", density=0.3, score="random", init_weights=False, seed=1))
    run, x = compiled(model), torch.randn(3, 16)
    for change in (lambda: None, lambda: model.set_adapter("other"), model.merge_adapter, model.unmerge_adapter):
        change()
        torch.testing.assert_close(run(x), model(x))
    with model.disable_adapter():
        torch.testing.assert_close(run(x), model(x))
    torch.testing.assert_close(run(x), model(x))
