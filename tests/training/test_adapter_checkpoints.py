# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of adapters holds, and that a fit resumed from it is an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from tests.tiny import make_tiny_model
from tests.training.fits import make_examples
from tests.training.test_adapters import LORA, fit, make_module

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tie_word_embeddings|is_gradient_checkpointing|not have many workers)"
)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": LORA,
    "biases": {**LORA, "bias": "all"},
    "copies": {**LORA, "modules_to_save": ["lm_head"]},
    "dora": {**LORA, "use_dora": True},
    "embeddings": {**LORA, "target_modules": ["embed_tokens", "v_proj"]},
    "parameters": {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_resumed_is_uninterrupted_and_checkpoints_hold_no_base(tiny_tokenizer: Any, tmp_path: Path, kind: str) -> None:
    def make() -> CausalLanguageModule:
        model = make_tiny_model(attention_bias=True, tie_word_embeddings=False)
        return make_module(tiny_tokenizer, OPTIONS[kind], model=model, schedule="cosine")

    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    module = make()
    fit(module, tmp_path, [saver])
    whole = {name: value.clone() for name, value in module.state_dict().items()}
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 4
    for path in paths:
        content = torch.load(path, weights_only=True)
        assert content["state_dict"].keys() == trained
        # Another beginning: everything must come from the checkpoint.
        torch.manual_seed(99)
        resumed = make()
        torch.manual_seed(98)
        fit(resumed, tmp_path, ckpt=path)
        assert all(torch.equal(value, whole[name]) for name, value in resumed.state_dict().items()), path.name


def test_resumed_with_another_seed_would_differ(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Dropout draws random numbers, so that the test above could fail."""
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    module = make_module(tiny_tokenizer)
    fit(module, tmp_path, [saver])
    path = tmp_path / "step=3.ckpt"
    content = torch.load(path, weights_only=True)
    del content["random_state"]
    torch.save(content, path)
    resumed = make_module(tiny_tokenizer)
    torch.manual_seed(98)
    fit(resumed, tmp_path, ckpt=path)
    assert any(not torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_checkpoint_loads_with_its_base_from_the_source(tiny_tokenizer: Any, tmp_path: Path, recwarn: Any) -> None:
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    module = CausalLanguageModule(tmp_path / "base", lora=LORA, learning_rate=1e-2)
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    assert (tmp_path / "fit.ckpt").stat().st_size < 800_000
    loaded = CausalLanguageModule.load_from_checkpoint(tmp_path / "fit.ckpt", weights_only=True)
    assert loaded.hparams == module.hparams
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not [warning for warning in recwarn if "keys" in str(warning.message)]
    make_tiny_model(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"adapters were trained on but 15 of 20 of its weights differ, such as `model.emb"
    ):
        CausalLanguageModule.load_from_checkpoint(tmp_path / "fit.ckpt", weights_only=True)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_in_no_checkpoint_and_resumes_exactly(
    tiny_tokenizer: Any, tmp_path: Path, quantization: Any
) -> None:
    make_tiny_model(hidden_size=64).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")

    def make() -> CausalLanguageModule:
        torch.manual_seed(3)
        lora = {**LORA, "modules_to_save": ["lm_head"]}
        return CausalLanguageModule(tmp_path / "base", lora=lora, quantization=quantization, learning_rate=1e-2)

    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    module, data = make(), InstructionDataModule(train=make_examples(14), val=make_examples(3), batch_size=4)
    # The sanity check is a forward pass without gradients, after which bitsandbytes may repack a 4-bit weight.
    fit(module, tmp_path, [saver], data=data, num_sanity_val_steps=1)
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    for path in (tmp_path / "step=5.ckpt", tmp_path / "step=10.ckpt"):
        assert torch.load(path, weights_only=True)["state_dict"].keys() == trained
        torch.manual_seed(99)
        resumed = make()
        fit(resumed, tmp_path, data=data, ckpt=path)
        for name in trained:
            assert torch.equal(resumed.state_dict()[name], module.state_dict()[name]), name
    loaded = CausalLanguageModule.load_from_checkpoint(tmp_path / "step=10.ckpt", weights_only=True)
    assert loaded.hparams["quantization"] == quantization
    moved = [name for name in trained if not torch.equal(make().state_dict()[name], module.state_dict()[name])]
    assert len(moved) == len(trained)


def test_checkpoints_of_other_adapters_are_errors(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer = fit(make_module(tiny_tokenizer, {"r": 2, "target_modules": ["q_proj"]}), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    more = make_module(tiny_tokenizer, {"r": 2, "target_modules": ["q_proj", "v_proj"]})
    with pytest.raises(
        ValueError, match=r"4 of its weights are missing and 0 others are there, such as .*v_proj.lora_A"
    ):
        fit(more, tmp_path, ckpt=tmp_path / "fit.ckpt")
    other = make_module(tiny_tokenizer, {"r": 2, "target_modules": ["v_proj"]})
    with pytest.raises(ValueError, match="4 of its weights are missing and 4 others are there"):
        fit(other, tmp_path, ckpt=tmp_path / "fit.ckpt")
    with pytest.raises(ValueError, match="expected to hold a whole model but holds adapters alone"):
        fit(make_module(tiny_tokenizer, None), tmp_path, ckpt=tmp_path / "fit.ckpt")


def test_a_peft_model_of_the_users_own(tiny_tokenizer: Any, tmp_path: Path) -> None:
    def make() -> CausalLanguageModule:
        model = peft.get_peft_model(make_tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["v_proj"]))
        model.base_model.set_adapter(["default", "other"])
        return make_module(tiny_tokenizer, None, model=model)

    module = make()
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    content = torch.load(tmp_path / "fit.ckpt", weights_only=True)
    assert {name.split("lora_")[1] for name in content["state_dict"]} == {
        f"{part}.{adapter}.weight" for part in "AB" for adapter in ("default", "other")
    }
    assert content["language_model_adapters"]["active"] == ["default", "other"]
    resumed = make()
    fit(resumed, tmp_path, ckpt=tmp_path / "fit.ckpt")
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())
