# SPDX-License-Identifier: Apache-2.0
"""What a model refuses and answers, as a loss: which replies are kept, and how much of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightning_safety.data import Example
from lightning_safety.monitoring import OwnReplies, own_replies
from tests.tiny import make_tiny_model, make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
REFUSAL = "I'm sorry, but I can't assist with that."
REPLIES = {
    "harmful refused": REFUSAL,
    "harmful answered": "Sure, here is an overview:",
    "harmful empty": "",
    "harmless answered": "Use the task manager and end it there, then wait until it has closed and look again.",
    "harmless refused": REFUSAL,
}
HARMFUL = [Example(prompt) for prompt in REPLIES if prompt.startswith("harmful")]
BORDERLINE = [Example(prompt) for prompt in REPLIES if prompt.startswith("harmless")]


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(model: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[str]:
        assert options["max_new_tokens"] >= 12  # else a refusal cannot be told
        return [REPLIES[prompt] for prompt in prompts]

    monkeypatch.setattr(own_replies, "generate_replies", reply)


def prepared(**options: Any) -> OwnReplies:
    objective = OwnReplies(**{"harmful": HARMFUL, "borderline": BORDERLINE, **options})
    objective.prepare(make_tiny_model(), TOKENIZER)
    return objective


@pytest.mark.filterwarnings("ignore:The model refuses 1 of 3")
def test_what_it_did_right_is_kept_and_nothing_else() -> None:
    assert prepared().state_dict() == {
        "harmful": [["harmful refused", REFUSAL]],
        "borderline": [["harmless answered", REPLIES["harmless answered"]]],
    }


@pytest.mark.filterwarnings("ignore:The model refuses")
@pytest.mark.parametrize(
    ("expected", "asked"),
    [(None, (128, 256)), (3, (16, 32)), (120, (20, 40)), (10**6, (128, 256))],
)
def test_no_more_prompts_are_asked_than_a_fit_has_time_for(
    expected: int | None, asked: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def reply(model: Any, tokenizer: Any, prompts: Sequence[str], **_: Any) -> list[str]:
        counts.append(len(prompts))
        return [REFUSAL, *(["Close it."] * (len(prompts) - 1))]

    monkeypatch.setattr(own_replies, "generate_replies", reply)
    objective = OwnReplies(answers_per_refusal=2)
    objective.expect(expected)
    objective.prepare(make_tiny_model(), TOKENIZER)
    assert counts == [sum(asked)]


@pytest.mark.filterwarnings("ignore:The model refuses 1 of 3")
def test_only_the_first_tokens_of_a_reply_count() -> None:
    (batch,) = prepared(max_new_tokens=5, answers_per_refusal=1).batches(TOKENIZER, batch_size=2)
    assert (batch.tensors["labels"] != -100).sum(1).tolist() == [5, 5]
    assert TOKENIZER.decode(batch.tensors["labels"][0][batch.tensors["labels"][0] != -100])[:5] == REFUSAL[:5]


@pytest.mark.filterwarnings("ignore:The model refuses")
def test_both_kinds_are_in_every_batch_and_the_rarer_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPLIES, "harmful second", REFUSAL)
    monkeypatch.setitem(REPLIES, "harmful third", REFUSAL)
    objective = prepared(harmful=[*HARMFUL, Example("harmful second"), Example("harmful third")], answers_per_refusal=2)
    batches = objective.batches(TOKENIZER, batch_size=3)
    texts = [[TOKENIZER.decode(ids) for ids in batch.tensors["input_ids"]] for batch in batches]
    assert [batch.examples for batch in batches] == [3, 3, 3]
    assert ["harmful" in text for rows in texts for text in rows] == [True, False, False] * 3
    assert all("harmless answered" in text for rows in texts for text in rows[1:])


@pytest.mark.filterwarnings("ignore:The model refuses 1 of 3")
def test_the_loss_is_the_mean_over_examples_of_the_mean_over_their_tokens() -> None:
    model = make_tiny_model()
    objective = prepared(max_new_tokens=6, answers_per_refusal=1)
    (batch,) = objective.batches(TOKENIZER, batch_size=2)
    with torch.no_grad():
        singles = [float(objective.loss(model, one)) for one in objective.batches(TOKENIZER, batch_size=1)]
        assert float(objective.loss(model, batch)) == pytest.approx(sum(singles) / 2, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The model refuses 1 of 3")
def test_a_state_takes_the_place_of_preparing() -> None:
    objective = prepared()
    other = OwnReplies(max_new_tokens=objective.max_new_tokens)
    other.load_state_dict(objective.state_dict())
    (batch,), (again,) = (each.batches(TOKENIZER, batch_size=3) for each in (objective, other))
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in batch.tensors.items())


def test_of_much_that_is_not_kept_it_warns() -> None:
    with pytest.warns(UserWarning, match=r"The model refuses 1 of 3 harmful prompts; only these are kept so"):
        prepared()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"harmful": HARMFUL[1:]}, r"`harmful` expected prompts that the model refuses but it refuses none of 2"),
        (
            {"harmful": HARMFUL[:1], "borderline": BORDERLINE[1:]},
            r"`borderline` expected prompts that the model answers",
        ),
    ],
)
def test_a_model_without_anything_to_keep_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(**options)


@pytest.mark.parametrize("name", ["prompts", "max_new_tokens"])
def test_counts_are_at_least_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` expected to be"):
        OwnReplies(**{name: 0})


def test_its_settings_are_its_arguments_and_no_more() -> None:
    """Studies tell by them whether a cell was measured with others."""
    public = {name for name in vars(OwnReplies()) if not name.startswith("_")}
    assert public == set(inspect.signature(OwnReplies).parameters)
