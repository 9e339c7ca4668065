# SPDX-License-Identifier: Apache-2.0
"""SPA by one line in a module that knows nothing of this package, in the Trainer of either Lightning package."""

from __future__ import annotations

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch.utils.data import DataLoader

from lightning_safety import HarmfulnessMonitor, SafetyEnhancementTuning, SafetyPreservingAdaptation
from lightning_safety.scoring import RefusalMargin
from tests.tiny import make_tiny_model, make_tiny_tokenizer


def make_module(package):
    """A LightningModule of one of the two packages, with a Hugging Face model as an attribute."""

    class OwnModule(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.tokenizer = make_tiny_tokenizer()
            self.backbone = make_tiny_model().train()

        def training_step(self, batch, batch_idx):
            return self.backbone(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

    return OwnModule()


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch], ids=lambda package: package.__name__)
@pytest.mark.parametrize("kind", [SafetyPreservingAdaptation, SafetyEnhancementTuning])
def test_one_line_is_enough(package, kind, tmp_path):
    module = make_module(package)
    before = {name: weight.detach().clone() for name, weight in module.backbone.named_parameters()}
    callback = kind(0.1, objective=RefusalMargin(limit=4))
    trainer = package.Trainer(
        max_steps=3,
        callbacks=[callback, HarmfulnessMonitor(every_n_steps=2, prompts=2, max_new_tokens=2)],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.arange(96).view(16, 6) + 3, batch_size=2))
    moved = {name: (weight != before[name]).flatten() for name, weight in module.backbone.named_parameters()}
    selected = {name: torch.zeros_like(flags) for name, flags in moved.items()}
    for name, indices in callback.mask.indices.items():
        selected[name][indices.long()] = True
    stays = selected if kind is SafetyPreservingAdaptation else {name: ~flags for name, flags in selected.items()}
    for name, flags in moved.items():
        assert not (flags & stays[name]).any()
    assert sum(int(flags.sum()) for flags in moved.values()) > 0
    assert "safety/attack_success_rate" in trainer.callback_metrics
    assert 0 < trainer.callback_metrics["safety/held_fraction"] < 1
