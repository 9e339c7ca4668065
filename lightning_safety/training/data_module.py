# SPDX-License-Identifier: Apache-2.0
"""(prompt, response) rows as batches for a causal language model, in an order that survives a restart."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl

from lightning_safety.arguments import check_positive
from lightning_safety.data import Example, TokenizedExample, length_buckets
from lightning_safety.language import find_language_model, find_tokenizer, pad_token_id
from lightning_safety.processes import check_alike, together
from lightning_safety.training.counters import correct_in_epoch
from lightning_safety.training.encoding import encode_examples
from lightning_safety.training.loader import Collator, EvaluationLoader, Position, ResumableLoader
from lightning_safety.training.order import BatchOrder
from lightning_safety.training.own_replies import encode_own_replies
from lightning_safety.training.sources import Source, read_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text last: jsonargparse takes the first that fits, and everything can be text.
Rows = list[Any] | dict[str, Any] | os.PathLike[str] | str
"""A prompt set's name or path, a mapping with the key ``source``, a list of these, or a list of `Example`."""

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}


class InstructionDataModule(pl.LightningDataModule):
    """Rows of (prompt, response) from prompt sets, files or hub data sets, alone or mixed.

    Text goes through the tokenizer's chat template. The loss is on the response and its end-of-turn token, never on
    the prompt or padding. Batches hold rows of similar length. Their order is a function of seed and epoch, and where a
    resumed fit continues follows from the trainer's own counters: it sees the batches it would have seen.

    Several processes (DDP, FSDP2) share out the rows: a step of theirs trains on those of one process with a
    `batch_size` so many times as large, and a fit goes on with other numbers of both whose product is the same. A batch
    of fewer rows than processes is left out. When evaluating, a process without a row left gets one that is marked by
    ``filler``, which `CausalLanguageModule` leaves out.

    Args:
        train: What to train on: the name of a built-in set (then its ``train`` split), a ``.jsonl``, ``.json`` or
            ``.csv`` file, a hub data set ``"owner/name"``, a list of `Example`, or a mixture: a list of mappings with
            the key ``source`` (any of these) and optionally

            - ``share``: the share of every batch; for all sources or for none. With shares, every batch is full and
              holds each share as closely as whole rows can. Without, the sources are joined;
            - ``weight``: how often each row counts in the loss of a batch. Shares say how much of each source is seen,
              weights what an error on it costs;
            - ``response``: one response for all rows instead of their own, or a list of some, taken in turns. Where all
              learn the same few words, what is left to learn is when to say them;
            - ``judgement``: ``safe`` or ``unsafe``: the rows become questions to a guard, in the form of the convention
              ``"instructed"``, and this is the answer it learns;
            - ``own_replies``: true to learn what the start model itself replies, instead of the responses: the rows
              that keep a model as it is. Generated when the fit is set up, `max_response_tokens` long; where the model
              refuses, the written response is learned;
            - ``unlikely``: true where the responses are what the model must not say. A refusal's first tokens, after
              prompts that only look harmful, teach when not to refuse and nothing else. `CausalLanguageModule` learns
              that (`response_loss`); a module of your own finds these labels in ``unlikely``, not in ``labels``;
            - ``max_response_tokens``: as below, for this source;
            - ``retention``: true where `CausalLanguageModule` may apply its ``retention_weight``;
            - ``split``, ``limit``, ``prompt_column``, ``response_column``: as in `load_prompts`.
        val: What to validate on, in the same form (a built-in set alone: its ``monitor`` split). Shares are not used.
        test: What ``trainer.test`` takes, in the same form (a built-in set alone: its ``test`` split).
        batch_size: Rows in a batch of one process.
        max_length: Longest row in tokens. A longer one is cut at the end, and counted in a warning; one whose prompt
            leaves no room for a response is left out, and counted in a warning.
        max_response_tokens: Train on only the first so many tokens of each response. A response that is cut has no
            end-of-turn token.
        seed: Another seed, another order.
        tokenizer: The tokenizer or its path. Default: that of the module being trained.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: A number is below 1; at `setup`, what `read_sources` and `encode_examples` refuse, among it the
            splits kept for evaluation, or other rows in other processes.

    Example:
        >>> data = InstructionDataModule(
        ...     train=[
        ...         {"source": "harmful", "share": 0.5},
        ...         {"source": "borderline", "share": 0.25, "retention": True},
        ...         {"source": "harmless", "share": 0.25, "retention": True},
        ...     ],
        ...     val="harmless",
        ...     batch_size=8,
        ... )
    """

    def __init__(
        self,
        train: Rows,
        val: Rows | None = None,
        test: Rows | None = None,
        *,
        batch_size: int = 4,
        max_length: int = 2048,
        max_response_tokens: int | None = None,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = check_positive(batch_size, "batch_size")
        self.max_length = check_positive(max_length, "max_length")
        self.max_response_tokens = (
            None if max_response_tokens is None else check_positive(max_response_tokens, "max_response_tokens")
        )
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_argument = tokenizer
        self._arguments = {"train": train, "val": val, "test": test}
        self._sources: dict[str, list[Source]] = {}
        self._rows: dict[str, list[list[TokenizedExample]]] = {}
        for name in ("val", "test"):
            if self._arguments[name] is None:
                # Lightning asks whether the hook is overridden, and warns of a loader without batches.
                setattr(self, f"{name}_dataloader", getattr(super(), f"{name}_dataloader"))
        self.save_hyperparameters(
            {
                **{name: _describe(value) for name, value in self._arguments.items()},
                "batch_size": batch_size,
                "max_length": max_length,
                "max_response_tokens": max_response_tokens,
                "seed": seed,
            }
        )

    def setup(self, stage: str | None = None) -> None:
        """Load and tokenise what `stage` needs, once.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or None for all.
        """
        with together("Reading the rows of InstructionDataModule"):
            self._read(stage)

    def _read(self, stage: str | None) -> None:
        if self.tokenizer is None:
            module = None if self.trainer is None else self.trainer.lightning_module
            self.tokenizer = find_tokenizer(self._tokenizer_argument, module=module)
        for name in self._arguments if stage is None else _STAGES[str(getattr(stage, "value", stage))]:
            if self._arguments[name] is not None and name not in self._rows:
                self._sources[name] = read_sources(self._arguments[name], name)
                self._rows[name] = [self._encode(source, train=name == "train") for source in self._sources[name]]
            if self._processes()[0] > 1 and name in self._rows:
                check_alike(self._fingerprint(name), name, "Give all processes the same files, settings and seed.")

    def _encode(self, source: Source, *, train: bool) -> list[TokenizedExample]:
        assert self.tokenizer is not None
        max_response_tokens = (source.max_response_tokens or self.max_response_tokens) if train else None
        if not source.own_replies:
            return encode_examples(
                source.examples,
                self.tokenizer,
                name=source.name,
                max_length=self.max_length,
                max_response_tokens=max_response_tokens,
            )
        if self.trainer is None or self.trainer.lightning_module is None or max_response_tokens is None:
            raise ValueError(
                f"`own_replies` of {source.name!r} expected a fit and `max_response_tokens`, the length of replies. "
                "Set it, use it in `train` only, and let the trainer set the data up."
            )
        # Lightning loads a checkpoint's weights after this, so that a resumed fit sees the start model's replies too.
        model = find_language_model(self.trainer.lightning_module)
        return encode_own_replies(
            source.examples,
            model,
            self.tokenizer,
            name=source.name,
            max_new_tokens=max_response_tokens,
            shared=self._processes()[0] > 1,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of training batches: `pad_batch` tensors.

        If any source says so, also ``retention``: bool [batch], ``weight``: float32 [batch], and ``unlikely``: int64
        [batch, length], the labels of what must not be said, which ``labels`` then leaves out.
        """
        return ResumableLoader(self._order(), self._collator("train"), find_position=self._find_position)

    def _order(self) -> BatchOrder:
        processes, process = self._processes()
        shares = [source.share for source in self._sources["train"] if source.share is not None]
        return BatchOrder(
            [[len(row.input_ids) for row in rows] for rows in self._rows["train"]],
            self.batch_size,
            seed=self.seed,
            shares=shares or None,
            processes=processes,
            process=process,
        )

    def val_dataloader(self) -> EvaluationLoader:
        """Return the loader of validation batches."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> EvaluationLoader:
        """Return the loader of test batches."""
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Return a fingerprint of what is trained on, to notice that it changed."""
        return {"train": self._fingerprint("train")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Warn if the checkpoint was made with other rows, another batch size or another seed."""
        if "train" in self._rows and state.get("train") != self._fingerprint("train"):
            warnings.warn(
                "The training data differ from those of the checkpoint (rows, tokenizer, lengths, batch size, seed, or "
                "batches of an epoch): the epoch continues after as many batches, but of another order. For the same "
                "batches as without the interruption, resume with the same data settings.",
                stacklevel=2,
            )

    def _evaluation_loader(self, name: str) -> EvaluationLoader:
        processes, process = self._processes()
        lengths = [len(row.input_ids) for rows in self._rows[name] for row in rows]
        buckets = length_buckets(lengths, self.batch_size * processes)
        return EvaluationLoader([bucket[process::processes] for bucket in buckets], self._collator(name))

    def _collator(self, name: str) -> Collator:
        assert self.tokenizer is not None
        sources = self._sources[name]
        columns: dict[str, list[Any]] = {}
        for flag in ("retention", "unlikely"):
            if any(getattr(source, flag) for source in sources):
                columns[flag] = [getattr(source, flag) for source in sources]
        if any(source.weight != 1 for source in sources) and name == "train":
            columns["weight"] = [source.weight for source in sources]
        return Collator(self._rows[name], columns, pad_token_id(self.tokenizer))

    def _find_position(self, loader: ResumableLoader) -> Position | None:
        trainer = self.trainer
        if trainer is None or not trainer.training or trainer.train_dataloader is not loader:
            # Somebody else looks at the batches: that is no epoch of the fit.
            return None
        correct_in_epoch(trainer)
        # Overfitting on a few batches means the same ones in every epoch.
        overfits: float = trainer.overfit_batches  # type: ignore[attr-defined] # set by a function of Lightning's
        epoch = 0 if overfits else trainer.current_epoch
        return Position(epoch, trainer.fit_loop.batch_idx + 1, int(trainer.num_training_batches))

    def _processes(self) -> tuple[int, int]:
        """Return how many processes see different rows, and the number of this one; others share a model."""
        found = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (1, 0) if found is None else (found["num_replicas"], found["rank"])

    def _fingerprint(self, name: str) -> str:
        batches = len(self._order()) if name == "train" and "train" in self._rows else 0
        digest = hashlib.sha256(f"{self.batch_size * self._processes()[0]} {self.seed} {batches}".encode())
        for source, rows in zip(self._sources.get(name, ()), self._rows.get(name, ()), strict=True):
            kind = " unlikely" if source.unlikely else ""
            digest.update(f"{source.share} {source.weight}{kind} {[len(row.input_ids) for row in rows]}".encode())
            digest.update(np.concatenate([row.input_ids for row in rows]).astype(np.int64).tobytes())
        return digest.hexdigest()


def _describe(value: Any) -> Any:
    """Return `value` as strings, numbers, lists and mappings: what a checkpoint and YAML can hold."""
    if isinstance(value, Mapping):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (
            f"{len(value)} examples"
            if isinstance(value[:1], list | tuple) and value and isinstance(value[0], Example)
            else [_describe(item) for item in value]
        )
    return os.fspath(value) if isinstance(value, os.PathLike) else value
