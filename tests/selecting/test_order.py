"""Laws of the order of the data: selecting does not change it, and every pass of one selection sees the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from peft_sam import SamConfig, select_parameters
from peft_sam.selecting.order import Order, digest

DATA = TensorDataset(torch.randn(41, 6), torch.randint(0, 3, (41,)))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


class Noisy(Dataset):  # type: ignore[type-arg]
    """Rows with noise from a generator of the dataset's own."""

    def __init__(self, noise: Callable[[], float]) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return 41

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x, y = DATA[row]
        return x + self.noise(), y


class Drawn(IterableDataset):  # type: ignore[type-arg]
    """A stream of rows that a generator draws."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for row in self.generator.permutation(41):
            yield DATA[int(row)]


class Collator:
    """Masks by a generator of its own, as collators of masked language models do."""

    def __init__(self) -> None:
        self.generator = generator()

    def __call__(self, rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        x = torch.stack([x for x, _ in rows])
        mask = torch.rand(x.shape, generator=self.generator) < 0.8
        return [x * mask, torch.stack([y for _, y in rows])]


def closed_over() -> Callable[[], float]:
    drawn = random.Random(3)
    return lambda: drawn.gauss(0, 1)


SHARED = np.random.default_rng(1)


def from_the_module() -> Callable[[], float]:
    SHARED.bit_generator.state = np.random.default_rng(1).bit_generator.state
    return lambda: SHARED.normal()


class Shared(Noisy):
    def __init__(self) -> None:
        super().__init__(from_the_module())
        del self.noise

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return DATA[row][0] + SHARED.normal(), DATA[row][1]


def prepared(loader: Any, **options: Any) -> Any:
    config = DataLoaderConfiguration(**options)
    return Accelerator(cpu=True, dataloader_config=config).prepare(loader)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(DATA, 8, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(DATA, 8, shuffle=True, generator=generator()),
    "a sampler": lambda: DataLoader(DATA, 8, sampler=RandomSampler(DATA, generator=generator())),
    "a batch sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=generator()), 8, False)
    ),
    "weights": lambda: DataLoader(DATA, 8, sampler=WeightedRandomSampler([1.0] * 41, 41, generator=generator())),
    "a subset": lambda: DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(30), generator=generator())),
    "a dataset's generator": lambda: DataLoader(
        Noisy(lambda of=generator(): float(torch.randn((), generator=of))),  # type: ignore[misc]  # noqa: B008
        8,
    ),
    "numpy's": lambda: DataLoader(Noisy(np.random.default_rng(1).normal), 8),
    "numpy's old one": lambda: DataLoader(Noisy(np.random.RandomState(1).normal), 8),
    "Python's": lambda: DataLoader(Noisy(partial(random.Random(1).gauss, 0, 1)), 8),
    "one of the module's": lambda: DataLoader(Noisy(from_the_module()), 8),
    "one that a method reads from the module": lambda: DataLoader(Shared(), 8),
    "in a closure": lambda: DataLoader(Noisy(closed_over()), 8),
    "datasets in datasets": lambda: DataLoader(ConcatDataset([Subset(Noisy(closed_over()), range(9)), DATA]), 8),
    "a collator": lambda: DataLoader(DATA, 8, collate_fn=Collator()),
    "a stream": lambda: DataLoader(Drawn(), 8),
    "global states": lambda: DataLoader(Noisy(lambda: random.random() + np.random.rand() + float(torch.rand(()))), 8),
    "workers": lambda: DataLoader(DATA, 8, shuffle=True, num_workers=1),
    "workers that stay": lambda: DataLoader(
        Noisy(lambda: float(torch.rand(()))), 8, num_workers=1, persistent_workers=True
    ),
    "Accelerate's": lambda: prepared(DataLoader(DATA, 8, shuffle=True)),
    "Accelerate's seeded": lambda: prepared(DataLoader(DATA, 8, shuffle=True), use_seedable_sampler=True),
    "Accelerate's, of a stream": lambda: prepared(DataLoader(Drawn(), 8), dispatch_batches=False),
}
every_loader = pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


NET = Net()


def cross_entropy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def selected(loader: Any, **options: Any) -> Any:
    score = options.pop("score", "sam")
    model = get_peft_model(copy.deepcopy(NET), SamConfig(target_modules="all", density=0.1, score=score))
    return select_parameters(model, loader, loss_fn=cross_entropy, progress=False, **options)


def read(loader: Any) -> list[int]:
    """Two epochs, as training reads them."""
    return [digest(batch) for _ in range(2) for batch in loader]


@every_loader
@pytest.mark.parametrize(
    "options", [{}, {"max_batches": 2}, {"memory_budget": 400.0}, {"score": "movement", "max_batches": 9}]
)
def test_training_reads_what_it_would_have_read_without_a_selection(make: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    one, other = make(), make()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    expected = read(one)
    from_the_module()
    for put_back, state in zip((torch.set_rng_state, random.setstate, np.random.set_state), states, strict=True):
        put_back(state)  # type: ignore[operator]
    selected(other, **options)
    assert read(other) == expected


@every_loader
def test_every_pass_of_a_selection_sees_the_same_batches(make: Any) -> None:
    found = []
    for memory_budget in (None, 400):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        found.append(selected(make(), max_batches=3, memory_budget=memory_budget))
    assert found[0].samples == found[1].samples
    assert all(torch.equal(found[0].indices[name], found[1].indices[name]) for name in found[0].indices)


class Moving:
    """Batches that are others each time they are read."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.time = lengths, 0

    def __len__(self) -> int:
        return max(self.lengths)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        length = self.lengths[self.time % len(self.lengths)]
        self.time += 1
        for number in range(length):
            yield torch.full((4, 6), float(number + (self.time if len(self.lengths) == 1 else 0))), torch.arange(4) % 3


