# SPDX-License-Identifier: Apache-2.0
"""A callback that watches how a model tells harmful prompts from harmless ones inside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_safety.arguments import check_fraction
from lightning_safety.callbacks.monitor import Check
from lightning_safety.callbacks.prompt_monitor import PromptMonitor
from lightning_safety.callbacks.strategies import REPLICATED, SHARDED
from lightning_safety.drawing import check_matplotlib, has_matplotlib
from lightning_safety.monitoring import (
    PromptSource,
    check_layers,
    compare_activations,
    direction_cosines,
    draw_activation_overlap,
    last_token_activations,
)
from lightning_safety.monitoring.activation_comparison import mean_of_defined
from lightning_safety.processes import together
from lightning_safety.randomness import preserved_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_safety.monitoring import LayerComparison

# Each with what stands beside it, which is a mean over the same layers.
_METRICS = {
    "overlap": ("overlap_random", "overlap_shuffled"),
    "overlap_centred": ("overlap_centred_random", "overlap_centred_shuffled"),
    "separability": ("separability_chance",),
}


class ActivationOverlapMonitor(PromptMonitor):
    """Compares activations of harmful and harmless prompts during a fit, or once in ``validate`` and ``test``.

    Read is the residual stream at the last token of each prompt in the chat template, where the model begins to answer.
    A check takes one forward pass of the prompts, without logits, and changes nothing: weights after a fit are the same
    bits with the monitor and without. Logged are, all under ``safety/`` and as means over layers
    (where one is undefined, as at the embeddings where all prompts end with the same token, over the others):

    - ``activation_overlap``: mode subspace overlap of the two sets (arXiv 2505.14185). As in the paper the sets' means
      are in it; where these are large, as they mostly are, it compares little else;
    - ``activation_overlap_centred``: the same without each set's mean;
    - each with ``_shuffled`` behind it: the same for sets drawn from all prompts at random. An overlap below it is what
      the two kinds do not share;
    - each with ``_random`` behind it: what independent random subspaces of the same ranks overlap. Sets drawn from one
      source lie far above that too, as activations favour few directions;
    - ``refusal_direction_cosine``: of the difference of means, harmful − harmless, now and at the start. 1: unturned.
      The start is that of the fit, also of a resumed one; a fit resumed from a checkpoint without this monitor's state,
      and ``validate`` without a fit before it, leave this out;
    - ``activation_separability``: cross-validated share of prompts that a linear classifier tells apart, beside
      ``activation_separability_chance``, the larger set's share. With 80 prompts, differences of less than about 0.1
      say little;
    - ``check_seconds``.

    Values by layer are in ``safety.jsonl``; the figure ``activation_overlap`` shows both overlaps by layer. An overlap
    says nothing of what a model does: measure that with `HarmfulnessMonitor`. Under DDP, processes share the prompts.

    Args:
        every_n_steps: Check every so many optimizer steps. None: not by steps.
        every_n_epochs: Check at the end of every so many epochs. None: not by epochs.
        at_start: Whether to check before the first step. The directions at the start are taken either way.
        at_end: Whether to check after the last step.
        harmful: Prompts that should be refused: a built-in set, a file, a hub data set, a mapping of what
            `load_prompts` takes, or a list of `Example`.
        harmless: Everyday prompts, in the same form.
        split: The split of built-in sets. Other sources are read whole, unless a mapping says otherwise.
        prompts: At most so many of each kind, at least 2, spread evenly over the set. None: all.
        layers: Two shares of the depth, as in the paper; or a list of layer numbers, 0 the embeddings.
        energy: Share of Σσ² that a set's subspace keeps, in (0, 1].
        batch_size: Prompts at a time.
        allow_test: Whether the ``test`` split may be used, which is kept for evaluation.
        tokenizer: The tokenizer or its path. Default: the module's or the data module's, or the one that lies beside
            the model's weights on disk.
        language_model: The dotted name of the language model in the module, where there are several.
        figures: Whether to draw the figure. None: where matplotlib is installed.

    Raises:
        ModuleNotFoundError: `figures` and matplotlib is not installed.
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range, a prompt set is unknown or too small, or an activation is not finite.

    Example:
        >>> ActivationOverlapMonitor(layers=(0.9, 0.65))
        Traceback (most recent call last):
        ...
        ValueError: `layers` expected to be two shares of the depth, the lower first, in [0, 1] but got (0.9, 0.65). \
