# SPDX-License-Identifier: Apache-2.0
"""Module and data module as LightningCLI makes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.cli import LightningCLI

from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from tests.tiny import make_tiny_model


@pytest.fixture
def configuration(tiny_tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    make_tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 2,
            "default_root_dir": str(tmp_path),
            "enable_progress_bar": False,
        },
        "model": {
            "class_path": "lightning_safety.training.CausalLanguageModule",
            "init_args": {
                "source": str(tmp_path / "model"),
                "learning_rate": 0.001,
                "betas": [0.9, 0.95],
                "schedule": "cosine",
                "warmup_fraction": 0.03,
                "retention_weight": 0.1,
            },
        },
        "data": {
            "class_path": "lightning_safety.training.InstructionDataModule",
            "init_args": {
                "train": [
                    {"source": "harmful", "split": "train", "share": 0.5, "limit": 8},
                    {"source": "harmless", "share": 0.5, "retention": True},
                ],
                "val": "harmless",
                "max_response_tokens": 4,
            },
        },
    }


def run(configuration: dict[str, Any], path: Path, *words: str) -> LightningCLI:
    path.write_text(yaml.safe_dump(configuration))
    return LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        model_class=None,
        args=[*words, f"--config={path}"],
        run=bool(words),
    )


def test_instantiated_from_yaml(configuration: dict[str, Any], tmp_path: Path) -> None:
    made = run(configuration, tmp_path / "config.yaml")
    assert isinstance(made.model, CausalLanguageModule)
    assert made.model.hparams["betas"] == [0.9, 0.95]
    assert isinstance(made.datamodule, InstructionDataModule)
    made.datamodule.tokenizer = made.model.tokenizer
    made.datamodule.setup("validate")
    assert made.datamodule.hparams["train"][0]["limit"] == 8


def test_a_fit_from_yaml_writes_a_checkpoint_that_loads_alone(configuration: dict[str, Any], tmp_path: Path) -> None:
    made = run(configuration, tmp_path / "config.yaml", "fit")
    (path,) = tmp_path.rglob("*.ckpt")
    loaded = CausalLanguageModule.load_from_checkpoint(path, weights_only=True)
    for name, value in made.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert loaded.hparams["warmup_fraction"] == 0.03


def test_a_single_source_and_an_unknown_choice(configuration: dict[str, Any], tmp_path: Path) -> None:
    configuration["data"]["init_args"]["train"] = {"source": "harmful", "limit": 3}
    made = run(configuration, tmp_path / "config.yaml")
    made.datamodule.tokenizer = made.model.tokenizer
    made.datamodule.setup("fit")
    assert len(made.datamodule.train_dataloader()) == 1
    configuration["model"]["init_args"]["schedule"] = "cosin"
    with pytest.raises(SystemExit):
        run(configuration, tmp_path / "config.yaml")


def test_training_needs_no_jsonargparse() -> None:
    program = "import sys, lightning_safety.training; assert 'jsonargparse' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
