# SPDX-License-Identifier: Apache-2.0
"""`SparseDelta` on bases in 4 and 8 bits: the difference acts, and the packed bytes stay as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_safety.enforcement import SafetyPatch, SparseDelta
from lightning_safety.enforcement.delta_layer import delta_layers
from lightning_safety.enforcement.state_file import fingerprint, read_weights, restore_weights
from lightning_safety.language import named_weights
from lightning_safety.language.quantized import keep_unpacked
from lightning_safety.scoring import SafetyMask
from tests.enforcement.adapters import loss_of, relative_distance
from tests.enforcement.deltas import OPTIMIZERS, count_traces, logits_of, make_base, make_mask, train, train_dense
from tests.quantized import dense_twin, make_quantized_model, repacks, same_bits
from tests.tiny import make_tiny_model

FOUR_BIT = ["nf4", "nf4-double", "fp4", "nf4-in-bfloat16"]
# Eight bits quantise what goes into a layer too.
TOLERANCE = {"int8": 0.02}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Quantised weights as well: whoever passes all parameters passes them."""
    return OPTIMIZERS["adamw"](model.parameters())


def state_of(model: nn.Module) -> dict[str, Any]:
    """Weights and scales, packed as they are."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    # The first pass moves the scales of eight-bit weights.
    assert before.keys() - now.keys() <= {name for name in before if name.endswith("SCB")}
    assert all(same_bits(now[name], value) for name, value in before.items() if name in now)


def fit(model: nn.Module, mask: SafetyMask, steps: int = 4, **options: Any) -> SparseDelta:
    optimizer = adamw(model)
    delta = SparseDelta(mask).attach(model, [optimizer], **options)
    train(model, optimizer, steps)
    return delta


@pytest.mark.parametrize("kind", [*FOUR_BIT, "int8"])
def test_computes_what_the_dequantised_model_with_the_patch_does(kind: str, tmp_path: Path) -> None:
    model = make_quantized_model(kind)
    mask, packed = make_mask(model), state_of(model)
    delta = fit(model, mask)
    delta.patch({"made_by": "test"}).save(tmp_path / "patch")
    during = logits_of(model)
    delta.settle()
    assert torch.equal(logits_of(model), during)
    assert_same_state(model, packed)
    patch = SafetyPatch.load(tmp_path / "patch")
    assert patch.changed == patch.count == mask.count
    with pytest.raises(ValueError, match=r"quantised in the model, .* cannot be read or written one by one"):
        patch.apply(model)
    for dense in (dense_twin(model), make_quantized_model(kind).dequantize()):
        before, base = state_of(dense), logits_of(dense)
        patch.apply(dense)
        assert relative_distance(during, logits_of(dense)) <= TOLERANCE.get(kind, 1e-5)
        assert relative_distance(base, logits_of(dense)) > 0.1
        patch.revert(dense)
        assert_same_state(dense, before)


@pytest.mark.parametrize("kind", [*FOUR_BIT, "int8"])
def test_trains_as_the_dequantised_model_does(kind: str) -> None:
    model = make_quantized_model(kind)
    mask, steps = make_mask(model), 5 if kind == "int8" else 20
    dense = train_dense(dense_twin(model), mask, OPTIMIZERS["sgd"], steps)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    delta = SparseDelta(mask).attach(model, [optimizer])
    train(model, optimizer, steps)
    expected = named_weights(dense)
    for name, values in delta.entries().items():
        after = expected[name].detach().flatten()[mask.indices[name].long()]
        assert relative_distance(values, after) <= TOLERANCE.get(kind, 1e-5), name
        learned = relative_distance(values - delta.before[name], after - delta.before[name])
        assert learned <= (0.1 if kind == "int8" else 1e-4), name


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_adapters_and_everything_else_stand_still(kind: str) -> None:
    model = make_base(f"{kind} under LoRA")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    keep_unpacked(model)
    flags = [weight.requires_grad for weight in model.parameters()]
    mask, before, base = make_mask(model), state_of(model), logits_of(model)
    optimizer = OPTIMIZERS["adamw"]([weight for weight in model.parameters() if weight.requires_grad])
    delta = SparseDelta(mask).attach(model, [optimizer])
    train(model, optimizer, 3)
    assert_same_state(model, before)
    assert relative_distance(base, logits_of(model)) > 0.1
    delta.settle()
    assert [weight.requires_grad for weight in model.parameters()] == flags
    acting = sum(bool(index.numel()) for index in mask.indices.values())
    assert count_traces(model, optimizer) == 2 * acting
    delta.release()
    assert count_traces(model, optimizer) == 0
    assert torch.equal(logits_of(model), base)


def test_dense_layers_beside_quantised_ones_hold_their_weights() -> None:
    """The output head is never quantised."""
    model = make_quantized_model(
        dense=make_tiny_model(hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    )
    mask = make_mask(model, include=["lm_head.weight", "*.up_proj.*"])
    delta = fit(model, mask)
    during, patch = logits_of(model), delta.patch({})
    delta.settle()
    acting = [layer.name for _, layer in delta_layers(model)]
    assert acting == [name for name, index in mask.indices.items() if index.numel() and "up_proj" in name]
    assert torch.equal(logits_of(model), during)
    head = model.lm_head.weight.detach().flatten()[mask.indices["lm_head.weight"].long()]
    assert torch.equal(head, patch.after["lm_head.weight"])


def test_bfloat16_bases_get_float32_values_and_a_patch_of_their_dtype() -> None:
    model = make_quantized_model("nf4", dense=make_tiny_model(hidden_size=64, intermediate_size=128).bfloat16())
    mask = make_mask(model)
    delta = fit(model, mask, 2)
    assert {values.dtype for values in delta.entries().values()} == {torch.float32}
    patch, dense = delta.patch({}), dense_twin(model)
    assert {values.dtype for values in [*patch.before.values(), *patch.after.values()]} == {torch.bfloat16}
    patch.apply(dense)
    assert relative_distance(logits_of(model), logits_of(dense)) <= 0.02


@repacks
def test_passes_without_gradient_do_not_repack_the_base() -> None:
    model = make_quantized_model("nf4")
    optimizer = adamw(model)
    SparseDelta(make_mask(model)).attach(model, [optimizer])
    before = state_of(model)
    logits_of(model)
    assert_same_state(model, before)
    loss_of(model).backward()
    assert all(values.grad is not None and values.grad.any() for values in optimizer.param_groups[0]["params"])


def test_a_base_that_was_repacked_is_refused() -> None:
    model = make_quantized_model("nf4")
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="was repacked for this CPU"):
        SparseDelta(make_mask(model)).attach(model, [adamw(model)])


# An earlier difference ------------------------------------------------------------------------------------------------


def test_another_training_goes_on_from_the_difference_that_acts() -> None:
    model, whole = make_quantized_model("nf4"), make_quantized_model("nf4")
    mask = make_mask(model)
    # Without momentum, two trainings of two steps are one of four.
    plain = torch.optim.SGD(whole.parameters(), lr=0.5)
    expected = SparseDelta(mask).attach(whole, [plain])
    train(whole, plain, 4)
    before = dict(expected.before)
    for first in (0, 2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        delta = SparseDelta(mask).attach(model, [optimizer])
        train(model, optimizer, 2, first=first)
        patch = delta.patch({})
        delta.settle()
    assert torch.equal(logits_of(model), logits_of(whole))
    assert all(torch.equal(values, before[name]) for name, values in patch.before.items())
    wanted = expected.patch({}).after
    assert all(torch.equal(values, wanted[name]) for name, values in patch.after.items())


def test_a_training_without_a_step_leaves_nothing() -> None:
    model = make_quantized_model("nf4")
    mask, other = make_mask(model), make_mask(model, seed=1)
    optimizer = adamw(model)
    delta = SparseDelta(mask).attach(model, [optimizer])
    base = logits_of(model)
    delta.settle()
    assert count_traces(model, optimizer) == 0
    assert torch.equal(logits_of(model), base)
    fit(model, other, 1)


def test_rewinding_goes_back_to_where_this_training_began() -> None:
    model = make_quantized_model("nf4")
    mask = make_mask(model)
    fit(model, mask).settle()
    start = logits_of(model)
    delta = fit(model, mask)
    assert not torch.equal(logits_of(model), start)
    delta.rewind()
    assert torch.equal(logits_of(model), start)


def test_applied_to_another_copy_of_the_base() -> None:
    model, other = make_quantized_model("int8"), make_quantized_model("int8")
    mask = make_mask(model)
    delta = fit(model, mask)
    SparseDelta(mask).apply(other, delta.entries())
    assert torch.equal(logits_of(other), logits_of(model))
    # Once more takes its place.
    SparseDelta(mask).apply(other, delta.entries())
    assert torch.equal(logits_of(other), logits_of(model))
    assert all(not layer.values.requires_grad for _, layer in delta_layers(other))


def test_a_deep_copy_has_a_difference_of_its_own() -> None:
    model = make_quantized_model("nf4")
    delta = fit(model, make_mask(model))
    delta.settle()
    trained = logits_of(model)
    twin = copy.deepcopy(model)
    delta.release()
    assert torch.equal(logits_of(twin), trained)
    assert not torch.equal(logits_of(model), trained)
    assert all(layer.layer is twin.get_submodule(path) for path, layer in delta_layers(twin))


def test_last_good_weights_hold_the_difference() -> None:
    model = make_quantized_model("nf4")
    delta = fit(model, make_mask(model))
    good = {name: value.clone() for name, value in read_weights(model).items()}
    trained = logits_of(model)
    delta.write({name: values + 1 for name, values in delta.entries().items()})
    assert fingerprint(read_weights(model)) != fingerprint(good)
    restore_weights(model, good)
    assert torch.equal(logits_of(model), trained)
    assert fingerprint(read_weights(model)) == fingerprint(good)
