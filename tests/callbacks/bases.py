# SPDX-License-Identifier: Apache-2.0
"""Very small models whose base does not train, a user's module around them, and masks on their linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_safety.language import find_language_model
from lightning_safety.language.quantized import keep_unpacked
from lightning_safety.scoring import SafetyMask
from tests.callbacks.toys import OwnModule, make_batches, make_smallest_model, quiet
from tests.enforcement.deltas import make_mask
from tests.quantized import make_quantized_model

KINDS = ["frozen", "LoRA", "nf4", "nf4 under LoRA", "int8 under LoRA"]
EXACT = ["frozen", "LoRA", "nf4", "nf4 under LoRA"]


def make_dense(**overrides: Any) -> Any:
    return make_smallest_model(**{"hidden_size": 64, "intermediate_size": 64, **overrides})


def make_base(kind: str, **overrides: Any) -> Any:
    """A model whose linear layers are frozen, quantised, or under untrained adapters."""
    model = make_dense(**overrides)
    if kind == "frozen":
        return model.requires_grad_(False)
    if kind != "LoRA":
        model = make_quantized_model(kind.removesuffix(" under LoRA"), dense=model).train()
    if not kind.endswith("LoRA"):
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


class BasedModule(OwnModule):
    """Gives all parameters to the optimizer, frozen ones too."""

    @property
    def strict_loading(self) -> bool:
        """bitsandbytes saves scales under names that it does not take back."""
        return False

    def configure_optimizers(self) -> Any:
        return self.make_optimizers(list(self.parameters()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out eight-bit layers, which bitsandbytes does not load twice."""
        weights = checkpoint["state_dict"]
        packed = tuple(name.removesuffix("SCB") for name in weights if name.endswith("SCB"))
        checkpoint["state_dict"] = {name: weights[name] for name in weights if not name.startswith(packed)}

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.model(input_ids=batch, labels=batch, use_cache=False).loss)

    validation_step = test_step


def mask_of(module: nn.Module, **options: Any) -> SafetyMask:
    """Some weights of every linear layer but one."""
    return make_mask(find_language_model(module), 0.2, **options)


def logits_of(module: Any) -> Tensor:
    """Without dropout."""
    keep_unpacked(module)
    training = module.model.training
    with torch.no_grad():
        logits: Tensor = module.model.eval()(make_batches(1)[0], use_cache=False).logits
    module.model.train(training)
    return logits


def packed(module: nn.Module) -> dict[str, Tensor]:
    """All weights and scales by name, as bytes."""
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {name: value.detach().clone().reshape(-1).view(torch.uint8) for name, value in tensors.items()}


def fit_shuffled(
    kind: str, callbacks: list[Any], *, ckpt_path: Path | None = None, module: Any = None, **options: Any
) -> BasedModule:
    """Dropout, and torch's own shuffled loader: both draw from the global generator."""
    torch.manual_seed(5 if ckpt_path is None else 99)
    module = BasedModule(make_base(kind, attention_dropout=0.3)) if module is None else module
    trainer = pl.Trainer(**quiet(callbacks, **{"max_epochs": 4, **options}))
    loader = DataLoader(torch.cat(make_batches(12)), batch_size=3, shuffle=True)
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
    return module


def evaluate(module: Any, callbacks: list[Any], path: Path | None, stage: str = "test") -> float:
    """Return the loss of `trainer.test` or `trainer.validate`."""
    keep_unpacked(module)
    trainer = pl.Trainer(**quiet(callbacks))
    run = getattr(trainer, stage)
    (found,) = run(module, DataLoader(make_batches(1), batch_size=None), ckpt_path=path, verbose=False)
    loss: float = found["loss"]
    return loss
