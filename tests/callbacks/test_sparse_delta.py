# SPDX-License-Identifier: Apache-2.0
"""`SafetyEnhancementTuning` on frozen, adapted and quantised bases; resuming is in test_sparse_delta_resume.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder
from torch import Tensor, nn

from lightning_safety.callbacks import SafetyBudget, SafetyEnhancementTuning, SafetyPreservingAdaptation
from lightning_safety.callbacks.together import held_fraction
from lightning_safety.enforcement import SafetyPatch, matrix_entries
from lightning_safety.language import find_language_model, named_weights
from lightning_safety.scoring import RefusalMargin, SafetyMask
from tests.callbacks.bases import KINDS, BasedModule, evaluate, logits_of, make_base, make_dense, mask_of, packed
from tests.callbacks.budgets import ScriptedMonitor
from tests.callbacks.test_held_matrix import precision_options
from tests.callbacks.toys import fit, make_batches
from tests.enforcement.adapters import relative_distance
from tests.enforcement.deltas import count_traces
from tests.quantized import dense_twin


def adamw(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, eps=1e-6)]


def dense_of(kind: str) -> Any:
    """The unfrozen model of the same weights."""
    return make_dense() if kind in ("frozen", "LoRA") else dense_twin(make_base(kind.split()[0])).train()


def trained_weights(callback: SafetyEnhancementTuning) -> dict[str, Tensor]:
    assert callback.patch is not None
    return callback.patch.after


CELLS = [
    ("frozen", "32-true", 3, "norm", False),
    ("frozen", "32-true", 2, "value", True),
    ("frozen", "16-mixed", 1, "norm", False),
    ("LoRA", "32-true", 1, None, False),
    ("LoRA", "32-true", 2, "norm", True),
    ("nf4", "32-true", 2, "norm", False),
    ("nf4", "32-true", 1, "value", True),
    ("nf4", "bf16-mixed", 1, None, False),
    ("LoRA", "bf16-mixed", 2, "norm", False),
]


@pytest.mark.parametrize(("kind", "precision", "accumulate", "clip", "manual"), CELLS)
def test_trains_what_it_trains_in_an_unfrozen_model(
    kind: str, precision: str, accumulate: int, clip: str | None, manual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_entries, "_DENSE_FROM", 1.0)
    mask = mask_of(make_base(kind))
    results = []
    for model in (make_base(kind), dense_of(kind)):
        module = BasedModule(model, adamw, manual=manual, accumulate=accumulate, clip=clip)
        options = precision_options(precision)
        if not manual:
            options["accumulate_grad_batches"] = accumulate
            options |= {} if clip is None else {"gradient_clip_val": 0.1, "gradient_clip_algorithm": clip}
        callback = SafetyEnhancementTuning(mask=mask)
        trainer = fit(module, [callback], steps=8 * accumulate, **options)
        assert trainer.global_step == 8
        results.append(callback)
    tolerance = 1e-5 if precision == "32-true" else 0.03
    for name, after in trained_weights(results[1]).items():
        assert relative_distance(trained_weights(results[0])[name], after) <= tolerance, name
        before = results[1].patch.before[name]
        assert relative_distance(before, after) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_trained_one_after_the_fit(kind: str, tmp_path: Path) -> None:
    module = BasedModule(make_base(kind))
    mask, before, base = mask_of(module), packed(module), logits_of(BasedModule(make_base(kind)))
    flags = [weight.requires_grad for weight in module.parameters()]
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            seen["logits"] = logits_of(pl_module)
            seen["held"] = [weight for group in trainer.optimizers[0].param_groups for weight in group["params"]]
            seen["flags"] = [weight.requires_grad for weight in pl_module.parameters()]

    callback = SafetyEnhancementTuning(mask=mask, patch=tmp_path / "patch")
    trainer = fit(module, [callback, Look()])
    assert sum(weight.numel() for weight in seen["held"]) == mask.count
    assert not any(seen["flags"])
    assert [weight.requires_grad for weight in module.parameters()] == flags
    assert torch.equal(logits_of(module), seen["logits"])
    assert relative_distance(base, seen["logits"]) > 0.01
    patch, now = SafetyPatch.load(tmp_path / "patch"), packed(module)
    assert (patch.changed, patch.metadata["steps"]) == (mask.count, "4")
    if "nf4" in kind or "int8" in kind:
        assert all(torch.equal(now[name], value) for name, value in before.items() if name in now)
        dense = BasedModule(dense_of(kind))
        patch.apply(dense.model)
        assert relative_distance(logits_of(dense), seen["logits"]) <= (0.02 if "int8" in kind else 1e-5)
    else:
        patch.revert(find_language_model(module))
        assert all(torch.equal(packed(module)[name], value) for name, value in before.items())
        assert count_traces(module, *trainer.optimizers) == 0


def test_settings_of_the_module_stay(tmp_path: Path) -> None:
    class Scheduled(BasedModule):
        def configure_optimizers(self) -> Any:
            weights = [weight for weight in self.parameters() if weight.requires_grad]
            optimizer = torch.optim.AdamW([{"params": weights[::2], "lr": 0.1}, {"params": weights[1::2], "lr": 0.2}])
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    trainer = fit(Scheduled(make_base("LoRA")), [SafetyEnhancementTuning(mask=mask_of(make_base("LoRA")))])
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.05, 0.1]
    assert [bool(group["params"]) for group in trainer.optimizers[0].param_groups] == [True, False]


@pytest.mark.parametrize("kind", ["LoRA", "nf4"])
def test_the_fit_ends_with_the_mean_of_the_last_steps(kind: str) -> None:
    mask = mask_of(make_base(kind))
    results = []
    for model in (make_base(kind), dense_of(kind)):
        module, callback = BasedModule(model, adamw), SafetyEnhancementTuning(mask=mask, average_last=3)
        fit(module, [callback], steps=6, max_steps=6)
        results.append((module, callback))
    for name, after in trained_weights(results[1][1]).items():
        assert relative_distance(trained_weights(results[0][1])[name], after) <= 1e-5
    assert relative_distance(logits_of(results[0][0]), logits_of(results[1][0])) <= 1e-4


class PutsBack(pl.Callback):
    """What a learning rate finder does, after our callback has begun to act."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        start = {name: value.clone() for name, value in pl_module.state_dict().items() if isinstance(value, Tensor)}
        optimizer = trainer.optimizers[0]
        pl_module.model(input_ids=make_batches(1)[0], labels=make_batches(1)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.state.clear()
        pl_module.load_state_dict(start, strict=False)


class WithRate(BasedModule):
    lr = 1e-2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@pytest.mark.parametrize(
    ("kind", "finder"),
    [
        ("frozen", PutsBack()),
        ("nf4", PutsBack()),
        ("LoRA", LearningRateFinder(num_training_steps=5)),
        ("nf4 under LoRA", LearningRateFinder(num_training_steps=5)),
    ],
)
def test_a_learning_rate_finder_leaves_the_start_weights(kind: str, finder: pl.Callback, tmp_path: Path) -> None:
    class Start(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            # The finder's own fit has none of the trainer's callbacks.
            self.logits = logits_of(pl_module)

    module, start = WithRate(make_base(kind)), Start()
    expected = logits_of(BasedModule(make_base(kind)))
    callbacks = [SafetyEnhancementTuning(mask=mask_of(module)), finder, start]
    fit(module, callbacks, steps=8, max_steps=2, default_root_dir=tmp_path)
    assert torch.equal(start.logits, expected)


def test_a_budget_rolls_back_what_acts_beside_the_base(tmp_path: Path) -> None:
    class Logits(pl.Callback):
        def __init__(self) -> None:
            self.at: dict[int, Tensor] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.at[trainer.global_step] = logits_of(pl_module)

    for kind in ("LoRA", "nf4"):
        module, seen = BasedModule(make_base(kind)), Logits()
        monitor = ScriptedMonitor({0: 0, 4: 12}, every_n_steps=2)
        callbacks = [seen, SafetyEnhancementTuning(mask=mask_of(module)), monitor, SafetyBudget(action="rollback")]
        with pytest.warns(UserWarning, match="Restored the weights of step 2"):
            fit(module, callbacks, steps=8, default_root_dir=tmp_path / kind)
        assert torch.equal(logits_of(module), seen.at[2])
        assert not torch.equal(seen.at[4], seen.at[2])


@pytest.mark.parametrize("quantization", ["", "nf4 under "])
def test_beside_held_adapters_in_any_order(quantization: str) -> None:
    """SPA holds its weights, SET trains its own, and the adapters stand still."""
    kind = f"{quantization}LoRA"
    everything = mask_of(make_base(kind))
    held = SafetyMask({name: index[::2] for name, index in everything.indices.items()}, everything.shapes)
    trained = everything - held
    results = []
    for order in (1, -1, 0):
        module = BasedModule(make_base(kind))
        callbacks = [SafetyEnhancementTuning(mask=trained), SafetyPreservingAdaptation(mask=held)]
        fit(module, callbacks[:1] if not order else callbacks[::order])
        results.append((logits_of(module), trained_weights(callbacks[0])))
        share = held_fraction(callbacks, find_language_model(module))
        assert share == pytest.approx(1 - trained.count / sum(w.numel() for w in _dense(kind).values()), abs=0.2)
    for logits, weights in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert all(torch.equal(values, results[0][1][name]) for name, values in weights.items())


def _dense(kind: str) -> dict[str, nn.Parameter]:
    return named_weights(dense_of(kind))


def test_scores_and_trains_a_quantised_model_in_one_line(tiny_tokenizer: Any) -> None:
    module = BasedModule(make_base("nf4", vocab_size=512, max_position_embeddings=512), tokenizer=tiny_tokenizer)
    callback = SafetyEnhancementTuning(fraction=0.05, objective=RefusalMargin(limit=2))
    fit(module, [callback])
    assert callback.mask is not None
    assert callback.patch is not None
    assert callback.patch.count == callback.mask.count
    assert evaluate(module, [], None) != pytest.approx(
        evaluate(BasedModule(make_base("nf4", vocab_size=512, max_position_embeddings=512)), [], None), abs=1e-3
    )
