# SPDX-License-Identifier: Apache-2.0
"""Answers are found where models of this size put them, and nowhere else."""

from __future__ import annotations

import sys

import pytest

from lightning_safety.data import Example
from lightning_safety.monitoring import exact_match
from lightning_safety.monitoring.exact_match import answer_in
from tests.tiny import make_tiny_model


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("11", "11"),
        ("6 + 5 = 11\n\nThis is an identity that has 2 sides.", "11"),
        ("The answer is: **11**.", "11"),
        ('It is "B."', "b"),
        ("Eleven!", "eleven"),
        ("3.5 is not whole", "whole"),
        ("", ""),
        ("…", ""),
    ],
)
def test_the_last_word_of_the_first_sentence_is_the_answer(reply, answer):
    assert answer_in(reply) == answer


def test_right_answers_are_counted(monkeypatch, tiny_tokenizer):
    replies = ["The sum is 11.", "12", "The letter H", ""]
    # By its full name: the package has a function of the module's name.
    module = sys.modules["lightning_safety.monitoring.exact_match"]
    monkeypatch.setattr(module, "generate_replies", lambda *_, **__: replies)
    tasks = [Example("a", "11"), Example("b", "11"), Example("c", "h"), Example("d", "h")]
    rate = exact_match(make_tiny_model(), tiny_tokenizer, tasks)
    assert (rate.successes, rate.scored, rate.total) == (2, 4, 4)
