# SPDX-License-Identifier: Apache-2.0
"""A callback that watches how often a model does what harmful prompts ask, and how often it refuses harmless ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn

from lightning_safety.arguments import check_positive
from lightning_safety.callbacks.log import Entry, leaves_files
from lightning_safety.callbacks.monitor import Check
from lightning_safety.callbacks.prompt_monitor import PromptMonitor
from lightning_safety.callbacks.replies import announce_reply_loggers, record_replies, send_replies
from lightning_safety.callbacks.strategies import REPLICATED, SHARDED
from lightning_safety.monitoring import Judge, JudgeFunction, PromptSource, as_judge, measure_harmfulness

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HarmfulnessMonitor(PromptMonitor):
    """Measures attack success, refusal and over-refusal during a fit, or once in ``validate`` and ``test``.

    At each check the model replies greedily to harmful and borderline prompts, and judges read the replies. A check
    changes nothing: weights after a fit are the same bits with the monitor and without.

    Each check is one point at its optimizer step in every logger and one line of ``safety.jsonl`` in the run folder
    (with intervals and counts), and ``trainer.callback_metrics`` hold the last one, for
    ``ModelCheckpoint(monitor="safety/attack_success_rate")``. Logged are, all under ``safety/``:

    - ``attack_success_rate``: harmful replies to harmful prompts, of those scored;
    - ``refusal_rate``: refused harmful prompts; ``over_refusal_rate``: refused borderline prompts;
    - ``unscored_rate``: replies of which the judge says nothing; they never count as safe;
    - ``refusal_margin``: mean log-probability per token of a refusal over that of "Sure, here is", in nats, where the
      harmful prompts have refusals as responses;
    - ``check_seconds``.

    The plain name is the first judge's rate; each judge also has ``<name>/<judge>``. Replies are written to
    ``safety_replies.jsonl`` in the run folder, which only its owner can read. ``fast_dev_run`` uses two prompts of each
    kind and writes no file.

    Under DDP the processes share the prompts: each lets its model reply to some and its judges read them, and the rates
    are over all replies, as in one process. Under FSDP2 (`ModelParallelStrategy`, with `fully_shard` of the language
    model itself) all generate all replies and share out the judging.

    Args:
        every_n_steps: Check every so many optimizer steps. None: not by steps.
        every_n_epochs: Check at the end of every so many epochs. None: not by epochs.
        at_start: Whether to check before the first step.
        at_end: Whether to check after the last step.
        harmful: Prompts that should be refused: a built-in set, a file, a hub data set, a mapping of what
            `load_prompts` takes, or a list of `Example`.
        borderline: Harmless prompts that look harmful, in the same form.
        split: The split of built-in sets. Other sources are read whole, unless a mapping says otherwise.
        prompts: At most so many of each kind, spread evenly over the set. None: all.
        max_new_tokens: Length of a reply, in tokens.
        batch_size: Replies generated at a time.
        judges: What judges the replies: a judge, a built-in one's name (``"keyword_refusal"``,
            ``"refusal_classifier"``), a function, or a list of these. Default: `KeywordRefusalJudge`.
        generate: Whether to generate replies. Without, only ``refusal_margin`` is measured, at a fraction of the cost.
        log_replies: Whether to send the replies to the loggers that take text; which ones is said at the start.
        allow_test: Whether the ``test`` split may be used, which is kept for evaluation: what decisions were made by
            cannot measure their result.
        tokenizer: The tokenizer or its path. Default: the module's or the data module's, or the one that lies beside
            the model's weights on disk.
        language_model: The dotted name of the language model in the module, where there are several.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range, a prompt set is unknown or empty, or nothing could be measured.

    Example:
        >>> monitor = HarmfulnessMonitor(every_n_steps=50, split="test")
        Traceback (most recent call last):
        ...
        ValueError: `split` expected to be for use during training but got 'test', which is kept for evaluation. \
Use split="monitor", or pass `allow_test=True`.
    """

    strategies = (*REPLICATED, SHARDED)

    def __init__(
        self,
        every_n_steps: int | None = 100,
        every_n_epochs: int | None = None,
        *,
        at_start: bool = True,
        at_end: bool = True,
        harmful: PromptSource = "harmful",
        borderline: PromptSource = "borderline",
        split: str = "monitor",
        prompts: int | None = 20,
        max_new_tokens: int = 24,
        batch_size: int = 20,
        # The list first: with Sequence, or in another order, LightningCLI cannot write down what it has read.
        judges: list[Judge | JudgeFunction | str] | Judge | JudgeFunction | str | None = None,
        generate: bool = True,
        log_replies: bool = False,
        allow_test: bool = False,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        language_model: str | None = None,
    ) -> None:
        super().__init__(
            every_n_steps,
            every_n_epochs,
            at_start,
            at_end,
            sources={"harmful": harmful, "borderline": borderline},
            split=split,
            prompts=prompts,
            batch_size=batch_size,
            allow_test=allow_test,
            tokenizer=tokenizer,
            language_model=language_model,
        )
        self.max_new_tokens = check_positive(max_new_tokens, "max_new_tokens")
        self.judges = _as_judges(judges)
        self.generate = generate
        self.log_replies = log_replies

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the prompts, so that whatever is wrong with them stops the run before it begins."""
        super().setup(trainer, pl_module, stage)
        if not self.generate and not any(example.response for example in self._examples["harmful"]):
            raise ValueError(
                "`generate=False` expected harmful prompts with refusals as responses, which the refusal margin needs, "
                "but there are none. Name their column: `harmful={'source': …, 'response_column': …}`."
            )
        if self.log_replies and self.generate and leaves_files(trainer):
            announce_reply_loggers(trainer)

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Check:
        """Let the model reply and the judges read."""
        model, tokenizer = self._find(trainer, pl_module)
        found = measure_harmfulness(
            model,
            tokenizer,
            self._examples["harmful"],
            self._examples["borderline"],
            judges=self.judges,
            generate=self.generate,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            show_progress=False,
            shared=True,
        )
        rates = {name: rate for name, rate in found.named_rates.items() if "/" in name}
        for name, rate in rates.items():
            if rate.warning:
                rank_zero_warn(f"safety/{name} says little: {rate.warning}.")
        details = {"rates": {name: rate.to_dict() for name, rate in rates.items()}}
        return Check(found.metrics, details, tuple(asdict(reply) for reply in found.replies), outcomes=found.outcomes)

    def publish(self, trainer: pl.Trainer, check: Check) -> None:
        """Send the replies to loggers, if asked to."""
        if self.log_replies and leaves_files(trainer):
            send_replies(trainer, check.replies)

    def write(self, folder: Path, check: Check, identity: Entry, replacing: Entry | None) -> None:
        """Write the line of the check, and the replies to their own file."""
        super().write(folder, check, identity, replacing)
        if check.replies:
            record_replies(folder, [{**identity, **reply} for reply in check.replies], replacing=replacing)


def _as_judges(judges: list[Judge | JudgeFunction | str] | Judge | JudgeFunction | str | None) -> list[Judge]:
    found = [as_judge(judge) for judge in (judges if isinstance(judges, list | tuple) else [judges])]
    names = [judge.name for judge in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`judges` expected to be at least one, each with a name of its own, but got {names}.")
    return found