@pytest.mark.parametrize("lengths", [[3], [3, 2], [2, 3]], ids=["others", "fewer", "more"])
def test_batches_that_are_others_each_time_are_refused_for_several_passes(lengths: list[int]) -> None:
    assert selected(Moving(lengths)).k
    with pytest.raises(ValueError, match=r"is not the one that the first pass read there.*larger memory_budget"):
        selected(Moving(lengths), memory_budget=400)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": torch.zeros(3)}, {"x": torch.zeros(3, 1)}),
        ({"x": torch.zeros(3)}, {"y": torch.zeros(3)}),
        ([torch.tensor([1.0, 2.0])], [torch.tensor([2.0, 1.0])]),
        (["a", 1], ["a", 2]),
        ([torch.zeros(0)], [torch.zeros(0, 2)]),
        ({"x": np.zeros(3)}, {"x": np.ones(3)}),
        (SimpleNamespace(x=torch.zeros(3)), SimpleNamespace(x=torch.ones(3))),
    ],
)
def test_a_checksum_tells_batches_apart(one: Any, other: Any) -> None:
    assert digest(one) == digest(copy.deepcopy(one)) != digest(other)


def test_a_loader_that_holds_itself_or_much_data_is_looked_through() -> None:
    loader: Any = DataLoader([torch.zeros(1)] * 5000, generator=generator())  # type: ignore[arg-type]
    loader.itself = loader
    state = loader.generator.get_state()
    order = Order(loader)
    torch.rand(1, generator=loader.generator)
    order.put_back()
    assert torch.equal(loader.generator.get_state(), state)


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield torch.randn(2, 6), torch.tensor([0, 1])


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (DATA[row % 41] for row in iter(lambda: random.randrange(41), None))


@pytest.mark.parametrize("make", [endless, lambda: DataLoader(Endless(), 2)], ids=["generator", "loader"])
def test_a_stream_without_end_is_read_for_a_while_and_asks_for_max_batches(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_sam.selecting.passes.STREAM", 7)
    with pytest.warns(UserWarning, match="stopped after 7: pass max_batches"):
        assert selected(make()).batches == 7
    assert selected(make(), max_batches=9).batches == 9


def test_a_stream_that_ends_is_read_to_its_end() -> None:
    assert selected(DataLoader(Drawn(), 8)).samples == 41
