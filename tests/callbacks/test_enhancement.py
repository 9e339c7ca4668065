# SPDX-License-Identifier: Apache-2.0
"""What only `SafetyEnhancementTuning` does; equality with dense training is in test_set_against_dense.py."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_safety.callbacks import SafetyEnhancementTuning
from lightning_safety.enforcement import SafetyPatch, patch_file
from tests.callbacks.toys import (
    OwnModule,
    assert_only_selected_moved,
    assert_same_bits,
    count_traces,
    fit,
    make_batches,
    make_loader,
    make_smallest_model,
    mask_of_everything,
    quiet,
    weights_of,
)


def test_patch_turns_the_start_into_the_result(tmp_path: Path) -> None:
    module = OwnModule(make_smallest_model())
    mask = mask_of_everything(module.model)
    callback = SafetyEnhancementTuning(mask=mask, patch=tmp_path / "patch.safetensors")
    assert callback.patch is None
    fit(module, [callback])
    patch = SafetyPatch.load(tmp_path / "patch.safetensors")
    assert callback.patch is not None
    assert (patch.count, patch.changed) == (callback.patch.count, callback.patch.changed) == (mask.count, mask.count)
    assert patch.metadata == {"made_by": "SafetyEnhancementTuning", "steps": "4"}
    subject = make_smallest_model()
    patch.apply(subject)
    assert_same_bits(subject, module.model)
    patch.revert(subject)
    assert_same_bits(subject, make_smallest_model())


def test_no_patch_after_an_error(tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("out of luck")

    callback = SafetyEnhancementTuning(
        mask=mask_of_everything(make_smallest_model()), patch=tmp_path / "patch.safetensors"
    )
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(OwnModule(make_smallest_model()), [callback, Fails()])
    assert callback.patch is None
    assert list(tmp_path.iterdir()) == []


def test_full_disk_loses_no_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(patch_file, "save_file", full)
    module = OwnModule(make_smallest_model())
    callback = SafetyEnhancementTuning(mask=mask_of_everything(module.model), patch=tmp_path / "patch.safetensors")
    with pytest.raises(OSError, match="No space left"):
        fit(module, [callback])
    assert list(tmp_path.iterdir()) == []
    subject = make_smallest_model()
    assert callback.patch is not None
    callback.patch.apply(subject)
    assert_same_bits(subject, module.model)


def test_optimizer_holds_selected_weights_only() -> None:
    module = OwnModule(make_smallest_model())
    mask = mask_of_everything(module.model)
    trainer = fit(module, [SafetyEnhancementTuning(mask=mask)])
    held = trainer.optimizers[0].param_groups[0]["params"]
    padded = [-(-index.numel() // 64) * 64 for index in mask.indices.values()]
    assert [weight.numel() for weight in held] == padded
    assert all(weight.grad is None for weight in module.parameters())


REFUSED = {
    "AdamW8bit": lambda weights: [bitsandbytes.optim.AdamW8bit(weights)],
    "Muon": lambda weights: [torch.optim.Muon([weight for weight in weights if weight.dim() == 2])],
    "Adafactor": lambda weights: [torch.optim.Adafactor(weights)],
    "LBFGS": lambda weights: [torch.optim.LBFGS(weights)],
}


def refuse(module: OwnModule, message: str) -> None:
    mask = mask_of_everything(make_smallest_model())
    trainer = pl.Trainer(**quiet([SafetyEnhancementTuning(mask=mask)]))
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, make_loader(make_batches(2)))
    assert count_traces(module, trainer) == 0


@pytest.mark.parametrize(("name", "make"), REFUSED.items(), ids=list(REFUSED))
def test_refused_optimizers(name: str, make: Any) -> None:
    refuse(OwnModule(make_smallest_model(), make), rf"treat every weight by its own gradient but {name}")


def test_frozen_selected_weights() -> None:
    module = OwnModule(make_smallest_model())
    module.model.model.embed_tokens.requires_grad_(False)
    refuse(module, r"`model\.embed_tokens\.weight` is frozen")


def test_selected_weights_in_no_optimizer() -> None:
    module = OwnModule(make_smallest_model(), lambda weights: [torch.optim.AdamW(weights[1:])])
    refuse(module, r"`model\.embed_tokens\.weight` is in none")


def test_optimizer_without_selected_weights() -> None:
    class WithHead(OwnModule):
        def __init__(self) -> None:
            super().__init__(make_smallest_model(), manual=True)
            self.head = nn.Linear(2, 1)

        def configure_optimizers(self) -> Any:
            self.make_optimizers = lambda weights: [
                torch.optim.AdamW(self.model.parameters()),
                torch.optim.Adam(self.head.parameters()),
            ]
            return super().configure_optimizers()

    refuse(WithHead(), r"Optimizer 1 \(Adam\) expected to hold selected weights but it holds none")


def test_learning_rate_finder_before_the_fit_leaves_the_start_weights() -> None:
    """It trains for some steps and loads the model's weights again, which the optimizer's must follow."""

    class PutsBack(pl.Callback):
        """What the finder does to the model, at the same moment: after our callback has begun to act."""

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            start = {name: weight.clone() for name, weight in pl_module.state_dict().items()}
            optimizer = trainer.optimizers[0]
            pl_module.model(input_ids=make_batches(1)[0], labels=make_batches(1)[0]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.state.clear()
            pl_module.load_state_dict(start)

    mask = mask_of_everything(make_smallest_model())
    modules = []
    for callbacks in ([], [PutsBack()]):
        module = OwnModule(make_smallest_model())
        fit(module, [SafetyEnhancementTuning(mask=mask), *callbacks])
        modules.append(module)
    assert_same_bits(modules[0].model, modules[1].model)
    assert_only_selected_moved(modules[0].model, weights_of(make_smallest_model()), mask)


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_manual_optimization(clip: str | None, accumulate: int) -> None:
    """As automatic optimization; clipping through `self.clip_gradients` sees the selected gradients."""
    mask = mask_of_everything(make_smallest_model())
    manual = OwnModule(make_smallest_model(), manual=True, accumulate=accumulate, clip=clip)
    fit(manual, [SafetyEnhancementTuning(mask=mask)])
    automatic = OwnModule(make_smallest_model())
    options = {} if clip is None else {"gradient_clip_val": 0.1, "gradient_clip_algorithm": clip}
    fit(automatic, [SafetyEnhancementTuning(mask=mask)], accumulate_grad_batches=accumulate, **options)
    assert_same_bits(manual.model, automatic.model)
    assert_only_selected_moved(manual.model, weights_of(make_smallest_model()), mask)


# The mean of the last steps -------------------------------------------------------------------------------------------


class Weights(pl.Callback):
    """The weights after every step; before the callback that averages or behind it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.seen.append(weights_of(pl_module.model))


