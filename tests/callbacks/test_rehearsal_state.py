# SPDX-License-Identifier: Apache-2.0
"""What is asked before a fit, and what a checkpoint keeps of it: the trained model must not be asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import SingleDeviceStrategy

from lightning_safety.callbacks import SafetyRehearsal
from lightning_safety.callbacks.rehearsal_need import RehearsalNeed
from lightning_safety.monitoring import own_replies
from tests.callbacks.toys import OwnModule, fit, make_smallest_model
from tests.enforcement.objectives import TokenRows
from tests.tiny import make_tiny_tokenizer

REFUSAL = "I'm sorry, but I can't assist with that."
ADAPTIVE = {"every": "adaptive", "watch_every_n_steps": 2, "watch_prompts": 2}


def reply(*arguments: Any, **_: Any) -> list[str]:
    """Refuse every other prompt, so that there are refusals and answers among any of them."""
    return [REFUSAL if place % 2 else "Open the settings." for place in range(len(arguments[2]))]


def refuse_to_reply(*_: Any, **__: Any) -> list[str]:
    raise AssertionError("the trained model was asked")


def make_module() -> OwnModule:
    return OwnModule(make_smallest_model(vocab_size=512, max_position_embeddings=256))


def rehearsal(**options: Any) -> SafetyRehearsal:
    objective = own_replies.OwnReplies(prompts=4, answers_per_refusal=1)
    settings = {"every": 2, "objective": objective, "tokenizer": make_tiny_tokenizer(), **options}
    return SafetyRehearsal(**settings)


def checkpoint_of(folder: Path, *callbacks: Any) -> Path:
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(make_module(), [saver, *callbacks], steps=4)
    return folder / "step=2.ckpt"


@pytest.mark.filterwarnings("ignore:.*cannot continue in the middle of an epoch")
@pytest.mark.parametrize("late", [False, True], ids=["restored at once", "restored late"])
@pytest.mark.parametrize("options", [{}, ADAPTIVE], ids=["every", "adaptive"])
def test_a_resumed_fit_rehearses_what_the_model_said_before_it_trained(
    options: dict[str, Any], late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights are restored after the fit began (FSDP2), those before are not asked."""
    monkeypatch.setattr(own_replies, "generate_replies", reply)
    first = rehearsal(**options)
    path = checkpoint_of(tmp_path, first)
    monkeypatch.setattr(own_replies, "generate_replies", refuse_to_reply)
    monkeypatch.setattr(SingleDeviceStrategy, "restore_checkpoint_after_setup", late)
    again = rehearsal(**options)
    fit(make_module(), [again], steps=4, max_epochs=2, ckpt_path=path)
    assert again.rehearsal.objective.state_dict() == first.rehearsal.objective.state_dict()
    assert again.rehearsal.objective.state_dict()["harmful"][0][1] == REFUSAL
    if again.need is not None and first.need is not None:
        found, expected = again.need.state_dict(), first.need.state_dict()
        assert found is not None
        assert expected is not None
        assert (found["refusals"], found["start"]) == (expected["refusals"], expected["start"])


@pytest.mark.filterwarnings("ignore:.*cannot continue in the middle of an epoch")
def test_without_its_state_a_resumed_fit_says_that_the_trained_model_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_replies, "generate_replies", reply)
    path = checkpoint_of(tmp_path)
    with pytest.warns(UserWarning, match=r"no state of SafetyRehearsal for OwnReplies: what is rehearsed is what"):
        fit(make_module(), [rehearsal()], steps=4, max_epochs=2, ckpt_path=path)


@pytest.mark.filterwarnings("ignore:.*cannot continue in the middle of an epoch")
def test_an_adaptive_rehearsal_says_that_the_checkpoint_is_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_replies, "generate_replies", reply)
    path = checkpoint_of(tmp_path, rehearsal())
    with pytest.warns(UserWarning, match=r"checkpoint has nothing of an adaptive SafetyRehearsal: the model is kept"):
        fit(make_module(), [rehearsal(**ADAPTIVE)], steps=4, max_epochs=2, ckpt_path=path)


def test_a_state_from_before_the_first_look_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's learning rate finder saves such a one and puts it back."""
    monkeypatch.setattr(own_replies, "generate_replies", reply)
    callback = rehearsal(**ADAPTIVE)
    saved = callback.state_dict()
    assert saved["need"] is None

    class PutBack(SafetyRehearsal):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            self.load_state_dict(saved)

    callback.__class__ = PutBack
    fit(make_module(), [callback], steps=4)
    assert "safety/rehearsal_likelihood" in callback.metrics


def test_the_model_replies_in_the_precision_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def reply_and_tell(*arguments: Any, **_: Any) -> list[str]:
        heard.append(torch.is_autocast_enabled("cpu"))
        # Each weight is cast once, and not for every token.
        assert torch.is_autocast_cache_enabled()
        return reply(*arguments)

    monkeypatch.setattr(own_replies, "generate_replies", reply_and_tell)
    for precision in ("32-true", "bf16-mixed"):
        fit(make_module(), [rehearsal(**ADAPTIVE)], steps=1, precision=precision)
    # What is watched is asked along with what is rehearsed.
    assert heard == [False, True]


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"State of SafetyRehearsal expected to be version 1 but got 7"):
        rehearsal().load_state_dict({"version": 7})


@pytest.mark.parametrize(("every", "max_steps", "examples"), [(1, 5, 10), (2, 5, 6), ("adaptive", 9, 4), (2, -1, None)])
def test_the_objective_hears_how_many_examples_the_fit_has_time_for(
    every: Any, max_steps: int, examples: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int | None] = []

    class Hears(TokenRows):
        def expect(self, examples: int | None) -> None:
            heard.append(examples)

        def prepare(self, model: Any, tokenizer: Any) -> None:
            heard.append(-1)

    monkeypatch.setattr(RehearsalNeed, "begin", lambda *_: None)
    monkeypatch.setattr(RehearsalNeed, "looks_before_step_of", lambda *_: False)
    callback = SafetyRehearsal(every, objective=Hears(), batch_size=2, tokenizer=make_tiny_tokenizer())
    fit(OwnModule(make_smallest_model()), [callback], steps=15, accumulate_grad_batches=3, max_steps=max_steps)
    assert heard == [examples, -1]
