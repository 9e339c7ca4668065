# SPDX-License-Identifier: Apache-2.0
"""What both callbacks refuse at the start of a fit, leaving the model as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import FSDPStrategy
from transformers import PreTrainedTokenizerFast

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


@BOTH
def test_strategies_that_no_test_has_shown(kind: type[SelectedWeightsCallback]) -> None:
    callback = kind(mask=mask_of_everything(make_smallest_model()))
    # A Trainer makes this one on GPUs only.
    trainer: Any = SimpleNamespace(strategy=FSDPStrategy(), world_size=2)
    with pytest.raises(ValueError, match=rf"got FSDPStrategy with 2 process.*{kind.__name__}.*devices=1"):
        callback.setup(trainer, OwnModule(make_smallest_model()), "fit")
    callback.setup(trainer, OwnModule(make_smallest_model()), "test")
