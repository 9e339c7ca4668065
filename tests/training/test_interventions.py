# SPDX-License-Identifier: Apache-2.0
"""What callbacks held or trained in the base of adapters comes back from a checkpoint that holds no base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation
from lightning_safety.enforcement import SparseDelta
from lightning_safety.enforcement.adapter_files import MASK_FILE, load_held_adapter, save_held_adapter
from lightning_safety.enforcement.held_lora import held_mask
from lightning_safety.language import load_causal_lm
from lightning_safety.scoring import SafetyMask
from lightning_safety.training import CausalLanguageModule, InstructionDataModule, export_checkpoint
from lightning_safety.training.interventions import restore_interventions
from tests.tiny import make_tiny_model
from tests.training.fits import make_examples, make_trainer
from tests.training.test_export_adapters import TOKENS, check_held

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|not have many workers|callbacks used to create)")
SHAPES = {f"model.layers.{layer}.self_attn.{part}_proj.weight": (64, 64) for layer in (0, 1) for part in "qo"}
ROWS = SafetyMask({name: torch.arange(64, 1000 // 64 * 64) for name in SHAPES}, SHAPES)
SCATTERED = SafetyMask({name: torch.arange(0, 4096, 3) for name in SHAPES}, SHAPES)


@pytest.fixture
def base(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    make_tiny_model(hidden_size=64).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fit(base: Path, *callbacks: Any, ckpt: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    module = CausalLanguageModule(base, lora={"r": 4, "lora_alpha": 16}, learning_rate=1e-2, **options)
    trainer = make_trainer(base.parent, callbacks, max_steps=4)
    trainer.fit(module, datamodule=InstructionDataModule(make_examples(16), batch_size=4), ckpt_path=ckpt)
    module.eval()
    return trainer, module


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_loaded_module_holds_what_its_fit_held(base: Path, weights_only: bool, quantization: Any) -> None:
    trainer, module = fit(base, SafetyPreservingAdaptation(mask=SCATTERED), quantization=quantization)
    trainer.save_checkpoint(base / "fit.ckpt", weights_only=weights_only)
    loaded = CausalLanguageModule.load_from_checkpoint(base / "fit.ckpt", weights_only=True).eval()
    assert held_mask(loaded.model) == SCATTERED
    assert torch.equal(loaded(TOKENS), module(TOKENS))
    # Saved again, by a trainer without the callback, it still says so.
    again = make_trainer(base.parent, max_steps=1)
    again.fit(loaded, datamodule=InstructionDataModule(make_examples(4), batch_size=4))
    again.save_checkpoint(base / "again.ckpt")
    (held,) = torch.load(base / "again.ckpt", weights_only=True)["language_model_adapters"]["held"].values()
    assert SafetyMask.from_state_dict(held["mask"]) == SCATTERED


def test_a_checkpoint_that_held_nothing_does_not_fit_a_held_module(base: Path) -> None:
    _, module = fit(base, SafetyPreservingAdaptation(mask=SCATTERED))
    trainer, _ = fit(base, SafetyPreservingAdaptation(mask=ROWS, granularity="neuron"))
    trainer.save_checkpoint(base / "fit.ckpt")
    with pytest.raises(ValueError, match="expected to be one of a fit that held the same weights"):
        make_trainer(base.parent).test(
            module,
            datamodule=InstructionDataModule(make_examples(4), test=make_examples(4)),
            ckpt_path=base / "fit.ckpt",
        )


def test_neurons_need_no_mask_beside_the_adapter(base: Path) -> None:
    trainer, module = fit(base, SafetyPreservingAdaptation(mask=ROWS, granularity="neuron"))
    trainer.save_checkpoint(base / "fit.ckpt")
    adapter = export_checkpoint(base / "fit.ckpt", base / "adapter", adapter=True)
    assert not (adapter / MASK_FILE).exists()
    merged = AutoModelForCausalLM.from_pretrained(export_checkpoint(base / "fit.ckpt", base / "merged"))
    check_held(merged, load_causal_lm(base), ROWS)
    assert (merged(TOKENS).logits - module(TOKENS)).abs().max() <= 1e-5
    loaded = CausalLanguageModule.load_from_checkpoint(base / "fit.ckpt", weights_only=True).eval()
    assert held_mask(loaded.model) is None
    assert torch.equal(loaded(TOKENS), module(TOKENS))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_weights_that_trained_under_adapters_come_back(base: Path, quantization: Any) -> None:
    trainer, module = fit(base, SafetyEnhancementTuning(mask=SCATTERED), quantization=quantization)
    trainer.save_checkpoint(base / "fit.ckpt")
    loaded = CausalLanguageModule.load_from_checkpoint(base / "fit.ckpt", weights_only=True).eval()
    assert torch.equal(loaded(TOKENS), module(TOKENS))
    untrained = CausalLanguageModule(base, lora={"r": 4}, quantization=quantization).eval()
    assert (untrained(TOKENS) - module(TOKENS)).abs().max() > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(export_checkpoint(base / "fit.ckpt", base / "merged"))
    if quantization is None:
        assert (merged(TOKENS).logits - module(TOKENS)).abs().max() <= 1e-5
    for name, indices in SCATTERED.indices.items():
        changed = (merged.get_parameter(name) != load_causal_lm(base).get_parameter(name)).view(-1)
        assert changed[indices.long()].float().mean() > 0.9
        assert int(changed.sum()) <= len(indices)
    with pytest.raises(ValueError, match="it also trained 4 weights of the base"):
        export_checkpoint(base / "fit.ckpt", base / "adapter", adapter=True)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_weights_are_put_back_while_they_train(base: Path, quantization: Any) -> None:
    """What a learning rate finder does: save, train, load into the same module, train on."""
    module = CausalLanguageModule(base, lora={"r": 4}, quantization=quantization)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    delta = SparseDelta(SCATTERED).attach(module.language_model, [optimizer])

    def step() -> torch.Tensor:
        logits: torch.Tensor = module(TOKENS)
        optimizer.zero_grad()
        logits.square().mean().backward()
        optimizer.step()
        return logits.detach()

    step()
    weights = {name: value.clone() for name, value in delta.entries().items()}
    described = {"held": {}, "trained": [{"mask": SCATTERED.state_dict(), "entries": weights}]}
    second, third = step(), step()
    restore_interventions(module.model, described, {})
    assert torch.equal(step(), second)
    assert torch.equal(step(), third)
    assert not torch.equal(second, third)


def test_a_loaded_adapter_is_trained_further(base: Path) -> None:
    trainer, module = fit(base, SafetyPreservingAdaptation(mask=SCATTERED))
    save_held_adapter(module.model, SCATTERED, base / "adapter")
    adapted, _ = load_held_adapter(load_causal_lm(base), base / "adapter", trainable=True)
    further = CausalLanguageModule(adapted, tokenizer=module.tokenizer, learning_rate=1e-2)
    trainer = make_trainer(base.parent, [SafetyPreservingAdaptation(mask=base / "adapter" / MASK_FILE)], max_steps=4)
    trainer.fit(further, datamodule=InstructionDataModule(make_examples(16), batch_size=4))
    trainer.save_checkpoint(base / "fit.ckpt")
    assert (further.eval()(TOKENS) - module(TOKENS)).abs().max() > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(export_checkpoint(base / "fit.ckpt", base / "merged"))
    check_held(merged, load_causal_lm(base), SCATTERED)
    assert (merged(TOKENS).logits - further(TOKENS)).abs().max() <= 1e-5


@pytest.mark.parametrize("make", [SafetyPreservingAdaptation, SafetyEnhancementTuning])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_resumed_is_uninterrupted(base: Path, make: Any, quantization: Any) -> None:
    saver = ModelCheckpoint(dirpath=base, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    _, whole = fit(base, make(mask=SCATTERED), saver, quantization=quantization)
    _, resumed = fit(base, make(mask=SCATTERED), ckpt=base / "step=2.ckpt", quantization=quantization)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert torch.equal(resumed(TOKENS), whole(TOKENS))
