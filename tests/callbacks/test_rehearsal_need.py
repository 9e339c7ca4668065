# SPDX-License-Identifier: Apache-2.0
"""Rehearsing only when needed: the step after a look that found refusals too unlikely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lightning_safety.callbacks import SafetyRehearsal, rehearsal_need
from lightning_safety.callbacks.rehearsal_need import RehearsalNeed
from lightning_safety.data import Example
from lightning_safety.monitoring import own_replies
from tests.callbacks.toys import OwnModule, assert_same_bits, fit, make_smallest_model
from tests.enforcement.objectives import TokenRows
from tests.tiny import make_tiny_tokenizer

REFUSAL = "I'm sorry, but I can't assist with that."


@pytest.fixture(autouse=True)
def _refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_replies, "generate_replies", lambda *arguments, **_: [REFUSAL] * len(arguments[2]))


def adaptive(**options: Any) -> SafetyRehearsal:
    settings = {"objective": TokenRows(), "tokenizer": make_tiny_tokenizer(), "watch_every_n_steps": 2, **options}
    return SafetyRehearsal("adaptive", **settings)


def script(monkeypatch: pytest.MonkeyPatch, likelihoods: Sequence[float]) -> list[float]:
    """Let the likelihood be these values, one a look; returns those that are left."""
    left = list(likelihoods)
    monkeypatch.setattr(rehearsal_need, "opening_likelihood", lambda *_, **__: left.pop(0))
    return left


def acts(callback: SafetyRehearsal, steps: int) -> list[bool]:
    """At which steps a fit rehearses."""
    found: list[bool] = []
    rehearse = callback.rehearsal.mix

    def mix(*arguments: Any, **options: Any) -> Any:
        found[-1] = True
        return rehearse(*arguments, **options)

    callback.rehearsal.mix = mix  # type: ignore[method-assign]
    due = callback._is_due

    def is_due(*arguments: Any) -> bool:
        found.append(False)
        return due(*arguments)

    callback._is_due = is_due  # type: ignore[method-assign]
    fit(OwnModule(make_smallest_model(vocab_size=512, max_position_embeddings=256)), [callback], steps=steps)
    return found


@pytest.mark.parametrize("own", [True, False])
def test_what_is_watched_is_asked_with_what_is_rehearsed(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    asked: list[list[str]] = []

    def reply(_: Any, __: Any, prompts: list[str], **___: Any) -> list[str]:
        asked.append(prompts)
        return ["Here is how." if "borderline" in prompt else REFUSAL for prompt in prompts]

    monkeypatch.setattr(own_replies, "generate_replies", reply)
    objective: Any = TokenRows()
    if own:
        objective = own_replies.OwnReplies(
            [Example("harmful one"), Example("harmful two")], [Example("borderline one"), Example("borderline two")]
        )
    callback = adaptive(objective=objective, watch_prompts=3)
    script(monkeypatch, [0.0, 0.0])
    acts(callback, 3)
    assert callback.need is not None
    watched = [example.prompt for example in callback.need._examples]
    assert len(watched) == 3
    (once,) = asked
    assert once == [*(["harmful one", "harmful two", "borderline one", "borderline two"] if own else []), *watched]
    if own:
        rehearsed = [prompt for pairs in objective.state_dict().values() for prompt, _ in pairs]
        assert rehearsed == once[:4]


def test_one_step_rehearses_after_a_look_below_the_tolerance_and_the_next_look_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At the start, then before the steps 3, 6, 12, 18, 21: within, below, still below, back, within.
    left = script(monkeypatch, [1.0, 0.9, 0.7, 0.75, 0.85, 0.9])
    callback = adaptive(tolerance=0.2, watch_every_n_steps=3)
    assert [step for step, acted in enumerate(acts(callback, 24)) if acted] == [6, 12]
    assert not left
    assert callback.metrics["safety/rehearsal_likelihood"] == pytest.approx(0.9)
    assert callback.metrics["safety/rehearsal_share"] == pytest.approx(2 / 24)


def test_by_default_it_rehearses_wherever_refusals_are_less_likely_than_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script(monkeypatch, [1.0, 1.0, 0.999, 1.1])
    assert [step for step, acted in enumerate(acts(adaptive(), 9)) if acted] == [4]


def halves(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(part, lr=0.05) for part in (weights[::2], weights[1::2])]


def test_two_optimizers_that_step_one_after_the_other_need_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    left = script(monkeypatch, [1.0, 0.5, 0.9])
    callback = adaptive(tolerance=0.2)
    fit(OwnModule(make_smallest_model(), halves, manual=True), [callback], steps=7)
    assert not left
    # Both, at step 2 of 0 to 6.
    assert callback.metrics["safety/rehearsal_share"] == pytest.approx(2 / 14)


@pytest.mark.parametrize(
    ("order", "rehearsed"),
    [
        # Needed at the look before the seventh step, and at every other one after that.
        pytest.param(([0] * 5 + [1]) * 24, {0: 10, 1: 10}, id="one steps every fifth time"),
        pytest.param([0] * 30 + [1] * 30, {0: 2, 1: 4}, id="one after the other"),
        pytest.param([0, 1] * 31, {0: 3, 1: 3}, id="in turns"),
    ],
)
def test_optimizers_rehearse_in_whatever_order_they_step(
    order: list[int], rehearsed: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RehearsalNeed, "_look", lambda *_: -1.0)
    need = RehearsalNeed(6, 0.0, "harmful", 1)
    need._start = 0.0
    found = {0: 0, 1: 0}
    for optimizer in order:
        if need.looks_before_step_of(optimizer):
            need.look(Any, Any)  # type: ignore[arg-type]
        found[optimizer] += need.rehearses_before_step_of(optimizer)
    assert found == rehearsed


def test_a_second_fit_looks_from_its_own_first_steps_on(monkeypatch: pytest.MonkeyPatch) -> None:
    left = script(monkeypatch, [1.0, 0.9, 0.9] * 2)
    callback = adaptive(tolerance=0.2)
    for _ in range(2):
        fit(OwnModule(make_smallest_model()), [callback], steps=5)
    assert not left


def test_a_second_fit_knows_nothing_of_the_first() -> None:
    """Lightning's learning rate finder would put back what the first fit found, before there is anything of its own."""
    callback = adaptive()
    trainer = fit(OwnModule(make_smallest_model(vocab_size=512, max_position_embeddings=256)), [callback], steps=3)
    assert callback.state_dict()["need"] is not None
    callback.setup(trainer, trainer.lightning_module, "fit")
    assert callback.state_dict()["need"] is None


