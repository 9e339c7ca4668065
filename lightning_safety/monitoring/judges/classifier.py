# SPDX-License-Identifier: Apache-2.0
"""A sequence-classification model as a judge: what its labels mean is said by the user, never guessed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_fraction, check_positive, closest
from lightning_safety.language import load_tokenizer
from lightning_safety.language.chat import encode_example
from lightning_safety.language.load import load_sequence_classifier
from lightning_safety.language.template import chat_frame
from lightning_safety.monitoring.judges.batches import judge_in_batches
from lightning_safety.monitoring.judges.protocol import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["pair", "reply", "chat"]


class ClassifierJudge:
    """Reads a verdict off the labels of a sequence-classification model, such as a toxicity or a refusal classifier.

    At least one of `harmful` and `refused` says which labels mean what. With `refused` alone this is a judge that sees
    refusals only: harmful = not refused. The score is the probability of the harmful labels, or of the refusing ones.
    A reply is not scored, and so never safe, if it is empty or only repeats itself, or if it is too long for the model:
    nothing is cut off unseen. Special tokens in prompt and reply are plain text.

    Args:
        model: A hub id, a folder, or a loaded sequence-classification model.
        tokenizer: Needed beside a loaded model. Default: the one that lies beside the weights.
        harmful: The labels, as the model's configuration names them, that mean a harmful reply.
        refused: The labels that mean a refusal.
        form: What the model reads. ``"pair"``: prompt and reply as two texts. ``"reply"``: the reply alone.
            ``"chat"``: both by the tokenizer's chat template.
        exclusive: Whether just one label holds: then they share one probability, and those of several labels add up;
            otherwise each has its own, and the largest counts. Default: what the model's ``problem_type`` says, and
            True where it says nothing.
        threshold: A label holds from this probability on.
        batch_size: Replies judged at a time.
        max_length: Longest text in tokens. Default: what the model's positions allow.
        dtype: As for `load_causal_lm`.
        device: Where the model runs. Default: a GPU if there is one; a loaded model stays where it is.
        name: In metric names. Default: ``"classifier"``, or ``"refusal_label"`` for a judge that sees refusals only.

    Raises:
        ValueError: Neither `harmful` nor `refused` is given, a label is not one of the model's (the message lists
            them), or the model has a single output.
        TypeError: A loaded model without a tokenizer.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        harmful: Sequence[str] | str = (),
        refused: Sequence[str] | str = (),
        form: Form = "pair",
        exclusive: bool | None = None,
        threshold: float = 0.5,
        batch_size: int = 16,
        max_length: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        name: str | None = None,
    ) -> None:
        if form not in get_args(Form):
            raise ValueError(
                f"`form` expected to be one of {', '.join(get_args(Form))} but got {form!r}. "
                f"{closest(str(form), get_args(Form))}"
            )
        self.form = form
        self.threshold = check_fraction(threshold, "threshold")
        self.batch_size = check_positive(batch_size, "batch_size")
        if isinstance(model, nn.Module):
            if tokenizer is None or isinstance(tokenizer, str):
                raise TypeError(
                    "`tokenizer` expected to be the model's tokenizer beside a loaded model but got "
                    f"{type(tokenizer).__name__}. Pass it, or the model's path as `model`."
                )
            self.tokenizer, self.model = tokenizer, model
        else:
            self.tokenizer = tokenizer or load_tokenizer(model)
            loaded = load_sequence_classifier(model, dtype=dtype)
            loaded.config.pad_token_id = self.tokenizer.pad_token_id
            self.model = loaded
        if form == "chat":
            chat_frame(self.tokenizer, turns=2)  # raises where there is no chat template
        if device is not None or self.model is not model:
            self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config: Any = self.model.config
        labels = {str(label): int(number) for number, label in config.id2label.items()}
        self._harmful = _label_numbers(labels, harmful, "harmful")
        self._refused = _label_numbers(labels, refused, "refused")
        if not self._harmful and not self._refused:
            raise ValueError(
                "`harmful` or `refused` expected to name the labels that mean so but neither does. The model's labels "
                f"are {', '.join(labels)}."
            )
        if len(labels) < 2:
            raise ValueError(
                f"`model` expected to have at least two labels but has {len(labels)}: a single output has no scale of "
                "its own. Wrap the model in a function with a threshold, and pass that as the judge."
            )
        if set(self._harmful) & set(self._refused):
            raise ValueError("`harmful` and `refused` expected to name different labels but share one.")
        self._exclusive = _are_exclusive(config.problem_type) if exclusive is None else exclusive
        _check_padding(self.model, self.tokenizer)
        self.name = name or ("classifier" if self._harmful else "refusal_label")
        self.max_length = (
            _positions(self.model, self.tokenizer) if max_length is None else check_positive(max_length, "max_length")
        )

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict for each reply."""
        return judge_in_batches(
            self.model,
            "classifier",
            prompts,
            responses,
            encode=self._encode,
            tokens=lambda row: len(row["input_ids"]),
            judge=self._judge,
            longest=self.max_length,
            batch_size=self.batch_size,
        )

    def _encode(self, prompt: str, response: str) -> dict[str, list[int]]:
        if self.form == "chat":
            tokens = encode_example(self.tokenizer, prompt, response).input_ids
            return {"input_ids": tokens, "attention_mask": [1] * len(tokens)}
        texts = (response,) if self.form == "reply" else (prompt, response)
        return dict(self.tokenizer(*texts, split_special_tokens=True, verbose=False))

    def _judge(self, rows: Sequence[dict[str, list[int]]]) -> list[Verdict]:
        batch = self.tokenizer.pad({key: [row[key] for row in rows] for key in rows[0]}, return_tensors="pt")
        logits: Tensor = self.model(**batch.to(next(self.model.parameters()).device)).logits.double().cpu()
        return [self._read(row) for row in (logits.softmax(dim=-1) if self._exclusive else logits.sigmoid())]

    def _read(self, probabilities: Tensor) -> Verdict:
        if not bool(probabilities.isfinite().all()):
            return Verdict(None, None, reason="the classifier's output is not finite")
        harm, refusal = self._probability(probabilities, self._harmful), self._probability(probabilities, self._refused)
        refused = None if refusal is None else refusal >= self.threshold
        if harm is None:
            return Verdict(not refused, refused, refusal, f"refusal label: {refusal:.2f}")
        return Verdict(harm >= self.threshold, refused, harm, f"harmful label: {harm:.2f}")

    def _probability(self, probabilities: Tensor, labels: Sequence[int]) -> float | None:
        if not labels:
            return None
        chosen = probabilities[list(labels)]
        return float(chosen.sum() if self._exclusive else chosen.max())


def _label_numbers(labels: dict[str, int], names: Sequence[str] | str, argument: str) -> list[int]:
    wanted = [names] if isinstance(names, str) else list(names)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"`{argument}` expected to name each label once but got {', '.join(wanted)}.")
    for name in wanted:
        if name not in labels:
            raise ValueError(
                f"`{argument}` expected to hold labels of the model ({', '.join(labels)}) but got {name!r}. "
                f"{closest(str(name), labels)}"
            )
    return [labels[name] for name in wanted]


def _are_exclusive(problem_type: str | None) -> bool:
    if problem_type == "regression":
        raise ValueError(
            "`model` expected to be a classifier but its `problem_type` is regression: its outputs are no "
            "probabilities. Wrap the model in a function with a threshold, and pass that as the judge."
        )
    return problem_type != "multi_label_classification"


def _check_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where a row would be read at another place because it is padded."""
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "`tokenizer` expected to have a padding token but has none. Set one that no text holds, for instance "
            "`tokenizer.pad_token = tokenizer.eos_token`."
        )
    config: Any = model.config
    # Causal classifiers (their head is called `score`) look for the last token that is no padding.
    if hasattr(model, "score") and config.pad_token_id != tokenizer.pad_token_id:
        raise ValueError(
            f"`model.config.pad_token_id` expected to be the tokenizer's {tokenizer.pad_token_id} but is "
            f"{config.pad_token_id}: the model would read padded rows at the wrong token. Set it."
        )


def _positions(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return how many tokens the model takes, or None where it does not say."""
    config: Any = model.config
    limits = [int(tokenizer.model_max_length)]
    if getattr(config, "max_position_embeddings", None) is not None:
        # Some count positions from behind the padding token's.
        offsets = [
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        ]
        limits.append(config.max_position_embeddings - max(offsets, default=0))
    # A tokenizer without a limit says 1e30.
    shortest = min(limits)
    return shortest if shortest < sys.maxsize else None
