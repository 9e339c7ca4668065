# SPDX-License-Identifier: Apache-2.0
"""A picture of how far harmful and harmless prompts share their activations' subspaces, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_safety.drawing import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_safety.monitoring.activation_comparison import LayerComparison

# Of the Okabe–Ito palette: told apart without colour vision too.
_CURVES = (("overlap", "overlap", "#0072B2", "o"), ("overlap_centred", "without the means", "#D55E00", "s"))


def draw_activation_overlap(comparisons: Mapping[int, LayerComparison]) -> Figure:
    """Draw overlap by layer, with the means and without, each beside what random subspaces give.

    No global state of matplotlib is touched.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(6, 3.6)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    layers = sorted(comparisons)
    for name, label, colour, marker in _CURVES:
        measured = [getattr(comparisons[layer], name) for layer in layers]
        axes.plot(layers, measured, color=colour, marker=marker, label=label)
        for control, line in (("shuffled", "--"), ("random", ":")):
            expected = [getattr(comparisons[layer], f"{name}_{control}") for layer in layers]
            label_of_control = f"{label}, {control}"
            axes.plot(
                layers, expected, color=colour, marker=marker, markersize=3, linestyle=line, label=label_of_control
            )
    axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (0 = embeddings)")
    axes.set_ylabel("mode subspace overlap")
    axes.set_title("Harmful and harmless prompts at the last token", fontsize=11)
    # Outside: wherever the curves run, nothing is hidden.
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure
