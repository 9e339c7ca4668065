# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lightning_safety.training import CausalLanguageModule, InstructionDataModule, export_checkpoint
from tests.tiny import make_tiny_model
from tests.training.fits import make_examples, make_trainer

TOKENS = torch.arange(3, 40).reshape(1, -1)


def save_checkpoint(module: pl.LightningModule, folder: Path) -> Path:
    trainer = make_trainer(folder, max_steps=1)
    trainer.fit(module, datamodule=InstructionDataModule(make_examples(4)))
    trainer.save_checkpoint(folder / "fit.ckpt")
    return folder / "fit.ckpt"


class OwnModule(pl.LightningModule):
    """What a user may have: models as attributes, at any depth."""

    def __init__(self, tokenizer: Any, **models: torch.nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.parts = torch.nn.ModuleDict(models)

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return next(iter(self.parts.values()))(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"dtype": torch.bfloat16}], ids=str)
def test_the_folder_holds_the_trained_model_and_the_tokenizer(
    tiny_tokenizer: Any, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    overrides = dict(overrides)
    dtype = overrides.pop("dtype", torch.float32)
    make_tiny_model(**overrides).save_pretrained(tmp_path / "start")
    # Not `.to(dtype)`: that would round the buffers of the position embedding too.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=dtype)
    model.generation_config.max_new_tokens = 77
    module = CausalLanguageModule(model, tokenizer=tiny_tokenizer, learning_rate=1e-2)
    output = export_checkpoint(save_checkpoint(module, tmp_path), tmp_path / "exported")
    assert (output / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert loaded.dtype == dtype
    assert loaded.generation_config.max_new_tokens == 77
    model.eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert not torch.equal(loaded(TOKENS).logits.float(), make_tiny_model()(TOKENS).logits)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer("Hello <|im_end|> there")["input_ids"] == tiny_tokenizer("Hello <|im_end|> there")["input_ids"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".partial")] == []


def test_mixture_of_experts(tiny_tokenizer: Any, tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model = MixtralForCausalLM(config)
    checkpoint = save_checkpoint(CausalLanguageModule(model, tokenizer=tiny_tokenizer, learning_rate=1e-2), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, tmp_path / "exported"))
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


def test_a_users_module_with_the_architecture_from_base(tiny_tokenizer: Any, tmp_path: Path) -> None:
    make_tiny_model(seed=5).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = make_tiny_model()
    checkpoint = save_checkpoint(OwnModule(tiny_tokenizer, policy=model, head=torch.nn.Linear(2, 2)), tmp_path)
    with pytest.raises(ValueError, match="`base` expected to name the model"):
        export_checkpoint(checkpoint, tmp_path / "exported")
    output = export_checkpoint(checkpoint, tmp_path / "exported", base=tmp_path / "base")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(output)(TOKENS).logits, model.eval()(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(output).chat_template == tiny_tokenizer.chat_template


def test_a_compiled_model(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = CausalLanguageModule(make_tiny_model(), tokenizer=tiny_tokenizer)
    checkpoint = save_checkpoint(module, tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"] = {
        name.replace("model.", "model._orig_mod.", 1): value for name, value in content["state_dict"].items()
    }
    torch.save(content, checkpoint)
    output = export_checkpoint(checkpoint, tmp_path / "exported")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(output)(TOKENS).logits, module.model.eval()(TOKENS).logits)


def test_another_architecture_or_two_models_are_errors_that_list_what_is_there(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    make_tiny_model(hidden_size=16).save_pretrained(tmp_path / "small")
    make_tiny_model().save_pretrained(tmp_path / "base")
    for folder in ("small", "base"):
        tiny_tokenizer.save_pretrained(tmp_path / folder)
    checkpoint = save_checkpoint(
        OwnModule(tiny_tokenizer, policy=make_tiny_model(), critic=make_tiny_model()), tmp_path
    )
    with pytest.raises(ValueError, match=r"holds 2: \['parts.policy.', 'parts.critic.'\]"):
        export_checkpoint(checkpoint, tmp_path / "exported", base=tmp_path / "base")
    with pytest.raises(ValueError, match=r"under \['parts'\].*have another shape .such as 'model.embed_tokens.weight'"):
        export_checkpoint(checkpoint, tmp_path / "exported", base=tmp_path / "small")
    assert not (tmp_path / "exported").exists()


def test_adapters_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.layer.lora_A.default.weight": torch.zeros(2)}}, tmp_path / "fit.ckpt")
    with pytest.raises(ValueError, match=r"holds 1 adapter weights.*merge_and_unload"):
        export_checkpoint(tmp_path / "fit.ckpt", tmp_path / "exported")


def test_output_that_is_there_is_kept(tiny_tokenizer: Any, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(CausalLanguageModule(make_tiny_model(), tokenizer=tiny_tokenizer), tmp_path)
    output = tmp_path / "exported"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="`output` expected to be a new or empty folder"):
        export_checkpoint(checkpoint, output)
    with pytest.raises(FileExistsError):
        export_checkpoint(checkpoint, output / "notes.txt")
    (output / "notes.txt").unlink()
    assert (export_checkpoint(checkpoint, output) / "config.json").is_file()


def test_nothing_is_left_if_writing_fails(tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = save_checkpoint(CausalLanguageModule(make_tiny_model(), tokenizer=tiny_tokenizer), tmp_path)
    before = set(tmp_path.iterdir())

    def fail(self: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(checkpoint, tmp_path / "exported")
    assert set(tmp_path.iterdir()) == before


class Opaque:
    """Not a tensor and not a plain value."""


@pytest.mark.parametrize(
    "content",
    [b"", b"no checkpoint", {"weights": 1}, {"state_dict": {}, "own": Opaque()}],
    ids=["empty", "text", "weights", "opaque"],
)
def test_other_files_are_errors(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "fit.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="`checkpoint` expected to be a Lightning checkpoint"):
        export_checkpoint(path, tmp_path / "exported")
    with pytest.raises(FileNotFoundError, match="`checkpoint` expected to be a file"):
        export_checkpoint(tmp_path / "missing.ckpt", tmp_path / "exported")


def test_files_outside_the_folder_are_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(CausalLanguageModule(make_tiny_model(), tokenizer=tiny_tokenizer), tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["language_model_files"]["../evil.json"] = torch.tensor(list(json.dumps({}).encode()), dtype=torch.uint8)
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match="files of one folder"):
        export_checkpoint(checkpoint, tmp_path / "exported")
    assert not (tmp_path / "evil.json").exists()
