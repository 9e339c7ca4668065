# SPDX-License-Identifier: Apache-2.0
"""LoRA in `CausalLanguageModule`: what trains, what its arguments are, and the model it starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from pytorch_lightning.cli import LightningCLI

from lightning_safety.language import find_language_model, generate_replies
from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from lightning_safety.training.adapters import LORA_ARGUMENTS, adapters_off, base_names
from tests.tiny import make_tiny_model
from tests.training.fits import make_examples, make_trainer
from tests.training.test_module import RETENTION, Record

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tie_word_embeddings|is_gradient_checkpointing|not have many workers)"
)
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.3}
TOKENS = torch.arange(3, 43).reshape(2, 20)


def make_module(tokenizer: Any, lora: dict[str, Any] | None = LORA, **options: Any) -> CausalLanguageModule:
    torch.manual_seed(3)
    base = options.pop("model", None) or make_tiny_model()
    return CausalLanguageModule(base, tokenizer=tokenizer, lora=lora, **{"learning_rate": 1e-2, **options})


def fit(
    module: CausalLanguageModule, folder: Path, callbacks: Any = (), ckpt: Path | None = None, **options: Any
) -> Any:
    data = options.pop("data", None) or InstructionDataModule(train=make_examples(14), batch_size=4)
    trainer = make_trainer(folder, callbacks, **{"max_epochs": 3, **options})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return trainer


def test_adapters_train_and_nothing_else(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module, record = make_module(tiny_tokenizer), Record()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, tmp_path, [record], max_epochs=8)
    losses = [metrics["train/loss"] for metrics in record.metrics]
    assert losses[-1] < 0.97 * losses[0]
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name in before if ".lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    layer = find_language_model(module).model.layers[0].mlp.up_proj
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (4, 4.0, 0.3)
    assert module.hparams["lora"] == LORA


def test_the_language_model_is_found_and_generates(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = make_module(tiny_tokenizer)
    assert find_language_model(module) is module.language_model
    plain = generate_replies(make_tiny_model(), tiny_tokenizer, ["Hello", "What is it?"], max_new_tokens=5)
    # Untrained adapters add nothing.
    assert generate_replies(module.language_model, tiny_tokenizer, ["Hello", "What is it?"], max_new_tokens=5) == plain
    fit(module, tmp_path)
    module.eval()
    assert torch.equal(module(TOKENS), module.language_model(TOKENS).logits)
    assert not torch.equal(module(TOKENS), make_tiny_model()(TOKENS).logits)


def test_yaml_holds_all_arguments(tiny_tokenizer: Any) -> None:
    lora = yaml.safe_load("{r: 2, target_modules: [q_proj], modules_to_save: [lm_head], use_rslora: true, bias: none}")
    module = make_module(tiny_tokenizer, lora)
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert len(trained) == 5
    assert "model.base_model.model.lm_head.modules_to_save.default.weight" in trained
    assert make_module(tiny_tokenizer, {}).hparams["lora"] == {}
    assert set(LORA_ARGUMENTS) <= set(peft.LoraConfig.__dataclass_fields__)


def test_instantiated_by_lightnings_cli(tiny_tokenizer: Any, tmp_path: Path) -> None:
    make_tiny_model(hidden_size=64).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    lora = {"r": 8, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}}
    settings = {"source": str(tmp_path / "model"), "lora": lora, "quantization": "nf4"}
    configuration = {"model": {"class_path": "lightning_safety.training.CausalLanguageModule", "init_args": settings}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration))
    words = [f"--config={tmp_path / 'config.yaml'}", "--model.init_args.lora.r=2"]
    made = LightningCLI(subclass_mode_model=True, model_class=None, args=words, run=False)
    assert isinstance(made.model, CausalLanguageModule)
    assert made.model.hparams["lora"] == lora | {"r": 2}
    layer = made.model.language_model.model.layers[0].self_attn
    assert (layer.q_proj.r["default"], layer.v_proj.r["default"]) == (2, 3)
    assert type(layer.q_proj.get_base_layer()).__name__ == "Linear4bit"


def test_gradient_checkpointing_changes_no_loss(tiny_tokenizer: Any, tmp_path: Path) -> None:
    losses = []
    for gradient_checkpointing in (False, True):
        record = Record()
        options = {"gradient_checkpointing": gradient_checkpointing}
        fit(make_module(tiny_tokenizer, {"r": 2}, **options), tmp_path, [record], max_epochs=1)
        losses.append([metrics["train/loss"] for metrics in record.metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_retention_is_towards_the_model_without_adapters(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A fit with adapters off as start model has the losses of a fit with a copy as start model."""
    metrics = []
    for options in ({"r": 4}, {"r": 4, "modules_to_save": ["lm_head"]}):
        for copied in (False, True):
            record = Record()
            module = make_module(tiny_tokenizer, options, retention_weight=2.0)
            if copied:
                module._start_model = (make_tiny_model().requires_grad_(False),)
            data = InstructionDataModule(train=RETENTION, batch_size=4)
            fit(module, tmp_path, [record], data=data, gradient_clip_val=0.5)
            metrics.append([(step["train/loss"], step["train/retention"]) for step in record.metrics])
        assert metrics[-1] == metrics[-2]
        assert metrics[-1][0][1] == pytest.approx(0, abs=1e-6)
        assert metrics[-1][-1][1] > 1e-4


