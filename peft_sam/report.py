"""Where a selection lies: entries by layer and module type, as a table and as a picture."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import TYPE_CHECKING

from peft_sam.selection import Selection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the first number in a name counts layers; later ones count parts of a layer, such as experts
LAYER = re.compile(r"^.*?\.(?P<index>\d+)\.(?P<kind>.+)$")


def place_of(name: str) -> tuple[str, str]:
    """Layer and module type of a parameter: "bert.encoder.layer.3.output.dense.weight" → ("3", "output.dense").

    What lies outside the numbered layers has the layer "-".
    """
    module = name.rpartition(".")[0]
    match = LAYER.match(module)
    if match is None:
        return "-", ".".join(module.split(".")[-2:])
    return match["index"], match["kind"]


def counts_by_place(selection: Selection) -> dict[tuple[str, str], tuple[int, int]]:
    """(layer, module type) → (selected entries, candidate entries), over weights and biases together."""
    selected: Counter[tuple[str, str]] = Counter()
    candidates: Counter[tuple[str, str]] = Counter()
    for name, shape in selection.shapes.items():
        candidates[place_of(name)] += shape.numel()
        selected[place_of(name)] += len(selection.indices[name])
    return {place: (selected[place], candidates[place]) for place in candidates}


def plot_selection(selection: Selection, path: str | os.PathLike[str] | None = None) -> Figure:
    """A picture of the density of the selection in each layer and module type, with entries written in.

    Args:
        path: where to write the picture, if anywhere; the ending says the format.

    Raises:
        ImportError: without matplotlib, with the command that installs it.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_selection draws with matplotlib: pip install "peft-sam[plot]"') from error
    found = counts_by_place(selection)
    layers = sorted({layer for layer, _ in found}, key=lambda layer: (layer != "-", int(layer) if layer != "-" else 0))
    kinds = list(dict.fromkeys(kind for _, kind in found))
    density = [
        [
            100 * found[layer, kind][0] / found[layer, kind][1] if (layer, kind) in found else float("nan")
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
            if (layer, kind) in found:
                color = "white" if density[row][column] ** 2 > low * high else "black"
                axes.text(column, row, f"{found[layer, kind][0]:,}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), [f"layer {layer}" if layer != "-" else "outside" for layer in layers])
    axes.set_title(f"{selection.k:,} of {selection.m:,} entries, score {selection.score!r}, {selection.budget} budget")
    figure.colorbar(image, label="selected entries, % of candidates")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
