"""The law of adapted parameters: whatever way a model uses one, the use sees θ + Δ, and Δ sees the gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from peft_sam import SamConfig, select_parameters
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import base_name
from tests.shared.cases import names, t5
from tests.shared.reference import adapted_copy

# torch's reentrant checkpoint, without gradients
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


class Reads(nn.Module):
    """Multiplies with its child's weight, without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


def product_with(linear: Any, x: Tensor) -> Tensor:
    return x @ getattr(linear, "weight").t()  # noqa: B009  (no name of an attribute in the module's own code)


class ReadsByAFunction(Reads):
    """The same, in a function of no class."""

    def forward(self, x: Tensor) -> Tensor:
        return product_with(self.inner, x)


class ReadsAGrandchild(nn.Module):
    """Reads parameters two levels down, in a child that owns some and is never called."""

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(8) + 0.5)
            self.matrices = nn.ParameterList([torch.randn(8, 8) / 3 for _ in range(2)])
            self.inner = nn.Linear(8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.bank = self.Bank()

    def forward(self, x: Tensor) -> Tensor:
        bank = self.bank
        return F.linear(x @ bank.matrices[1] * bank.gain, bank.inner.weight) @ bank.matrices[0]


class ReadsAndCalls(Reads):
    """Calls the child and reads its weight, as a head with tied rows does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.inner.weight


class OwnAttention(nn.MultiheadAttention):
    """A subclass, which reads its output projection as its parent class does."""


class CallingAttention(nn.MultiheadAttention):
    """A subclass, which calls its output projection."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return self.out_proj(F.linear(x, self.in_proj_weight, self.in_proj_bias)[..., :8]), None


class Attends(nn.Module):
    """Self-attention by a kind of nn.MultiheadAttention, beside another module called out_proj."""

    def __init__(self, kind: type[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.attention = kind(8, 2, batch_first=True)
        self.other = nn.Module()
        self.other.out_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other.out_proj(torch.tanh(self.attention(x, x, x)[0]))


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    """A subclass, with torch's fast path."""


def encoder() -> nn.Module:
    return nn.TransformerEncoder(OwnEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2)


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Repeated(nn.Module):
    """One block several times in a list, and its parameter in another module, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh())] * 3)
        self.out = nn.Linear(8, 8, bias=False)
        self.out.weight = self.layers[0][0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Counts(nn.Module):
    """Keeps state in an attribute that it sets when it runs, and calls a method of its child's by a private name."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(8) + 0.5)
            self.calls, self._offset = 0, 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self._scaled(x) + self._offset

        def _scaled(self, x: Tensor) -> Tensor:
            return x * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.counter = self.Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.counter._offset = 0.25
        return self.counter._scaled(self.counter(x)) * (1 + 0 * self.counter.calls)


class Memory(nn.Module):
    """Parameters with the names of a dict's methods, and with a slash."""

    class Slots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
            self.register_parameter("a/b", nn.Parameter(torch.randn(8)))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.keys.t()).softmax(-1) @ self.values + self._parameters["a/b"]

    def __init__(self) -> None:
        super().__init__()
        self.slots = self.Slots()

    def forward(self, x: Tensor) -> Tensor:
        return self.slots(x)


class Deep(nn.Module):
    """Owners of parameters inside each other, four deep."""

    class Owner(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.rand(8) + 0.5), inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * self.scale)

    def __init__(self) -> None:
        super().__init__()
        self.top = self.Owner(self.Owner(self.Owner(nn.Linear(8, 8))))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(x)


class Looks(nn.Module):
    """Embeddings with sparse gradients, of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8, sparse=True)
        self.bag = nn.EmbeddingBag(10, 8, mode="sum", sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0] * 3).long() % 10
        return self.table(ids).sum(1) + self.bag(ids)


class Compiled(nn.Module):
    """A module compiled in its place, and one that owns a parameter beside it."""

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.owner = nn.Linear(8, 8), self.Owner()
        self.linear.compile(backend="eager")
        self.owner.compile(backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.owner(self.linear(x))


class Checkpointed(nn.Module):
    """Reads a child's weight in a function under a checkpoint, as a loss in chunks does."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.head, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.chunk, self.first(x), use_reentrant=self.reentrant)
        return found

    def chunk(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head.weight).tanh()


class Parametrised(nn.Module):
    """A weight that is computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.spectral(self.linear(x))


@dataclass(frozen=True)
class Use:
    name: str
    make: Callable[[], nn.Module]
    targets: Any = "all"


USES = [
    Use("read by the parent", Reads),
    Use("read by a function", ReadsByAFunction),
    Use("read by a grandparent", ReadsAGrandchild),
    Use("read and called", ReadsAndCalls),
    *(
        Use(f"{kind.__name__}, targets {targets}", lambda kind=kind: Attends(kind), targets)  # type: ignore[misc]
        for kind in (nn.MultiheadAttention, OwnAttention, CallingAttention)
        for targets in (None, "all", ["out_proj"], r".*out_proj")
    ),
    Use("subclass of torch's encoder layer", encoder),
    Use("subclass of torch's encoder layer, one child", encoder, ["linear2"]),
    Use("one module, two names", Twice),
    Use("one block, three places, and a tied weight", Repeated),
    Use("state in attributes, private names", Counts),
    Use("parameters called keys and a/b", Memory),
    Use("owners four deep", Deep),
    Use("sparse embeddings", Looks),
    Use("compiled in place", Compiled),
    Use("parametrised", Parametrised),
    Use("read under a checkpoint", functools.partial(Checkpointed, False)),
    Use("read under a reentrant checkpoint", functools.partial(Checkpointed, True)),
]
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def adapted(use: Use, **options: Any) -> tuple[Any, nn.Module]:
    base = use.make().eval()
    untouched = copy.deepcopy(base)
    config: dict[str, Any] = {"score": "random", "density": 0.5, "init_weights": False, **options}
    return get_peft_model(base, SamConfig(target_modules=use.targets, **config)).eval(), untouched


@pytest.mark.parametrize("use", USES, ids=names)
@torch.no_grad()
def test_unmerged_and_merged_models_compute_what_the_dense_model_does(use: Use) -> None:
    model, base = adapted(use)
    dense = adapted_copy(base, model.base_model.sparse_deltas())
    expected = dense(X)
    assert not torch.allclose(expected, base(X))
    torch.testing.assert_close(model(X), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("use", USES, ids=names)
def test_the_gradient_of_the_values_is_that_of_the_dense_model(use: Use) -> None:
    model, base = adapted(use)
    deltas = model.base_model.sparse_deltas()
    dense = adapted_copy(base, deltas)
    for one in (model, dense):
        one(X).square().sum().backward()
    parameters = dict(dense.named_parameters())
    for name, delta in deltas.items():
        whole = parameters[name].grad
        if whole is None:
            assert delta.values.grad is None, name
            continue
        whole = whole.to_dense() if whole.is_sparse else whole
        torch.testing.assert_close(delta.values.grad, whole.flatten()[delta.indices], msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
@pytest.mark.parametrize("use", USES, ids=names)
def test_what_is_selected_by_data_has_a_gradient_in_training(use: Use) -> None:
    model, _ = adapted(use, score="sam", init_weights=True, density=0.2)
    select_parameters(model, [X], loss_fn=lambda of, x: of(x).square().mean(), progress=False)
    model.train()(X).square().mean().backward()
    for name, delta in model.base_model.sparse_deltas().items():
        assert delta.values.grad is not None, name
        assert delta.values.grad.ne(0).any(), name


@pytest.mark.parametrize("use", USES, ids=names)
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
@torch.no_grad()
def test_unloading_leaves_no_layer_and_every_bit(use: Use, how: str) -> None:
    model, base = adapted(use)
    expected = model(X) if how == "merge_and_unload" else base(X)
    bare = getattr(model, how)()
    assert not any(isinstance(module, SamLayer) for module in bare.modules())
    torch.testing.assert_close(bare(X), expected)
    if how == "unload":
        after = bare.state_dict()
        assert {name: bits.tolist() for name, bits in base.state_dict().items()} == {
            name: bits.tolist() for name, bits in after.items()
        }


@pytest.mark.parametrize("use", USES, ids=names)
@torch.no_grad()
def test_from_outside_the_base_reads_as_it_was_while_the_adapter_is_in_force(use: Use) -> None:
    model, base = adapted(use)
    model(X)
    for name, module in base.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            assert torch.equal(getattr(model.get_base_model().get_submodule(name), key), parameter), (name, key)


def test_who_only_asks_for_a_weight_s_dtype_does_not_compose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = get_peft_model(t5(), SamConfig(target_modules=["wo"], density=0.5, score="random")).eval()
    dense = [layer for layer in model.modules() if isinstance(layer, SamLayer)]
    monkeypatch.setattr(SamLayer, "composed", lambda *_: pytest.fail("composed"))
    ids = torch.randint(3, 50, (2, 4))
    model(input_ids=ids, decoder_input_ids=ids)
    assert dense


def test_state_that_a_module_keeps_in_attributes_is_the_module_s() -> None:
    model, _ = adapted(next(use for use in USES if use.make is Counts))
    for _ in range(3):
        model(X)
    counter = model.get_base_model().counter
    assert isinstance(counter, SamLayer)
    assert counter.base_layer.calls == counter.calls == 3
    assert counter.base_layer._offset == 0.25
    counter.calls = 100
    assert counter.base_layer.calls == 100


class KeepsItsTable(nn.Module):
    """Computes a table of its parameter in evaluation once, until training mode: LeViT's way."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.kept = nn.Parameter(torch.randn(8)), None

    def train(self, mode: bool = True) -> KeepsItsTable:
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = 2 * self.bias if self.training or self.kept is None else self.kept
        return x + self.kept


def test_a_table_that_a_module_keeps_of_its_weights_in_evaluation_is_renewed_by_training_mode() -> None:
    base, x = nn.Sequential(KeepsItsTable()), torch.randn(2, 8)
    before = base.eval()(x)
    config = SamConfig(target_modules="all", density=0.5, score="random", init_weights=False)
    model = get_peft_model(copy.deepcopy(base.train()), config).eval()
    expected = adapted_copy(base, model.base_model.sparse_deltas()).eval()(x)
    assert torch.allclose(model(x), expected)
    assert not torch.allclose(expected, before)
    with model.disable_adapter():
        model.train()
        assert torch.equal(model.eval()(x), before)
    model.train()
    assert torch.allclose(model.eval()(x), expected)


def test_a_weight_that_is_computed_is_computed_once_in_a_pass() -> None:
    model, base = adapted(next(use for use in USES if use.make is Parametrised), init_weights=True)
    model.train(), base.train()  # spectral norm makes a step of its power iteration whenever the weight is computed
    torch.testing.assert_close(model(X), base(X), rtol=0, atol=0)
    buffers = {base_name(name): buffer for name, buffer in model.get_base_model().named_buffers()}
    for name, buffer in base.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("grad", [True, False])
def test_a_linear_layer_takes_no_tokens_as_torch_s_does(shape: tuple[int, ...], grad: bool) -> None:
    model, base = adapted(Use("", Twice))
    with torch.set_grad_enabled(grad):
        y = model(torch.randn(shape))
    assert y.shape == base(torch.randn(shape)).shape
    if grad:
        y.sum().backward()
        assert all(not delta.values.grad.any() for delta in model.base_model.sparse_deltas().values())


@torch.no_grad()
def test_autocast_leaves_float64_alone() -> None:
    model, _ = adapted(Use("", Twice))
    model.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmerged = model(X.double())
        model.merge_adapter()
        torch.testing.assert_close(unmerged, model(X.double()))


WRITTEN = [use for use in USES if use.make not in (Counts, Compiled, Looks) and "checkpoint" not in use.name]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("use", WRITTEN, ids=names)
@pytest.mark.parametrize("how", ["trace", "export"])
@torch.no_grad()
def test_an_unmerged_model_is_traced_and_exported_for_batches_of_any_size(use: Use, how: str) -> None:
    model, _ = adapted(use)
    model.requires_grad_(False)
    if how == "trace":
        run: Callable[[Tensor], Tensor] = torch.jit.trace(model, X)
    else:
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        run = torch.export.export(model, (X,), dynamic_shapes={"args": (batch,)}).module()
    other = torch.randn(7, 5, 8)
    torch.testing.assert_close(run(other), model(other))
