# SPDX-License-Identifier: Apache-2.0
"""A saved adapter comes back as it was trained, and warns whoever loads it another way."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_safety.enforcement.adapter_files import HELD_KEY, MASK_FILE, load_held_adapter, save_held_adapter
from lightning_safety.enforcement.entries import count_different_bits, gather_entries
from lightning_safety.enforcement.held_lora import HeldLora, held_mask
from lightning_safety.enforcement.merge import merge_held_adapter
from lightning_safety.language import load_causal_lm
from lightning_safety.scoring import SafetyMask
from tests.enforcement.adapted import TOKENS, make_adapted, make_mask, make_tiny_gpt2
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|tie_word_embeddings|is_gradient_checkpointing)")
WEIGHTS = "adapter_model.safetensors"


def save(model: Any, folder: Path) -> torch.Tensor:
    """Save a model as held by a mask, and return what it computes."""
    mask = make_mask(model)
    HeldLora(mask).attach(model, continued=True)
    save_held_adapter(model, mask, folder)
    logits: torch.Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize(
    ("make_base", "options"),
    [
        (make_tiny_model, {}),
        (make_tiny_model, {"use_rslora": True, "lora_dropout": 0.1}),
        (lambda: make_tiny_model(attention_bias=True), {"bias": "all"}),
        (make_tiny_gpt2, {}),
        (make_tiny_model, {"modules_to_save": ["lm_head"]}),
    ],
    ids=["plain", "rank-stabilised", "biases", "transposed", "copied head"],
)
def test_a_loaded_adapter_computes_the_same_bits_without_a_warning(
    tmp_path: Path, make_base: Callable[[], Any], options: dict[str, Any]
) -> None:
    model = make_adapted(make_base(), **options)
    for name, weight in model.named_parameters():
        # Whatever trains beside the product: biases, a copied head.
        if weight.requires_grad and "lora_" not in name:
            weight.data += 0.01
    logits = save(model, tmp_path / "adapter")
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded, holder = load_held_adapter(make_base(), tmp_path / "adapter")
    assert not [warning for warning in caught if HELD_KEY in str(warning.message) or "missing" in str(warning.message)]
    assert torch.equal(loaded(TOKENS).logits, logits)
    assert held_mask(loaded) == holder.mask == make_mask(model)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    # Without what was attached it is another model, so that the comparison above could fail.
    holder.release()
    assert (loaded(TOKENS).logits - logits).abs().max() > 1e-3


def test_saved_loaded_and_merged(tmp_path: Path) -> None:
    logits = save(make_adapted(make_tiny_model()), tmp_path / "adapter")
    loaded, holder = load_held_adapter(make_tiny_model(), tmp_path / "adapter")
    merged = merge_held_adapter(loaded, holder.mask)
    assert (merged(TOKENS).logits - logits).abs().max() <= 1e-5


def load_by_transformers(folder: Path) -> Any:
    model = make_tiny_model()
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_a_quantised_base_and_merged_into_the_dense_one(tmp_path: Path, quantization: Any) -> None:
    make_tiny_model(hidden_size=64).save_pretrained(tmp_path / "base")
    logits = save(make_adapted(load_causal_lm(tmp_path / "base", quantization=quantization)), tmp_path / "adapter")
    loaded, holder = load_held_adapter(
        load_causal_lm(tmp_path / "base", quantization=quantization), tmp_path / "adapter"
    )
    assert torch.equal(loaded(TOKENS).logits, logits)
    with pytest.raises(ValueError, match=r"is quantised .*`load_held_adapter`"):
        merge_held_adapter(loaded, holder.mask)
    dense = load_causal_lm(tmp_path / "base")
    merged = merge_held_adapter(
        load_held_adapter(load_causal_lm(tmp_path / "base"), tmp_path / "adapter")[0], holder.mask
    )
    for name, indices in holder.mask.indices.items():
        kept = (gather_entries(model.get_parameter(name), indices) for model in (merged, dense))
        assert count_different_bits(*kept) == 0


PLAIN_LOADERS: dict[str, Callable[[Path], Any]] = {
    "PeftModel": lambda folder: peft.PeftModel.from_pretrained(make_tiny_model(), folder),
    "load_adapter": load_by_transformers,
    "AutoPeftModel": lambda folder: peft.AutoPeftModelForCausalLM.from_pretrained(folder),
    "AutoModel": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
}


@pytest.mark.parametrize("loader", PLAIN_LOADERS)
def test_whoever_loads_it_without_us_is_warned(tmp_path: Path, loader: str) -> None:
    make_tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    logits = save(make_adapted(base), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="held_weights_need_lightning_safety_load_held_adapter"):
        loaded = PLAIN_LOADERS[loader](tmp_path / "adapter")
    assert (loaded(TOKENS).logits - logits).abs().max() > 1e-3


def test_the_folder_says_what_it_needs(tmp_path: Path) -> None:
    save(make_adapted(make_tiny_model()), tmp_path / "adapter")
    files = {entry.name for entry in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", WEIGHTS, MASK_FILE, "README.md"}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[HELD_KEY] == MASK_FILE
    header, _, card = (tmp_path / "adapter" / "README.md").read_text().removeprefix("---\n").partition("---\n")
    assert "library_name: peft" in header
    assert card.strip().startswith("> **This adapter was trained while ")
    assert "load_held_adapter" in card


def test_several_adapters_in_one_folder(tmp_path: Path) -> None:
    model = make_adapted(make_tiny_model(), adapters=("default", "other"))
    save(model, tmp_path / "adapter")
    loaded, _ = load_held_adapter(make_tiny_model(), tmp_path / "adapter")
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    with pytest.warns(UserWarning, match=HELD_KEY):
        peft.PeftModel.from_pretrained(make_tiny_model(), tmp_path / "adapter" / "other")
    alone, _ = load_held_adapter(make_tiny_model(), tmp_path / "adapter" / "other")
    assert torch.equal(alone(TOKENS).logits, model(TOKENS).logits)
    name = next(name for name, indices in make_mask(model).indices.items() if len(indices))
    changed = SafetyMask({name: torch.tensor([1])}, {name: make_mask(model).shapes[name]})
    changed.save(tmp_path / "adapter" / "other" / MASK_FILE)
    with pytest.raises(ValueError, match=r"the adapters default, other in .* have different ones"):
        load_held_adapter(make_tiny_model(), tmp_path / "adapter")


def test_an_adapter_under_another_name_only(tmp_path: Path) -> None:
    logits = save(make_adapted(make_tiny_model(), adapters=("mine",)), tmp_path / "adapter")
    loaded, _ = load_held_adapter(make_tiny_model(), tmp_path / "adapter")
    assert loaded.active_adapters == ["mine"]
    assert torch.equal(loaded(TOKENS).logits, logits)


def test_trained_further(tmp_path: Path) -> None:
    save(make_adapted(make_tiny_model()), tmp_path / "adapter")
    loaded, holder = load_held_adapter(make_tiny_model().train(), tmp_path / "adapter", trainable=True)
    assert loaded.training
    trained = {name for name, weight in loaded.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in loaded.named_parameters() if "lora_" in name}
    # The callback attaches a holder of its own, which takes the place of this one.
    HeldLora(holder.mask).attach(loaded)
    assert holder.layers == 0


def corrupt(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(weights, folder / WEIGHTS)


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / MASK_FILE).unlink(), FileNotFoundError, "expected to hold the mask of adapter"),
        (edit(**{HELD_KEY: None}), FileNotFoundError, "whose training held nothing is loaded with `peft.PeftModel"),
        (lambda folder: (folder / MASK_FILE).write_bytes(b"half"), ValueError, "cannot be read"),
        (lambda folder: (folder / WEIGHTS).unlink(), FileNotFoundError, "expected to hold `adapter_model.safetensors`"),
        (corrupt, ValueError, "is damaged or no safetensors file"),
        (drop_a_weight, ValueError, "1 weights are missing and 0 have no place, such as .*up_proj.lora_B"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), ValueError, "expected to be a configuration"),
        (lambda folder: (folder / "adapter_config.json").write_text("[1]"), ValueError, "expected to be a configurat"),
        (edit(peft_type="IA3"), ValueError, "its `peft_type` is 'IA3'"),
        (edit(use_dora=True), ValueError, "weights are missing"),
        (edit(r=2), ValueError, "expected to fit the model but adapter 'default' does not: .*size mismatch"),
        (edit(init_lora_weights="pissa_niter_4"), ValueError, "expected to leave the base weights as they are"),
        (shutil.rmtree, FileNotFoundError, "is no folder"),
        (lambda folder: (folder / "adapter_config.json").unlink(), FileNotFoundError, "has none"),
    ],
)
def test_a_damaged_folder_is_an_error_and_the_model_stays_as_it_was(
    tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    save(make_adapted(make_tiny_model(), modules_to_save=["lm_head"]), tmp_path / "adapter")
    damage(tmp_path / "adapter")
    model = make_tiny_model().train()
    modules = list(model.modules())
    with pytest.raises(error, match=f"(?s){message}"):
        load_held_adapter(model, tmp_path / "adapter")
    assert list(model.modules()) == modules
    assert all(weight.requires_grad for weight in model.parameters())
    assert model.training
    assert torch.equal(model(TOKENS).logits, make_tiny_model()(TOKENS).logits)
    assert not hasattr(model, "peft_config")


def test_another_model_is_an_error(tmp_path: Path) -> None:
    save(make_adapted(make_tiny_model()), tmp_path / "adapter")
    model = make_tiny_model(intermediate_size=48)
    with pytest.raises(ValueError, match="`mask` expected to fit the model"):
        load_held_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has adapters already"):
        load_held_adapter(make_adapted(make_tiny_model()), tmp_path / "adapter")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = make_adapted(make_tiny_model())
    mask = make_mask(model)
    with pytest.raises(TypeError, match="`model` expected to be a PeftModel"):
        save_held_adapter(make_tiny_model(), mask, tmp_path / "adapter")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LoRA variant DoRA"):
        save_held_adapter(make_adapted(make_tiny_model(), use_dora=True), mask, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'` changes them"):
        save_held_adapter(make_adapted(make_tiny_model(), init_lora_weights="pissa"), mask, tmp_path / "adapter")
    HeldLora(mask).attach(model, continued=True)
    with pytest.raises(ValueError, match="selects other weights"):
        save_held_adapter(model, make_mask(model, seed=9), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    save_held_adapter(model, mask, tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="`folder` expected to be a new or empty folder"):
        save_held_adapter(model, mask, tmp_path / "adapter")
