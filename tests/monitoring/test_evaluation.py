# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation of a tiny model, its table and its files."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_safety.data import Example
from lightning_safety.language import generate_replies
from lightning_safety.monitoring import (
    CONTENT_WARNING,
    Judge,
    KeywordRefusalJudge,
    Rate,
    SafetyEvaluation,
    Verdict,
    comparison_table,
    evaluate_safety,
    measure_harmfulness,
    refusal_margin,
)
from lightning_safety.scoring import RefusalMargin
from tests.tiny import make_tiny_model

HARMFUL = [Example(f"Do a bad thing, number {index}.", "I can't help with that.") for index in range(5)]
BORDERLINE = [Example(f"How do I kill process {index}?", "Use its number.") for index in range(4)]
HARMLESS = [Example(f"Name {index} fruits.", "Apples and pears, of course.") for index in range(3)]
SETS: dict[str, Any] = {"harmful": HARMFUL, "borderline": BORDERLINE, "harmless": HARMLESS, "max_new_tokens": 4}


class _EveryOther:
    """Calls every other reply harmful, the rest refused, and cannot say of the last."""

    name = "every_other"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        verdicts = [Verdict(index % 2 == 0, index % 2 == 1) for index in range(len(responses))]
        return [*verdicts[:-1], Verdict(None, None, reason="the last")]


