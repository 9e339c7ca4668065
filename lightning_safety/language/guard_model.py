# SPDX-License-Identifier: Apache-2.0
"""A guard model, its tokenizer, and how it is asked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_positive
from lightning_safety.language.guards import GuardConvention, answer_ids, read_convention
from lightning_safety.language.load import load_causal_lm, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GuardModel:
    """A causal language model whose next token says whether a reply is harmful.

    Args:
        model: A hub id, a folder, a GGUF, the bundled model's name, or a loaded causal language model.
        tokenizer: Needed beside a loaded model. Default: the one that lies beside the weights.
        convention: How the guard is asked: a name of `GUARD_CONVENTIONS`, or one of your own. Default: by the model's
            name. ``"instructed"`` asks a chat model that is no guard.
        max_length: Longest question in tokens. Default: what the model's positions allow.
        dtype: As for `load_causal_lm`.
        device: Where the guard runs. Default: a GPU if there is one; a loaded model stays where it is.

    Attributes:
        model: The loaded model.
        tokenizer: The guard's tokenizer.
        convention: How it is asked.
        safe: The tokens that say harmless.
        unsafe: The tokens that say harmful.
        max_length: The longest question in tokens, or None.

    Raises:
        ValueError: The guard has no chat template, no tokens for its answers, or no known convention.
        TypeError: A loaded model without a tokenizer.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        convention: GuardConvention | str | None = None,
        max_length: int | None = None,
        dtype: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if isinstance(model, nn.Module):
            if tokenizer is None or isinstance(tokenizer, str):
                raise TypeError(
                    "`tokenizer` expected to be the guard's tokenizer beside a loaded guard but got "
                    f"{type(tokenizer).__name__}. Pass it, or the guard's path as `model`."
                )
            source = str(getattr(model, "name_or_path", "") or "a loaded model")
        else:
            source = os.fspath(model)
        # Before the weights, so that what is wrong with it is said in a second.
        self.tokenizer: PreTrainedTokenizerBase = (
            load_tokenizer(tokenizer or source) if tokenizer is None or isinstance(tokenizer, str) else tokenizer
        )
        self.convention = read_convention(convention, source)
        self.safe, self.unsafe = answer_ids(self.tokenizer, self.convention)
        self.model: nn.Module = model if isinstance(model, nn.Module) else load_causal_lm(model, dtype=dtype)
        if device is not None or self.model is not model:
            self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = getattr(self.model, "config", None)
        self.max_length: int | None = (
            getattr(config, "max_position_embeddings", None)
            if max_length is None
            else check_positive(max_length, "max_length")
        )

    @property
    def device(self) -> torch.device:
        """Where the guard runs."""
        return next(self.model.parameters()).device

    def answer_margin(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Read the guard's answers from the logits [batch, vocabulary] at the position where it answers.

        Returns:
            How much likelier it says harmless than harmful, in nats, differentiable; and the probability that it gives
            any of its answers. Both float32 [batch], or float64 for float64 logits.
        """
        precise = logits if logits.dtype == torch.float64 else logits.float()
        log_probabilities = precise.log_softmax(dim=-1)
        safe = log_probabilities[:, self.safe].logsumexp(dim=-1)
        unsafe = log_probabilities[:, self.unsafe].logsumexp(dim=-1)
        return safe - unsafe, torch.logaddexp(safe, unsafe).detach().exp()
