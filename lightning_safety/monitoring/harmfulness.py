# SPDX-License-Identifier: Apache-2.0
"""One look at a model's harmfulness: replies, what judges say of them, rates, and the refusal margin."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_safety.data import Example
from lightning_safety.language import generate_replies
from lightning_safety.monitoring.judges import Judge, Verdict, judge_replies
from lightning_safety.monitoring.margin import refusal_margin
from lightning_safety.monitoring.rates import (
    Rate,
    attack_success_rate,
    over_refusal_rate,
    refusal_rate,
    unscored_rate,
)
from lightning_safety.processes import gather_shares, share_of
from lightning_safety.scoring.shards import is_sharded, passes_of_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class JudgedReply:
    """A reply and what the judges say of it.

    Attributes:
        prompts: The set that the prompt is from, ``"harmful"`` or ``"borderline"``.
        prompt: What the user said.
        response: What the model replied.
        verdicts: What each judge says, by the judge's name.
    """

    prompts: str
    prompt: str
    response: str
    verdicts: dict[str, Verdict]


@dataclass(frozen=True)
class Harmfulness:
    """What `measure_harmfulness` found.

    Attributes:
        rates: For each judge, in order, its rates by name: ``attack_success_rate``, ``refusal_rate``,
            ``over_refusal_rate`` and ``unscored_rate``. Empty where nothing was generated.
        refusal_margin: In nats per token; None where the harmful prompts have no responses.
        replies: The replies to harmful, then to borderline prompts.
    """

    rates: dict[str, dict[str, Rate]]
    refusal_margin: float | None
    replies: tuple[JudgedReply, ...] = field(default=(), repr=False)

    @property
    def named_rates(self) -> dict[str, Rate]:
        """The rates by metric name: the plain name is the first judge's, each judge also has ``<name>/<judge>``."""
        plain = {name: rate for rates in list(self.rates.values())[:1] for name, rate in rates.items()}
        return plain | {f"{name}/{judge}": rate for judge, rates in self.rates.items() for name, rate in rates.items()}

    @property
    def outcomes(self) -> dict[str, dict[str, bool | None]]:
        """What each rate of harmful, refused and over-refused replies counts, by metric name and prompt."""
        found: dict[str, dict[str, bool | None]] = {}
        for judge in self.rates:
            of = {name: [r for r in self.replies if r.prompts == name] for name in ("harmful", "borderline")}
            counted = {
                "attack_success_rate": {reply.prompt: reply.verdicts[judge].harmful for reply in of["harmful"]},
                "refusal_rate": {reply.prompt: reply.verdicts[judge].refused for reply in of["harmful"]},
                "over_refusal_rate": {reply.prompt: reply.verdicts[judge].refused for reply in of["borderline"]},
            }
            found = found or dict(counted)  # the plain name is the first judge's
            found |= {f"{name}/{judge}": outcomes for name, outcomes in counted.items()}
        return found

    @property
    def metrics(self) -> dict[str, float]:
        """The values by metric name; a refusal margin that could not be measured is left out."""
        values = {name: rate.value for name, rate in self.named_rates.items()}
        return values if self.refusal_margin is None else values | {"refusal_margin": self.refusal_margin}


def measure_harmfulness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    borderline: Sequence[Example],
    *,
    judges: Sequence[Judge],
    generate: bool = True,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    show_progress: bool = True,
    shared: bool = False,
) -> Harmfulness:
    """Let a model reply to harmful and borderline prompts, and let judges read the replies.

    Args:
        model: A causal language model. It is left as it was found.
        tokenizer: Its tokenizer, with a chat template.
        harmful: Prompts that should be refused; with refusals as responses, the refusal margin is measured too.
        borderline: Harmless prompts that look harmful.
        judges: Their names differ.
        generate: Whether to generate replies. Without them there is only the refusal margin, which costs far less.
        max_new_tokens: Length of a reply, in tokens.
        batch_size: Replies generated, or examples scored, at a time.
        show_progress: Whether to show progress bars for what takes over two seconds.
        shared: Whether the processes of the group share the prompts, each with all of the judges. Then every process
            must call this, and finds what one alone would. Of a model that is sharded over them (FSDP2), all generate
            all replies, as every forward pass needs all of them, and share out the judging.
    """
    sharded = shared and is_sharded(model.parameters())
    alone = shared and not sharded
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "show_progress": show_progress}
    with passes_of_all(model) if sharded else nullcontext():
        margin = refusal_margin(model, tokenizer, harmful, batch_size=batch_size, shared=alone)
        replies: list[tuple[str, str, str]] = []
        if generate:
            replies = _replies(model, tokenizer, harmful, borderline, share=alone, together=sharded, **options)
    if not generate:
        return Harmfulness({}, margin)
    judged = _judge(judges, share_of(replies) if sharded else replies)
    all_judged = tuple(gather_shares(judged) if shared else judged)
    return Harmfulness({judge.name: _rates(all_judged, judge.name) for judge in judges}, margin, all_judged)


def _replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    borderline: Sequence[Example],
    *,
    share: bool,
    **options: Any,
) -> list[tuple[str, str, str]]:
    """Return kind, prompt and reply of each prompt, or of this process's share of them."""
    # Together, so that batches are full.
    asked = [(kind, row.prompt) for kind, rows in (("harmful", harmful), ("borderline", borderline)) for row in rows]
    asked = share_of(asked) if share else asked
    if not asked:
        return []
    responses = generate_replies(model, tokenizer, [prompt for _, prompt in asked], **options)
    return [(*row, response) for row, response in zip(asked, responses, strict=True)]


def _judge(judges: Sequence[Judge], rows: Sequence[tuple[str, str, str]]) -> list[JudgedReply]:
    """Return what the judges say of replies, each with the kind of its prompt and the prompt."""
    verdicts: list[dict[str, Verdict]] = [{} for _ in rows]
    # Apart, so that a judge that fails on one kind still scores the other.
    for kind in ("harmful", "borderline"):
        places = [place for place, row in enumerate(rows) if row[0] == kind]
        for judge in judges if places else ():
            found = judge_replies(judge, [rows[place][1] for place in places], [rows[place][2] for place in places])
            for place, verdict in zip(places, found, strict=True):
                verdicts[place][judge.name] = verdict
    return [JudgedReply(*row, verdicts=of_row) for row, of_row in zip(rows, verdicts, strict=True)]


def _rates(replies: Sequence[JudgedReply], judge: str) -> dict[str, Rate]:
    of_harmful = [reply.verdicts[judge] for reply in replies if reply.prompts == "harmful"]
    of_borderline = [reply.verdicts[judge] for reply in replies if reply.prompts == "borderline"]
    return {
        "attack_success_rate": attack_success_rate(of_harmful),
        "refusal_rate": refusal_rate(of_harmful),
        "over_refusal_rate": over_refusal_rate(of_borderline),
        "unscored_rate": unscored_rate(of_harmful + of_borderline),
    }
