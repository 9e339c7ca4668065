# SPDX-License-Identifier: Apache-2.0
"""Whether a model has lost refusals since the start of a fit, so that it should rehearse them."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from lightning_safety.arguments import check_positive
from lightning_safety.data import Example
from lightning_safety.monitoring import OwnReplies, PromptSource, read_prompts
from lightning_safety.monitoring.margin import opening_likelihood
from lightning_safety.monitoring.own_replies import Asked, keep_replies
from lightning_safety.processes import from_first
from lightning_safety.scoring import SafetyObjective
from lightning_safety.scoring.shards import passes_of_all

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

LOOK_EVERY = 6
"""After how many optimizer steps to look, unless asked otherwise."""
_OPENING_TOKENS = 4


class RehearsalNeed:
    """Looks now and then at how likely the model's own refusals are, and tells from their fall when to rehearse.

    Those that it gave before it trained, and only how they begin, which is where it decides to refuse. A margin over
    some fixed opening of an answer says less: a model that loses its refusals for the style of a task may find both
    unlikely (measured: 93 of 100 harmful prompts answered at a margin that had not fallen).

    One rehearsal follows a look that found it needed, and the next look is left out: the optimizer's momentum goes on
    with a rehearsal for some steps, and after four a model refused a third of what it should answer
    (docs/preserving.md).

    Args:
        every_n_steps: After how many optimizer steps to look; twice as many after a rehearsal.
        tolerance: By how much their log-probability may fall below its start, in nats per token.
        source: Harmful prompts.
        prompts: At most so many of them.

    Attributes:
        likelihood: Their mean log-probability per token when it was last looked at; None before the start.
        needed: Whether it was too low then.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, every_n_steps: int, tolerance: float, source: PromptSource, prompts: int) -> None:
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
            raise ValueError(
                f"`tolerance` expected to be nats of at least 0 but got {tolerance!r}. Pass for instance 0.1."
            )
        self.every_n_steps = check_positive(every_n_steps, "watch_every_n_steps")
        self.tolerance = tolerance
        self.source = source
        self.prompts = check_positive(prompts, "watch_prompts")
        self.forget()

    def forget(self) -> None:
        """Begin anew: what an earlier fit found does not count."""
        self.likelihood: float | None = None
        self.needed = False
        self._start: float | None = None
        self._clock = -1
        self._stepped: set[int] = set()
        self._looked_at = 0
        self._rehearsed: set[int] = set()
        self._prompts: list[Example] = []
        self._examples: list[Example] = []
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._replies: OwnReplies | None = None

    def prepare(self, objective: SafetyObjective) -> None:
        """Read the prompts; an objective that asks the model itself is to ask them too. Call it before that does."""
        self._prompts = read_prompts(self.source, "watch", split="monitor", limit=self.prompts)[1]
        self._replies = objective if isinstance(objective, OwnReplies) else None
        if self._replies is not None:
            self._replies.ask_beside(self._prompts)

    def begin(
        self,
        trainer: pl.Trainer,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        restored: dict[str, Any] | None,
    ) -> None:
        """Look at the model before it trains, or take up what a checkpoint says that it was.

        Raises:
            ValueError: The model refuses none of the prompts.
        """
        self._tokenizer = tokenizer
        if restored is None:
            if trainer.ckpt_path is not None:
                warnings.warn(
                    "The checkpoint has nothing of an adaptive SafetyRehearsal: the model is kept as likely to refuse"
                    " as it is in the checkpoint, not before its fit began.",
                    stacklevel=2,
                )
            self._examples = from_first(self._refused(model, tokenizer))
            self._start = self.likelihood = self._look(trainer, model)
        else:
            self._examples = [Example(prompt, refusal) for prompt, refusal in restored["refusals"]]
            self._start, self.likelihood, self.needed = restored["start"], restored["likelihood"], restored["needed"]
            self._clock, self._looked_at = restored["clock"], restored["looked_at"]
            self._stepped, self._rehearsed = set(restored["stepped"]), set(restored["rehearsed"])

    def _refused(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        # Nothing where the objective's replies are those of a checkpoint, or of no model.
        if self._replies is not None and self._replies.refused_beside:
            return self._replies.refused_beside
        (kept,) = keep_replies(model, tokenizer, [Asked("watch", self._prompts, refused=True)], _OPENING_TOKENS)
        return kept

    def looks_before_step_of(self, optimizer: int) -> bool:
        """Count a step of an optimizer, by its number, and tell whether to look before it; not before the first.

        Steps that several optimizers take between two of one count once, whether they take turns or not.
        """
        if optimizer in self._stepped or not self._stepped:
            self._clock += 1
            self._stepped.clear()
        self._stepped.add(optimizer)
        return self._clock >= self._looked_at + self.every_n_steps * (2 if self.needed else 1)

    def look(self, trainer: pl.Trainer, model: nn.Module) -> None:
        """Look at the model before a step, and see whether it needs rehearsing.

        Raises:
            RuntimeError: What it finds is not finite.
        """
        assert self._start is not None
        self.likelihood = self._look(trainer, model)
        self._looked_at = self._clock
        self._rehearsed.clear()
        self.needed = self.likelihood < self._start - self.tolerance

    def rehearses_before_step_of(self, optimizer: int) -> bool:
        """Whether to rehearse: at each optimizer's first step after a look that found it needed."""
        if not self.needed or optimizer in self._rehearsed:
            return False
        self._rehearsed.add(optimizer)
        return True

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a resumed fit needs to decide alike; None before the first look."""
        if self._start is None:
            return None
        refusals = [[example.prompt, example.response] for example in self._examples]
        return {
            "refusals": refusals,
            "start": self._start,
            "likelihood": self.likelihood,
            "needed": self.needed,
            "clock": self._clock,
            "stepped": sorted(self._stepped),
            "looked_at": self._looked_at,
            "rehearsed": sorted(self._rehearsed),
        }

    def _look(self, trainer: pl.Trainer, model: nn.Module) -> float:
        assert self._tokenizer is not None
        # FSDP2 keeps the weights of the root whole until a backward pass, and here there is none: the next forward pass
        # would not see what the step between changes.
        with trainer.precision_plugin.train_step_context(), passes_of_all(model):
            found = opening_likelihood(model, self._tokenizer, self._examples, tokens=_OPENING_TOKENS)
        # Processes that disagreed by a rounding would rehearse apart, and wait for each other for ever.
        own = torch.tensor(found, dtype=torch.float32, device=next(model.parameters()).device)
        found = float(trainer.strategy.reduce(own, reduce_op="mean"))
        if not math.isfinite(found):
            raise RuntimeError(
                f"The log-probability of the model's own refusals expected to be finite but is {found:g}: nothing tells"
                " whether to rehearse. Check the model's weights, and train in float32 or bfloat16."
            )
        return found
