# SPDX-License-Identifier: Apache-2.0
"""The callbacks in a trainer of the package ``lightning``, which has classes of its own."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch
import torch
from torch import Tensor

from lightning_safety.callbacks.selected import SelectedWeightsCallback
from tests.callbacks.toys import (
    BOTH,
    assert_acted,
    make_batches,
    make_loader,
    make_smallest_model,
    mask_of_everything,
    quiet,
    weights_of,
)


class LightningModule(lightning.pytorch.LightningModule):
    """The same module as a user of the other Lightning package has it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_smallest_model()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


@BOTH
def test_trainer_of_the_lightning_package(kind: type[SelectedWeightsCallback], tmp_path: Path) -> None:
    module = LightningModule()
    before, mask = weights_of(module.model), mask_of_everything(module.model)
    trainer = lightning.pytorch.Trainer(**quiet([kind(mask=mask)]))
    trainer.fit(module, make_loader(make_batches(4)))
    assert_acted(kind, module.model, before, mask)
    assert "safety/held_fraction" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    resumed = LightningModule()
    trainer = lightning.pytorch.Trainer(**quiet([kind(mask=mask)], max_epochs=2))
    trainer.fit(resumed, make_loader(make_batches(4)), ckpt_path=tmp_path / "fit.ckpt")
    assert_acted(kind, resumed.model, before, mask)