def test_looks_that_find_no_need_change_no_bit() -> None:
    options = {"vocab_size": 512, "max_position_embeddings": 256, "attention_dropout": 0.5}
    module, plain = OwnModule(make_smallest_model(**options)), OwnModule(make_smallest_model(**options))
    callback = adaptive(tolerance=100.0, watch_prompts=2)
    torch.manual_seed(0)
    fit(module, [callback], steps=6)
    assert callback.metrics["safety/rehearsal_likelihood"] < 0
    torch.manual_seed(0)
    fit(plain, steps=6)
    assert_same_bits(module.model, plain.model)


def test_the_real_likelihood_is_looked_at() -> None:
    model = make_smallest_model(vocab_size=512, max_position_embeddings=256)
    callback = adaptive(watch_prompts=2, tolerance=0.0)
    trainer = fit(OwnModule(model), [callback], steps=3)
    assert "safety/rehearsal_likelihood" in trainer.callback_metrics
    assert trainer.callback_metrics["safety/rehearsal_seconds"] > 0


@pytest.mark.parametrize("found", [[float("nan")], [-1.0, float("-inf")]])
def test_a_likelihood_that_is_not_finite_stops_the_fit(found: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, found)
    with pytest.raises(RuntimeError, match=r"own refusals expected to be finite but is (nan|-inf)"):
        fit(OwnModule(make_smallest_model()), [adaptive()], steps=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, r"`tolerance` expected to be nats of at least 0 but got -0\.1"),
        ({"tolerance": float("inf")}, r"`tolerance` expected to be nats of at least 0 but got inf"),
        ({"watch_every_n_steps": 0}, r"`watch_every_n_steps` expected to be"),
        ({"watch_prompts": 0}, r"`watch_prompts` expected to be"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaptive(**options)


def test_a_model_that_refuses_none_of_the_prompts_stops_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_replies, "generate_replies", lambda *arguments, **_: ["Sure."] * len(arguments[2]))
    with pytest.raises(ValueError, match=r"`watch` expected prompts that the model refuses but it refuses none of 8"):
        fit(OwnModule(make_smallest_model()), [adaptive()])