For the paper's choice, pass `layers=(0.65, 0.90)`.
    """

    strategies = (*REPLICATED, SHARDED)

    def __init__(
        self,
        every_n_steps: int | None = 200,
        every_n_epochs: int | None = None,
        *,
        at_start: bool = True,
        at_end: bool = True,
        harmful: PromptSource = "harmful",
        harmless: PromptSource = "harmless",
        split: str = "monitor",
        prompts: int | None = 40,
        # Integers first: jsonargparse takes the first that fits, and every integer can be a share.
        layers: list[int] | tuple[float, float] = (0.65, 0.90),
        energy: float = 0.6,
        batch_size: int = 20,
        allow_test: bool = False,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        language_model: str | None = None,
        figures: bool | None = None,
    ) -> None:
        super().__init__(
            every_n_steps,
            every_n_epochs,
            at_start,
            at_end,
            sources={"harmful": harmful, "harmless": harmless},
            split=split,
            prompts=prompts,
            batch_size=batch_size,
            allow_test=allow_test,
            tokenizer=tokenizer,
            language_model=language_model,
        )
        if prompts == 1:
            raise ValueError("`prompts` expected to be at least 2 but got 1: a single prompt has no spread.")
        check_layers(layers)
        self.layers = layers
        self.energy = check_fraction(energy, "energy")
        self.figures = figures

    def _begin_run(self) -> None:
        super()._begin_run()
        self._start: dict[int, Tensor] | None = None
        self._start_is_lost = False

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state and the refusal directions at the start, by layer."""
        return {**super().state_dict(), "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the run that a checkpoint belongs to, with its directions."""
        super().load_state_dict(state_dict)
        self._start = state_dict["start"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the prompts and look for matplotlib, so that whatever is missing stops the run before it begins."""
        super().setup(trainer, pl_module, stage)
        for name, examples in self._examples.items():
            if len(examples) < 2:
                raise ValueError(f"`{name}` expected to hold at least 2 prompts but got 1: it has no spread.")
        self._draws = self.figures is not False and has_matplotlib()
        if self.figures:
            check_matplotlib("`figures=True`", "pass `figures=False`")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the first step, or else take the directions of the start in silence."""
        # A checkpoint of later steps has trained weights, whether it lacks our state or has one that lacks the start.
        self._start_is_lost = self._start is None and trainer.ckpt_path is not None and trainer.global_step > 0
        if self._start_is_lost:
            rank_zero_warn(
                f"{type(self).__name__} leaves `safety/refusal_direction_cosine` out of this fit: the checkpoint has no"
                f" directions from before its first step, and its weights, of step {trainer.global_step}, are trained"
                " already. Resume from a checkpoint that was saved with this monitor to have it."
            )
        super().on_train_start(trainer, pl_module)
        if self._start is None and not self._start_is_lost:
            with together(f"The first look of {type(self).__name__}"), preserved_random_state():
                self.measure(trainer, pl_module)

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Check:
        """Run the prompts and compare the two sets; the first time in a fit is the start."""
        model, tokenizer = self._find(trainer, pl_module)
        prompts = [example.prompt for examples in self._examples.values() for example in examples]
        # Together, so that batches are full.
        found = last_token_activations(
            model, tokenizer, prompts, layers=self.layers, batch_size=self.batch_size, shared=True
        )
        count = len(self._examples["harmful"])
        compared = compare_activations(
            {layer: activations[:count] for layer, activations in found.items()},
            {layer: activations[count:] for layer, activations in found.items()},
            energy=self.energy,
        )
        directions = {layer: comparison.direction for layer, comparison in compared.items()}
        if self._start is None and trainer.state.fn == "fit" and not self._start_is_lost:
            self._start = directions
        cosines = {} if self._start is None else direction_cosines(self._start, directions)
        metrics = _means(compared)
        if cosines:
            metrics["refusal_direction_cosine"] = mean_of_defined(cosines.values())
        details = {
            "prompts": {"harmful": count, "harmless": len(prompts) - count},
            "layers": _by_layer(compared, cosines),
        }
        figures = {"activation_overlap": partial(draw_activation_overlap, compared)} if self._draws else {}
        return Check(metrics, details, figures=figures)


def _means(compared: Mapping[int, LayerComparison]) -> dict[str, float]:
    means = {}
    for name, controls in _METRICS.items():
        layers = [layer for layer in compared.values() if not math.isnan(getattr(layer, name))]
        for one in (name, *controls):
            means[f"activation_{one}"] = mean_of_defined(getattr(layer, one) for layer in layers)
    return means


def _by_layer(compared: Mapping[int, LayerComparison], cosines: Mapping[int, float]) -> dict[str, dict[str, Any]]:
    """Return what the log's line says of each layer; the directions themselves are too long for it."""
    lines = {}
    for layer, comparison in compared.items():
        values = asdict(comparison)
        values["direction_norm"] = float(values.pop("direction").norm())
        lines[str(layer)] = values | ({"refusal_direction_cosine": cosines[layer]} if cosines else {})
    return lines