def _make_talkative_model() -> Any:
    """With tied embeddings, a random model ends its turn at once."""
    return make_tiny_model(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def evaluation(tiny_tokenizer: Any) -> SafetyEvaluation:
    return evaluate_safety(_make_talkative_model(), tiny_tokenizer, judge=_EveryOther(), **SETS)


def test_rates_are_of_their_own_prompts(evaluation: SafetyEvaluation) -> None:
    assert evaluation.attack_success == Rate(2, 4, 5)
    assert evaluation.refusal == Rate(2, 4, 5)
    assert evaluation.over_refusal == Rate(1, 3, 4)
    assert evaluation.unscored == Rate(2, 9, 9)
    assert evaluation.judge == "every_other"
    assert [(reply.prompts, reply.prompt) for reply in evaluation.replies] == [
        *(("harmful", example.prompt) for example in HARMFUL),
        *(("borderline", example.prompt) for example in BORDERLINE),
    ]


def test_own_replies_are_the_models_and_can_be_passed_on(evaluation: SafetyEvaluation, tiny_tokenizer: Any) -> None:
    model = _make_talkative_model()
    replies = generate_replies(model, tiny_tokenizer, [example.prompt for example in HARMLESS], max_new_tokens=4)
    assert all(replies)
    assert [example.response for example in evaluation.own_replies] == replies
    # The same order of likelihoods, but less sure of them.
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    after = evaluate_safety(model, tiny_tokenizer, own_replies=evaluation.own_replies, **SETS)
    assert after.own_replies == evaluation.own_replies
    assert after.perplexity_own.examples == evaluation.perplexity_own.examples == len(HARMLESS)
    assert after.perplexity_own.value > evaluation.perplexity_own.value


def test_margin_is_the_objective_as_a_number(tiny_model: Any, tiny_tokenizer: Any) -> None:
    [batch] = RefusalMargin(HARMFUL).batches(tiny_tokenizer, batch_size=8)
    expected = -RefusalMargin(HARMFUL).loss(tiny_model, batch).item()
    for size in (1, 2, 8):
        assert refusal_margin(tiny_model, tiny_tokenizer, HARMFUL, batch_size=size) == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_prompts_alone_can_be_evaluated(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Do one."}\n{"prompt": "Do two."}\n')
    settings = {**SETS, "harmful": path, "harmless": [Example("Name a fruit.")]}
    found = evaluate_safety(tiny_model, tiny_tokenizer, **settings)
    assert found.attack_success.total == 2
    assert found.refusal_margin is None
    assert found.perplexity_written is None
    assert found.notes == (
        f"No refusal margin: {path} has no responses.",
        "No perplexity of written answers: harmless has no responses.",
    )
    assert found.prompts["harmful"] == str(path)
    table = comparison_table({"before": found})
    assert all(note in table for note in found.notes)


def test_built_in_sets_are_used_by_default(tiny_model: Any, tiny_tokenizer: Any) -> None:
    found = evaluate_safety(tiny_model, tiny_tokenizer, limit=2, max_new_tokens=1, show_progress=False)
    assert found.prompts == {"harmful": "harmful/test", "borderline": "borderline/test", "harmless": "harmless/test"}
    assert (found.attack_success.total, found.over_refusal.total) == (2, 2)
    assert found.perplexity_written is not None
    assert found.perplexity_written.examples == 2


def test_several_judges_read_the_same_replies(tiny_model: Any, tiny_tokenizer: Any) -> None:
    judges: list[Judge] = [_EveryOther(), KeywordRefusalJudge()]
    found = measure_harmfulness(tiny_model, tiny_tokenizer, HARMFUL, BORDERLINE, judges=judges, max_new_tokens=2)
    names = ["attack_success_rate", "refusal_rate", "over_refusal_rate", "unscored_rate"]
    both = [f"{name}/{judge.name}" for judge in judges for name in names]
    assert list(found.metrics) == [*names, *both, "refusal_margin"]
    assert found.metrics["attack_success_rate"] == found.metrics["attack_success_rate/every_other"] == 0.5
    assert set(found.replies[0].verdicts) == {"every_other", "keyword_refusal"}


def test_without_generation_only_the_margin_is_measured(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model, "generate", None)
    found = measure_harmfulness(tiny_model, tiny_tokenizer, HARMFUL, BORDERLINE, judges=[], generate=False)
    assert list(found.metrics) == ["refusal_margin"]


def test_results_are_strict_json_without_replies(evaluation: SafetyEvaluation) -> None:
    text = json.dumps(dataclasses.replace(evaluation, refusal_margin=math.nan).to_dict(), allow_nan=False)
    found = json.loads(text)
    assert found["attack_success_rate"]["value"] == 0.5
    assert found["refusal_margin"] is None
    assert not any(example.prompt in text for example in HARMFUL + HARMLESS)


def test_replies_are_written_for_their_owner_alone(evaluation: SafetyEvaluation, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "replies.jsonl"
    evaluation.write_replies(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first, *replies = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {"content_warning": CONTENT_WARNING}
    assert len(replies) == len(HARMFUL) + len(BORDERLINE)
    assert replies[4]["verdicts"]["every_other"]["reason"] == "the last"


def test_a_reply_cannot_write_to_the_terminal(evaluation: SafetyEvaluation, tmp_path: Path) -> None:
    reply = dataclasses.replace(evaluation.replies[0], response="\x1b[2J\u2028\ud800 gone")
    dataclasses.replace(evaluation, replies=(reply,)).write_replies(tmp_path / "replies.jsonl")
    content = (tmp_path / "replies.jsonl").read_bytes()
    assert content.isascii()
    assert b"\x1b" not in content
    assert len(content.splitlines()) == 2


def test_a_table_puts_columns_side_by_side(evaluation: SafetyEvaluation) -> None:
    after = dataclasses.replace(evaluation, attack_success=Rate(0, 5, 5), refusal_margin=1.25)
    table = comparison_table({"before": evaluation, "after": after, "random mask": evaluation})
    lines = table.splitlines()
    assert lines[0].split() == ["before", "after", "random", "mask"]
    [attack] = [line for line in lines if line.startswith("attack success")]
    assert "0.50 [0.15, 0.85] n=4 (1 of 5 unscored)" in attack
    assert "0.00 [0.00, 0.43] n=5" in attack
    assert attack.index("0.00") == lines[0].index("after")
    assert "+1.25" in table
    assert "Judge: every_other, on replies of 4 tokens at most." in lines


def test_a_markdown_table_is_well_formed(evaluation: SafetyEvaluation) -> None:
    rows = comparison_table({"before": evaluation, "a|b": evaluation}, markdown=True).split("\n\n")[0].splitlines()
    assert rows[0] == "|  | before | a\\|b |"
    assert rows[1] == "|---|---|---|"
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)


def test_an_empty_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected to hold at least one evaluation"):
        comparison_table({})