def fit_averaged(average_last: int | None, *, steps: int = 6, **options: Any) -> tuple[Any, Any, Weights, pl.Trainer]:
    module, weights = OwnModule(make_smallest_model()), Weights()
    callback = SafetyEnhancementTuning(mask=mask_of_everything(module.model), average_last=average_last)
    options = {"max_steps": 6, **options}
    trainer = fit(module, [weights, callback], steps=steps, **options)
    return module, callback, weights, trainer


def test_the_fit_ends_with_the_mean_of_the_last_steps() -> None:
    _, _, plain, _ = fit_averaged(None)
    module, callback, averaged, trainer = fit_averaged(3)
    for before, after in zip(plain.seen[:-1], averaged.seen[:-1], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    found = weights_of(module.model)
    for name, last in found.items():
        mean = torch.stack([seen[name] for seen in plain.seen[-3:]]).double().mean(dim=0)
        assert torch.equal(last, mean.to(last.dtype))
        assert torch.equal(averaged.seen[-1][name], last)  # whoever looks after the last step sees the mean
    assert any(not torch.equal(plain.seen[-1][name], last) for name, last in found.items())
    subject = make_smallest_model()
    callback.patch.apply(subject)
    assert_same_bits(subject, module.model)
    trained = torch.cat([weight for group in trainer.optimizers[0].param_groups for weight in group["params"]])
    assert all(bool((trained == value).any()) for value in callback.patch.after.popitem()[1][:5])


def test_the_mean_of_one_step_is_that_step() -> None:
    plain, averaged = fit_averaged(None)[0], fit_averaged(1)[0]
    assert_same_bits(plain.model, averaged.model)


def test_a_fit_that_ends_early_averages_what_there_is() -> None:
    with pytest.warns(UserWarning, match="ended after 4 of 6 steps, so 1 are averaged instead of the last 3"):
        early = fit_averaged(3, steps=4)[0]
    assert_same_bits(early.model, fit_averaged(None, steps=4)[0].model)


def test_a_mean_needs_to_know_the_last_step() -> None:
    with pytest.raises(ValueError, match="`average_last=3` expected a trainer with `max_steps`"):
        fit_averaged(3, max_steps=-1)
    with pytest.raises(ValueError, match="`average_last` expected to be at least 1"):
        SafetyEnhancementTuning(average_last=0)
