# SPDX-License-Identifier: Apache-2.0
"""A LoRA checkpoint becomes the merged model, or an adapter's folder, with what the fit held held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_safety.callbacks import SafetyPreservingAdaptation
from lightning_safety.cli import main
from lightning_safety.enforcement.adapter_files import HELD_KEY, MASK_FILE, load_held_adapter
from lightning_safety.enforcement.entries import count_different_bits, gather_entries
from lightning_safety.enforcement.held_lora import HeldLora
from lightning_safety.language import load_causal_lm
from lightning_safety.scoring import SafetyMask
from lightning_safety.training import CausalLanguageModule, InstructionDataModule, export_checkpoint
from lightning_safety.training.interventions import held_weights
from tests.tiny import make_tiny_model
from tests.training.fits import make_examples, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|no longer tied|is_gradient_checkpointing)")
TOKENS = torch.arange(3, 43).reshape(2, 20)
NAMES = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in ("q", "v")]


class Holding(SafetyPreservingAdaptation):
    """A user's own kind, whose state has another key."""


def make_mask() -> SafetyMask:
    shapes = {name: (32 if ".q_" in name else 16, 32) for name in NAMES}
    generator = torch.Generator().manual_seed(0)
    indices = {
        name: (torch.rand(shape[0] * shape[1], generator=generator) < 0.3).nonzero()[:, 0]
        for name, shape in shapes.items()
    }
    return SafetyMask(indices, shapes)


