"""Where a selection lies: by layer and module type, as a table and as a picture."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_sam.layers.found import adapted_part, deltas_of
from peft_sam.selection import Selection
from peft_sam.tuner.targets import shapes_of_candidates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the first number in a name counts layers; later ones count parts of a layer, such as experts
LAYER = re.compile(r"^.*?\.(?P<index>\d+)\.(?P<kind>.+)$")
# the number of an expert or another part of a layer
PART = re.compile(r"\.\d+\.")

# More places than this are summed up when a report is printed, layers in so many ranges.
LONG, RANGES = 40, 10


def _range(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"


def place_of(name: str) -> tuple[str, str]:
    """Layer and module type of a parameter: "bert.encoder.layer.3.output.dense.weight" → ("3", "output.dense").

    What lies outside the numbered layers has the layer "-".
    """
    module = name.rpartition(".")[0]
    match = LAYER.match(module)
    if match is None:
        return "-", ".".join(module.split(".")[-2:])
    return match["index"], match["kind"]


@dataclass
class Row:
    """What is selected in one layer and module type, weights and biases together.

    Attributes:
        selected, candidates: entries.
        rows, columns: of the weight matrices, those with an entry.
        of_rows, of_columns: all of them.
        shared: entries that the other selection has too; 0 without another.
    """

    selected: int = 0
    candidates: int = 0
    rows: int = 0
    columns: int = 0
    of_rows: int = 0
    of_columns: int = 0
    shared: int = 0

    def __add__(self, other: Row) -> Row:
        return Row(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class SelectionReport:
    """Where a selection lies. Prints as a table, which deep models shorten; `table` has all of it, `plot` draws it.

    Attributes:
        places: (layer, module type) → `Row`.
        other: number of entries of the selection that it was compared with, or None.
    """

    selection: Selection
    places: dict[tuple[str, str], Row]
    other: int | None = None

    @property
    def total(self) -> Row:
        """All places together."""
        return sum(self.places.values(), Row())

    @property
    def overlap(self) -> float:
        """Entries in both selections over entries in either (Jaccard's index); NaN without another."""
        either = self.total.selected + (self.other or 0) - self.total.shared
        return float("nan") if self.other is None else self.total.shared / max(either, 1)

    def __str__(self) -> str:
        return self.table() if len(self.places) <= LONG else self._as_text(self._summary())

    def table(self) -> str:
        """A line for each layer and module type."""
        return self._as_text([(layer, kind, row) for (layer, kind), row in self.places.items()])

    def _summary(self) -> list[tuple[str, str, Row]]:
        """Lines for the module types over all layers, then for at most so many ranges of layers."""
        kinds: dict[str, Row] = {}
        layers: dict[int, Row] = {}
        outside = []
        for (layer, kind), row in self.places.items():
            if layer == "-":
                outside.append((layer, kind, row))
            else:
                kind = PART.sub(".*.", kind)
                kinds[kind] = kinds.get(kind, Row()) + row
                layers[int(layer)] = layers.get(int(layer), Row()) + row
        numbers, size = sorted(layers), -(-len(layers) // RANGES)
        ranges = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        by_kinds = [(_range(numbers), kind, row) for kind, row in kinds.items()]
        by_layers = [(_range(of), "", sum((layers[number] for number in of), Row())) for of in ranges]
        return [*by_kinds, *outside, *by_layers]

    def _as_text(self, named: list[tuple[str, str, Row]]) -> str:
        head = ["layer", "module", "entries", "density", "rows", "columns"] + ["shared"] * (self.other is not None)
        lines = [head, *([layer, kind, *self._cells(row)] for layer, kind, row in [*named, ("", "all", self.total)])]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        form = "  ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
        return "\n".join(form.format(*line) for line in lines)

    def _cells(self, row: Row) -> list[str]:
        share = row.selected / max(row.candidates, 1)
        active = [f"{row.rows:,}/{row.of_rows:,}", f"{row.columns:,}/{row.of_columns:,}"]
        shared = [] if self.other is None else [f"{row.shared:,}"]
        return [f"{row.selected:,}", f"{share:.3%}", *active, *shared]

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """`plot_selection`."""
        return plot_selection(self.selection, path)


def selection_report(
    of: Selection | nn.Module, adapter_name: str = "default", other: Selection | str | None = None
) -> SelectionReport:
    """Where a selection lies, per layer and module type: entries, density, active rows and columns, overlap.

    Args:
        of: a selection, or a model with a SAM adapter that has its support, itself or in a part of it.
        adapter_name: which adapter, with a model.
        other: a selection, or another adapter of the model, to compare with.

    Raises:
        ValueError: if there is no such adapter, it has no support yet, or `other` names one without a model.
    """
    selection = of if isinstance(of, Selection) else selection_of(of, adapter_name)
    if isinstance(other, str):
        if isinstance(of, Selection):
            raise ValueError(f"other={other!r} names an adapter, which needs a model; got a Selection.")
        other = selection_of(of, other)
    places: dict[tuple[str, str], Row] = {}
    for name, shape in selection.shapes.items():
        indices = selection.indices[name]
        row = Row(len(indices), shape.numel())
        if len(shape) == 2:
            row.rows, row.columns = len((indices // shape[1]).unique()), len((indices % shape[1]).unique())
            row.of_rows, row.of_columns = shape
        if other is not None and name in other.indices:
            row.shared = int(torch.isin(indices, other.indices[name]).sum())
        places[place_of(name)] = places.get(place_of(name), Row()) + row
    return SelectionReport(selection, places, None if other is None else other.k)


def selection_of(model: nn.Module, adapter_name: str) -> Selection:
    """The support of an adapter as a `Selection`.

    Raises:
        ValueError: if there is no such adapter, or it has no support yet.
    """
    model = adapted_part(model)
    found = {name: delta.indices.cpu() for name, delta in deltas_of(model, adapter_name).items() if not delta.pending}
    if not found:
        raise ValueError(f"the model has no SAM adapter {adapter_name!r} with a support.")
    configs: Any = model.peft_config
    config = configs[adapter_name]
    shapes = shapes_of_candidates(model, adapter_name, config)
    indices = {name: found.get(name, torch.empty(0, dtype=torch.int64, device="cpu")) for name in shapes}
    about = config.selection or {}
    how = {key: about.get(key, getattr(config, key)) for key in ("score", "budget", "density")}
    return Selection(indices, shapes, **how, threshold=about.get("threshold", 0.0))


Counts = dict[tuple[str, str], tuple[int, int]]


def counts_of(selection: Selection) -> Counts:
    """Selected and candidate entries per layer and module type."""
    found: Counts = {}
    for name, shape in selection.shapes.items():
        k, m = found.get(place_of(name), (0, 0))
        found[place_of(name)] = (k + len(selection.indices[name]), m + shape.numel())
    return found


def plot_selection(selection: Selection, path: str | os.PathLike[str] | None = None) -> Figure:
    """A picture of the density of the selection in each layer and module type, with entries written in.

    Args:
        path: where to write the picture, if anywhere; the ending says the format.

    Raises:
        ImportError: without matplotlib, with the command that installs it.
    """
    figure = draw(counts_of(selection), title_of(selection))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def title_of(selection: Selection) -> str:
    """What stands over the picture."""
    return f"{selection.k:,} of {selection.m:,} entries, score {selection.score!r}, {selection.budget} budget"


def draw(counts: Counts, title: str) -> Figure:
    """The picture of `plot_selection`.

    Raises:
        ImportError: without matplotlib, with the command that installs it.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture is drawn with matplotlib: pip install "peft-sam[plot]"') from error
    layers = sorted({layer for layer, _ in counts}, key=lambda layer: (layer != "-", int(layer) if layer != "-" else 0))
    kinds = list(dict.fromkeys(kind for _, kind in counts))
    density = [
        [
            100 * counts[layer, kind][0] / counts[layer, kind][1] if (layer, kind) in counts else float("nan")
            for kind in kinds
        ]
        for layer in layers
    ]
    figure = Figure(figsize=(1.6 + 1.25 * len(kinds), 1.6 + 0.5 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    # supports are clustered: a few places hold most entries, and a linear scale would show only those
    positive = [value for row in density for value in row if value > 0]
    low, high = min(positive, default=0.01), max(positive, default=100)
    image = axes.imshow(
        density,
        aspect="auto",
        cmap=colormaps["Blues"].with_extremes(under="white"),
        norm=LogNorm(low, max(high, low * 1.01)),
    )
    for row, layer in enumerate(layers):
        for column, kind in enumerate(kinds):
            if (layer, kind) in counts:
                color = "white" if density[row][column] ** 2 > low * high else "black"
                axes.text(column, row, f"{counts[layer, kind][0]:,}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), [f"layer {layer}" if layer != "-" else "outside" for layer in layers])
    axes.set_title(title)
    figure.colorbar(image, label="selected entries, % of candidates")
    return figure
