# SPDX-License-Identifier: Apache-2.0
"""What both callbacks refuse at the start of a fit, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from transformers import PreTrainedTokenizerFast

from lightning_safety.callbacks import (
    ActivationOverlapMonitor,
    HarmfulnessMonitor,
    SafetyBudget,
    SafetyEnhancementTuning,
    SafetyPreservingAdaptation,
    SafetyRehearsal,
    SubspaceOverlapMonitor,
)
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.scoring import (
    RefusalMargin,
    SafetyMask,
)
from tests.callbacks.toys import (
    BOTH,
    OwnModule,
    fit,
    make_smallest_model,
    mask_of_everything,
    refuse,
)
from tests.tiny import make_tiny_model

EVERY_CALLBACK: list[Callable[[], pl.Callback]] = [
    partial(SafetyPreservingAdaptation, mask=mask_of_everything(make_smallest_model())),
    partial(SafetyEnhancementTuning, mask=mask_of_everything(make_smallest_model())),
    SafetyRehearsal,
    HarmfulnessMonitor,
    SubspaceOverlapMonitor,
    ActivationOverlapMonitor,
    SafetyBudget,
]


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fraction": 0}, ValueError, r"`fraction` expected to be in \(0, 1\] but got 0"),
        ({"fraction": 5}, ValueError, r"pass `fraction=0\.05`"),
        ({"fraction": float("nan")}, ValueError, "`fraction` expected"),
        ({"method": "topp"}, ValueError, "Did you mean `top`"),
        ({"batch_size": 0}, ValueError, "`batch_size` expected"),
        ({"mask": 0.01}, TypeError, "`mask` expected to be a SafetyMask or the path of one but got float"),
        ({"objective": RefusalMargin}, TypeError, "`objective` expected to be a SafetyObjective"),
    ],
)
def test_bad_arguments(
    kind: type[SelectedWeightsCallback], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**arguments)


@BOTH
def test_mask_of_another_model(kind: type[SelectedWeightsCallback]) -> None:
    other = mask_of_everything(make_smallest_model(hidden_size=32))
    refuse(OwnModule(make_smallest_model()), [kind(mask=other)], "expected to fit the model")


@BOTH
def test_missing_and_damaged_mask_files(kind: type[SelectedWeightsCallback], tmp_path: Path) -> None:
    refuse(OwnModule(make_smallest_model()), [kind(mask=tmp_path / "no")], "there is none", FileNotFoundError)
    mask_of_everything(make_smallest_model()).save(tmp_path / "mask")
    (tmp_path / "mask").write_bytes((tmp_path / "mask").read_bytes()[:-7])
    refuse(OwnModule(make_smallest_model()), [kind(mask=tmp_path / "mask")], "truncated")


@BOTH
def test_empty_mask(kind: type[SelectedWeightsCallback]) -> None:
    empty = SafetyMask({"lm_head.weight": torch.tensor([], dtype=torch.int32)}, {"lm_head.weight": (40, 16)})
    refuse(OwnModule(make_smallest_model(tie_word_embeddings=False)), [kind(mask=empty)], "it selects none")


@BOTH
def test_no_tokenizer(kind: type[SelectedWeightsCallback]) -> None:
    refuse(OwnModule(make_smallest_model()), [kind()], "Pass `tokenizer=`")


@BOTH
def test_tokenizer_without_chat_template(
    kind: type[SelectedWeightsCallback], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    refuse(OwnModule(make_tiny_model()), [kind(tokenizer=plain)], "chat template")


@BOTH
def test_loss_that_is_not_finite_while_scoring(
    kind: type[SelectedWeightsCallback], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    callback = kind(objective=RefusalMargin(limit=2), tokenizer=tiny_tokenizer)
    refuse(OwnModule(model), [callback], "not finite|loss of `objective` is", RuntimeError)


@BOTH
def test_all_weights_frozen(kind: type[SelectedWeightsCallback]) -> None:
    class Frozen(OwnModule):
        def configure_optimizers(self) -> Any:
            return self.make_optimizers(list(self.parameters()))

    model = make_smallest_model()
    module = Frozen(model.requires_grad_(False))
    # Frozen weights of linear layers can train: tests/callbacks/test_sparse_delta.py.
    message = "are frozen .* nothing that could change" if kind.trains is False else "weights of linear layers where"
    with pytest.raises(ValueError, match=message):
        fit(module, [kind(mask=mask_of_everything(model))])


# DeepSpeed itself need not be installed.
UNSHOWN = [FSDPStrategy(), DeepSpeedStrategy.__new__(DeepSpeedStrategy)]


@pytest.mark.parametrize("strategy", UNSHOWN, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("make", EVERY_CALLBACK, ids=lambda make: make().__class__.__name__)
def test_strategies_that_no_test_has_shown(make: Callable[[], pl.Callback], strategy: Any) -> None:
    callback = make()
    # A Trainer makes these on GPUs only.
    trainer: Any = SimpleNamespace(strategy=strategy, world_size=2)
    message = rf"got {type(strategy).__name__} with 2 process.*{type(callback).__name__}.*devices=1"
    with pytest.raises(ValueError, match=message):
        callback.setup(trainer, OwnModule(make_smallest_model()), "fit")


@BOTH
def test_outside_of_a_fit_any_strategy_will_do(kind: type[SelectedWeightsCallback]) -> None:
    trainer: Any = SimpleNamespace(strategy=FSDPStrategy(), world_size=2)
    kind(mask=mask_of_everything(make_smallest_model())).setup(trainer, OwnModule(make_smallest_model()), "test")


@BOTH
def test_processes_whose_findings_would_be_lost_are_refused(kind: type[SelectedWeightsCallback]) -> None:
    """Lightning brings weights and metrics back from processes that it forks or spawns, and no mask and no patch."""
    trainer: Any = SimpleNamespace(strategy=DDPStrategy(start_method="spawn"), world_size=2)
    with pytest.raises(ValueError, match=r"`start_method` expected to be 'popen' but got 'spawn'.*strategy=\"ddp\""):
        kind(mask=mask_of_everything(make_smallest_model())).setup(trainer, OwnModule(make_smallest_model()), "fit")
