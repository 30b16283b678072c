"""Laws of the pass over the data."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_sam import Loss, accumulate
from tests.shared.reference import mean_loss_gradients

pytestmark = pytest.mark.on_device

SIZES = (4, 4, 3, 1)


def net(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def data(sizes: tuple[int, ...] = SIZES) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in sizes]


def mean_loss(model: nn.Module) -> Any:
    def loss(batch: tuple[Tensor, Tensor]) -> Loss:
        x, y = batch
        return Loss(F.cross_entropy(model(x), y), len(x))

    return loss


def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def run(model: nn.Module, batches: Any, **options: Any) -> Any:
    parameters = options.pop("parameters", dict(model.named_parameters()))
    loss = options.pop("loss", mean_loss(model))
    return accumulate(model, parameters, batches, loss, progress=False, **options)


def test_the_gradient_is_that_of_the_mean_loss_over_all_examples() -> None:
    model, batches = net(), data()
    found = run(model, batches)
    expected = mean_loss_gradients(model, found.tensors["gradient"], batches, summed, sum(SIZES))
    for name, gradient in expected.items():
        torch.testing.assert_close(found.tensors["gradient"][name], gradient)
    assert (found.samples, found.batches) == (sum(SIZES), len(SIZES))


def test_how_the_data_is_cut_into_batches_does_not_matter() -> None:
    model, (whole,) = net(), data((12,))
    one = run(model, [whole]).tensors["gradient"]
    for cuts in ([5, 7], [1] * 12, [11, 1]):
        batches = list(zip(whole[0].split(cuts), whole[1].split(cuts), strict=True))
        for name, gradient in run(model, batches).tensors["gradient"].items():
            torch.testing.assert_close(gradient, one[name])


def test_the_squared_gradient_is_the_weighted_mean_over_micro_batches() -> None:
    model, batches = net(), data()
    found = run(model, batches, statistics=("squared_gradient",)).tensors["squared_gradient"]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        n = len(batch[0])
        for name, gradient in mean_loss_gradients(model, expected, [batch], summed, n).items():
            expected[name] += n * gradient**2 / sum(SIZES)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


def test_both_statistics_come_from_one_pass() -> None:
    model, batches = net(), data()
    together = run(model, batches, statistics=("gradient", "squared_gradient")).tensors
    assert together.keys() == {"gradient", "squared_gradient"}
    for kind, tensors in together.items():
        for name, alone in run(model, batches, statistics=(kind,)).tensors[kind].items():
            torch.testing.assert_close(tensors[name], alone)


def test_a_parameter_used_twice_gets_the_sum_of_its_gradients() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5).double()
            self.out = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.linear(torch.tanh(self.linear(x))))

    model, batches = Twice(), data()
    found = run(model, batches).tensors["gradient"]
    for name, gradient in mean_loss_gradients(model, found, batches, summed, sum(SIZES)).items():
        torch.testing.assert_close(found[name], gradient)


def test_an_embedding_with_sparse_gradients_is_accumulated_too() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))
    batches = [(torch.randint(0, 7, (n,)), torch.randint(0, 3, (n,))) for n in SIZES]
    found = run(model, batches).tensors["gradient"]
    dense = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    dense.load_state_dict(model.state_dict())
    for name, gradient in run(dense, batches).tensors["gradient"].items():
        torch.testing.assert_close(found[name], gradient)


def test_at_most_one_dense_gradient_exists_at_a_time() -> None:
    model = net()
    seen: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p: seen.append(sum(q.grad is not None for q in model.parameters()))
        )
    run(model, data())
    assert max(seen) == 1


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
        [p.detach().clone() for p in model.parameters()],
        (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    )


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, (Tensor, np.ndarray)):
        assert bool((one == other).all())
    else:
        assert one == other


class Interrupting(list):  # type: ignore[type-arg]
    """Two batches, then what an impatient user does."""

    def __iter__(self) -> Any:
        yield from list.__iter__(self)
        raise KeyboardInterrupt


def with_nan(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0] * float("nan"), batch[1]


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (data, None),
        (lambda: Interrupting(data()[:2]), KeyboardInterrupt),
        (lambda: [*data()[:2], with_nan(data()[0])], FloatingPointError),
        (list, ValueError),
    ],
    ids=["all goes well", "interrupted", "a NaN comes", "no data"],
)
def test_the_model_is_as_before_whatever_happens(make: Any, error: Any, train_mode: bool) -> None:
    model, batches = net(dropout=0.5).train(), make()
    model[0].eval()
    model[1].requires_grad_(False)
    model[0].weight.requires_grad_(False)
    (model(torch.randn(2, 5, dtype=torch.float64)).sum()).backward()
    before = snapshot(model)
    if error is None:
        run(model, batches, train_mode=train_mode)
    else:
        with pytest.raises(error):
            run(model, batches, train_mode=train_mode)
    assert_same(before, snapshot(model))


def test_dropout_is_off_by_default_and_on_in_train_mode() -> None:
    model, batches = net(dropout=0.9), data()
    quiet = [run(model, batches).tensors["gradient"]["4.weight"] for _ in range(2)]
    torch.testing.assert_close(quiet[0], quiet[1], rtol=0, atol=0)
    noisy = run(model, batches, train_mode=True).tensors["gradient"]["4.weight"]
    assert not torch.allclose(noisy, quiet[0])


def test_a_nan_names_the_batch() -> None:
    batches = data()
    with pytest.raises(FloatingPointError, match="loss of batch 2 is nan"):
        run(net(), [*batches[:2], with_nan(batches[2])])


def test_an_infinite_gradient_names_the_parameter_and_the_batch() -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
            ctx.factor = factor
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad * ctx.factor, None

    model = net()

    def loss(batch: Any) -> Loss:
        (x, y), factor = batch
        hidden = Steep.apply(model[0](x), factor)
        return Loss(F.cross_entropy(model[4](hidden), y), len(x))

    batches = [(batch, float("inf") if i == 1 else 1.0) for i, batch in enumerate(data())]
    with pytest.raises(FloatingPointError, match=r"'0\.(weight|bias)' in batch 1 "):
        run(model, batches, loss=loss)


def test_a_loss_that_does_not_reach_the_parameters_says_so() -> None:
    model = net()

    def detached(batch: Any) -> Loss:
        return Loss(F.cross_entropy(model(batch[0]).detach(), batch[1]), 1)

    with pytest.raises(ValueError, match=r"does not depend on the candidate parameters.* have a part in them"):
        run(model, data(), loss=detached)

    def zero(batch: Any) -> Loss:
        return Loss((model(batch[0]) * 0).sum(), 1)

    with pytest.raises(ValueError, match="all gradients of the 6 candidate parameters are zero"):
        run(model, data(), loss=zero)


def test_an_unknown_statistic_is_refused() -> None:
    model, batches = net(), data()
    with pytest.raises(ValueError, match=r"any of \['gradient', 'squared_gradient', 'hessian'\]; got \['curvature'\]"):
        run(model, batches, statistics=("gradient", "curvature"))
    one, other = (run(model, batches, statistics=of).tensors["gradient"] for of in ("gradient", ("gradient",)))
    assert all(torch.equal(one[name], gradient) for name, gradient in other.items())


def test_a_batch_without_samples_counts_for_nothing() -> None:
    model, batches = net(), data()
    empty = (torch.empty(0, 5, dtype=torch.float64), torch.empty(0, dtype=torch.int64))
    one, other = run(model, batches), run(model, [batches[0], empty, *batches[1:]])
    assert other.samples == one.samples
    for name, gradient in one.tensors["gradient"].items():
        torch.testing.assert_close(other.tensors["gradient"][name], gradient)


def test_a_loss_per_example_is_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"shape \(4,\); expected one number"):
        run(model, data(), loss=lambda batch: Loss(F.cross_entropy(model(batch[0]), batch[1], reduction="none"), 4))


def test_accumulators_are_float32_for_half_precision_parameters() -> None:
    model = net().to(torch.bfloat16)
    batches = [(x.to(torch.bfloat16), y) for x, y in data((4,) * 50)]
    found = run(model, batches).tensors["gradient"]
    assert {t.dtype for t in found.values()} == {torch.float32}


def test_float16_gradients_too_small_for_float16_survive() -> None:
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).to(torch.float16)
    x, y = torch.randn(4, 5).to(torch.float16), torch.randn(4, 3).to(torch.float16)

    def loss(batch: Any) -> Loss:
        return Loss(((model(x) * y).float().sum() * 1e-9), 4)

    found = run(model, [None], loss=loss).tensors["gradient"]["0.weight"]
    expected = y.float().t() @ x.float() * 1e-9
    assert float(expected.abs().max()) < torch.finfo(torch.float16).smallest_normal * 1e-2
    torch.testing.assert_close(found, expected, rtol=0.15, atol=float(expected.abs().max()) * 0.05)


class Fake:
    """Processes of which only this one is real."""

    def __init__(self, sum: Callable[[Tensor], Tensor]) -> None:
        self.sum, self.together, self.at = sum, lambda rest: nullcontext(), lambda place: None


def test_the_sums_of_two_processes_on_halves_are_those_of_one_on_the_whole() -> None:
    model, batches = net(), data((4, 2, 3, 5))
    halves = [batches[::2], batches[1::2]]
    sent: list[list[Tensor]] = []
    for half in halves:
        mine: list[Tensor] = []
        run(model, half, processes=Fake(lambda t, mine=mine: (mine.append(t.clone()), t)[1]))
        sent.append(mine)
    totals = [a + b for a, b in zip(*sent, strict=True)]
    answers = iter(totals)
    combined = run(model, halves[0], processes=Fake(lambda t: next(answers).clone())).tensors["gradient"]
    for name, whole in run(model, batches).tensors["gradient"].items():
        torch.testing.assert_close(combined[name], whole)
