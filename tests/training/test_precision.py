# SPDX-License-Identifier: Apache-2.0
"""Which precision a study takes, by what the machine can do and what the user says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_safety.training import command_line
from lightning_safety.training.command_line import CLASSES, StudyCommand
from lightning_safety.training.precision import computes_in_bfloat16, fast_precision

WORDS = [
    "--model=lightning_safety.CausalLanguageModule",
    "--model.source=somewhere",
    "--data=lightning_safety.InstructionDataModule",
    "--data.train=harmless",
]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True, "avx512_bf16": False}, False)],
)
def test_a_processor_says_whether_it_computes_in_bfloat16(
    capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert computes_in_bfloat16() is expected
    assert fast_precision() == ("bf16-mixed" if expected else "32-true")


def test_a_trainer_on_the_cpu_is_not_told_what_the_gpu_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert fast_precision("auto") == fast_precision("gpu") == "bf16-mixed"
    assert fast_precision("cpu") == "32-true"


def test_older_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not computes_in_bfloat16()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--bfloat16=never"], None),
        (["--bfloat16=auto"], "bf16-mixed"),
        (["--bfloat16=auto", "--trainer.precision=32-true"], "32-true"),
    ],
)
def test_what_the_user_says_comes_first(words: list[str], expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "fast_precision", lambda accelerator: "bf16-mixed")

    class Parsed(StudyCommand):
        def instantiate_classes(self) -> None:
            """Make nothing."""

    study = Parsed(**CLASSES, save_config_callback=None, run=False, args=[*WORDS, *words])
    assert study.config.trainer.precision == expected