def test_adapters_off_leaves_no_trace(tiny_tokenizer: Any) -> None:
    module = make_module(tiny_tokenizer, {**LORA, "modules_to_save": ["lm_head"]})
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                weight.add_(0.1)
            if ".0.self_attn.q_proj.lora_A" in name:
                weight.requires_grad_(False)
    module.model.get_submodule("base_model.model.model.layers.1").eval()
    required = [weight.requires_grad for weight in module.parameters()]
    modes = [part.training for part in module.modules()]
    with adapters_off(module.model):
        assert torch.equal(module.language_model(TOKENS).logits, make_tiny_model()(TOKENS).logits)
    assert [weight.requires_grad for weight in module.parameters()] == required
    assert [part.training for part in module.modules()] == modes
    assert not torch.equal(module.eval()(TOKENS), make_tiny_model()(TOKENS).logits)


def trained_adapter() -> Any:
    model = peft.get_peft_model(make_tiny_model(), peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    return {"model": model, "lora": None, "retention_weight": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"lora": {"lora_alfa": 8}}, "got 'lora_alfa'. Did you mean `lora_alpha`"),
        (lambda: {"lora": {"task_type": "CAUSAL_LM"}}, "always 'CAUSAL_LM'"),
        (lambda: {"lora": {"kasa_config": {}}}, "pass it as `source`"),
        (lambda: {"lora": {"r": 0}}, "the rank, expected to be an integer of at least 1 but got 0"),
        (lambda: {"lora": {"r": "8"}}, "the rank, expected to be an integer"),
        (lambda: {"lora": {"lora_dropout": 1.5}}, r"expected to be a number in \[0, 1\) but got 1.5"),
        (lambda: {"lora": {"init_lora_weights": "pissa"}}, "change the base weights"),
        (lambda: {"lora": {"init_lora_weights": 1}}, "to be a boolean or one of"),
        (lambda: {"lora": {"target_modules": ["nothing"]}}, "Target modules"),
        (lambda: {"quantization": "nf4", "lora": None}, "expected `lora` beside it but got None"),
        (lambda: {"quantization": "nf4"}, "expected a `source` to load but got a loaded model"),
        (lambda: {"quantization": "nf5"}, "expected to be one of 'nf4', 'int8' but got 'nf5'. Did you mean `nf4`"),
        (lambda: {"retention_weight": 1.0, "lora": {"bias": "all"}, "biased": True}, "4 of its weights train"),
        (trained_adapter, "expected adapters that add nothing yet"),
        (lambda: trained_adapter() | {"lora": {}}, "expected a model without adapters"),
    ],
)
def test_bad_arguments(tiny_tokenizer: Any, options: Callable[[], dict[str, Any]], message: str) -> None:
    values = options()
    if values.pop("biased", False):
        values["model"] = make_tiny_model(attention_bias=True, num_hidden_layers=1)
    with pytest.raises(ValueError, match=message):
        make_module(tiny_tokenizer, **values)


@pytest.mark.parametrize("lora", [[("r", 2)], "r=2", {"target_modules": {"q_proj"}}])
def test_arguments_of_other_types(tiny_tokenizer: Any, lora: Any) -> None:
    with pytest.raises(TypeError, match=r"`lora` expected to (be a mapping|hold plain values)"):
        make_module(tiny_tokenizer, lora)


def test_base_names_are_those_that_no_training_changes(tiny_tokenizer: Any) -> None:
    module = make_module(tiny_tokenizer, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    names = base_names(module)
    assert "model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" in names
    assert "model.base_model.model.lm_head.original_module.weight" in names
    assert not any("lora_" in name or "modules_to_save" in name for name in names)
    module.language_model.model.norm.weight.requires_grad_(True)
    assert names - base_names(module) == {"model.base_model.model.model.norm.weight"}