@pytest.fixture
def base(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    make_tiny_model(attention_bias=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_checkpoint(source: Any, folder: Path, *callbacks: Any, weights_only: bool = False, **options: Any) -> Any:
    """Fit a few steps, and return the module and its checkpoint."""
    torch.manual_seed(3)
    settings = {"lora": {"r": 4, "lora_alpha": 16}, "learning_rate": 1e-2, **options}
    module = CausalLanguageModule(source, **settings)
    trainer = make_trainer(folder, callbacks, max_steps=4)
    trainer.fit(module, datamodule=InstructionDataModule(make_examples(8), batch_size=4))
    trainer.save_checkpoint(folder / "fit.ckpt", weights_only=weights_only)
    return module.eval(), folder / "fit.ckpt"


def moved(one: Any, other: Any, names: list[str]) -> int:
    return sum(count_different_bits(one.get_parameter(name), other.get_parameter(name)) for name in names)


def check_held(merged: Any, base: Any, mask: SafetyMask) -> None:
    for name, indices in mask.indices.items():
        weights = merged.get_parameter(name), base.get_parameter(name)
        assert count_different_bits(*(gather_entries(weight, indices) for weight in weights)) == 0
        assert count_different_bits(*weights) > 0.9 * (weights[0].numel() - len(indices))


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1},
        {"use_rslora": True, "bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"r": 2, "init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_the_merged_model_computes_what_was_trained(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    module, checkpoint = save_checkpoint(base, tmp_path, lora=lora)
    output = export_checkpoint(checkpoint, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert (merged(TOKENS).logits - module(TOKENS)).abs().max() <= 1e-5
    assert moved(merged, load_causal_lm(base), NAMES) > 0
    assert "lora" not in (output / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(output).chat_template == module.tokenizer.chat_template
    adapter = export_checkpoint(checkpoint, tmp_path / "adapter", adapter=True)
    assert not (adapter / MASK_FILE).exists()
    loaded = peft.PeftModel.from_pretrained(load_causal_lm(base), adapter)
    assert torch.equal(loaded(TOKENS).logits, module(TOKENS))
    assert loaded.peft_config["default"].base_model_name_or_path == str(base)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("kind", [SafetyPreservingAdaptation, Holding])
def test_held_weights_keep_the_bits_of_the_base(base: Path, tmp_path: Path, kind: Any, weights_only: bool) -> None:
    module, checkpoint = save_checkpoint(base, tmp_path, kind(mask=make_mask()), weights_only=weights_only)
    HeldLora(make_mask()).attach(module.language_model, continued=True)
    merged = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, tmp_path / "merged"))
    check_held(merged, load_causal_lm(base), make_mask())
    assert (merged(TOKENS).logits - module(TOKENS)).abs().max() <= 1e-5
    adapter = export_checkpoint(checkpoint, tmp_path / "adapter", adapter=True)
    loaded, holder = load_held_adapter(load_causal_lm(base), adapter)
    assert holder.mask == make_mask()
    assert torch.equal(loaded(TOKENS).logits, module(TOKENS))
    with pytest.warns(UserWarning, match=HELD_KEY):
        peft.PeftModel.from_pretrained(load_causal_lm(base), adapter)


def test_what_was_held_according_to_a_checkpoint() -> None:
    first, second = make_mask(), SafetyMask({NAMES[0]: torch.tensor([3, 900])}, {NAMES[0]: (32, 32)})

    def found(acting_only: bool = False, **held: Any) -> SafetyMask | None:
        return held_weights({"held": held}, {"kept": {"mask": first.state_dict()}}, acting_only=acting_only)

    weight, neuron = {"granularity": "weight"}, {"granularity": "neuron", "mask": second.state_dict()}
    assert found() is None
    assert found(kept=weight) == first
    assert found(kept=neuron) == second
    # Rows of an adapter that stand still need no mask.
    assert found(acting_only=True, kept=neuron) is None
    assert found(acting_only=True, kept=weight, other=neuron) == first
    both = found(kept=weight, other=neuron)
    assert both is not None
    assert set(both.indices[NAMES[0]].tolist()) == {*first.indices[NAMES[0]].tolist(), 3, 900}
    assert torch.equal(both.indices[NAMES[1]], first.indices[NAMES[1]])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_of_a_quantised_base_are_merged_into_the_dense_one(
    tiny_tokenizer: Any, tmp_path: Path, quantization: Any
) -> None:
    make_tiny_model(hidden_size=64).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    module, checkpoint = save_checkpoint(tmp_path / "base", tmp_path, quantization=quantization)
    output = export_checkpoint(checkpoint, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert "quantization" not in (output / "config.json").read_text()
    assert merged.dtype == torch.float32
    dense = load_causal_lm(tmp_path / "base")
    layer = module.language_model.model.layers[1].mlp.up_proj
    name = "model.layers.1.mlp.up_proj.weight"
    expected = dense.get_parameter(name) + 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(merged.get_parameter(name), expected, atol=1e-6)
    adapter = export_checkpoint(checkpoint, tmp_path / "adapter", adapter=True)
    loaded = peft.PeftModel.from_pretrained(load_causal_lm(tmp_path / "base", quantization=quantization), adapter)
    assert torch.equal(loaded(TOKENS).logits, module(TOKENS))


def test_the_command(base: Path, tmp_path: Path, capsys: Any) -> None:
    _, checkpoint = save_checkpoint(base, tmp_path, SafetyPreservingAdaptation(mask=make_mask()))
    main(["export", str(checkpoint), "-o", str(tmp_path / "merged")])
    check_held(load_causal_lm(tmp_path / "merged"), load_causal_lm(base), make_mask())
    main(["export", str(checkpoint), "-o", str(tmp_path / "adapter"), "--adapter", "true"])
    assert (tmp_path / "adapter" / MASK_FILE).is_file()
    assert f"Exported: {tmp_path / 'adapter'}" in capsys.readouterr().out


def test_the_base_is_looked_for_where_it_is_said_to_be(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    module, checkpoint = save_checkpoint(make_tiny_model(attention_bias=True), tmp_path, tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="`base` expected to name the model that the adapters were trained on"):
        export_checkpoint(checkpoint, tmp_path / "merged")
    make_tiny_model(attention_bias=True, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="expected the base model that its adapters were trained on but 15 of 28"):
        export_checkpoint(checkpoint, tmp_path / "merged", base=tmp_path / "other")
    assert not (tmp_path / "merged").exists()
    merged = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, tmp_path / "merged", base=base))
    assert (merged(TOKENS).logits - module(TOKENS)).abs().max() <= 1e-5


def test_code_that_a_checkpoint_names_is_not_run(base: Path, tmp_path: Path) -> None:
    _, checkpoint = save_checkpoint(base, tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match="comes with Python code of its own"):
        export_checkpoint(checkpoint, tmp_path / "merged")
    assert export_checkpoint(checkpoint, tmp_path / "merged", base=base).is_dir()


def test_base_weights_that_trained_too_are_merged_and_never_left_out(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = CausalLanguageModule(base, lora={"target_modules": ["q_proj", "v_proj"]}, learning_rate=1e-2)
    module.language_model.model.norm.weight.requires_grad_(True)
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.fit(module, datamodule=InstructionDataModule(make_examples(8), batch_size=4))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    merged = AutoModelForCausalLM.from_pretrained(export_checkpoint(tmp_path / "fit.ckpt", tmp_path / "merged"))
    assert (merged(TOKENS).logits - module.eval()(TOKENS)).abs().max() <= 1e-5
    with pytest.raises(ValueError, match=r"it also trained 1 weights of the base \(such as `model.norm.weight`\)"):
        export_checkpoint(tmp_path / "fit.ckpt", tmp_path / "adapter", adapter=True)


def test_an_adapter_on_a_tied_head_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    module, checkpoint = save_checkpoint(base, tmp_path, lora={"target_modules": ["lm_head", "v_proj"]})
    with pytest.raises(ValueError, match="is one weight under 2 names"):
        export_checkpoint(checkpoint, tmp_path / "merged")
    export_checkpoint(checkpoint, tmp_path / "adapter", adapter=True)
    loaded = peft.PeftModel.from_pretrained(load_causal_lm(base), tmp_path / "adapter")
    assert torch.equal(loaded(TOKENS).logits, module(TOKENS))


def test_adapters_of_other_modules_and_checkpoints_without(tiny_tokenizer: Any, base: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.layer.lora_A.default.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"1 adapter weights of another module.*`merge_held_adapter`"):
        export_checkpoint(tmp_path / "other.ckpt", tmp_path / "merged")
    _, checkpoint = save_checkpoint(base, tmp_path, lora=None)
    with pytest.raises(ValueError, match="`adapter` expected the checkpoint of a CausalLanguageModule with `lora`"):
        export_checkpoint(checkpoint, tmp_path / "adapter", adapter=True)
