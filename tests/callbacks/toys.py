# SPDX-License-Identifier: Apache-2.0
"""A very small language model, a user's own LightningModule around it, and quiet trainers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.language import named_weights
from lightning_safety.scoring import SafetyMask, select_random
from tests.tiny import make_tiny_model

MakeOptimizers = Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]
BOTH = pytest.mark.parametrize("kind", [SafetyPreservingAdaptation, SafetyEnhancementTuning])


def adamw(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)]


def make_smallest_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """One layer, 2,224 weights in 11 tensors, in training mode."""
    settings = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
        **overrides,
    }
    return make_tiny_model(seed, **settings).train()


class OwnModule(pl.LightningModule):
    """What a user may have: a Hugging Face model as an attribute, and nothing that knows this package.

    In manual optimization it accumulates, clips and steps by hand.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizers: MakeOptimizers = adamw,
        *,
        tokenizer: PreTrainedTokenizerFast | None = None,
        manual: bool = False,
        accumulate: int = 1,
        clip: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.make_optimizers = make_optimizers
        self.automatic_optimization = not manual
        self.accumulate = accumulate
        self.clip = clip
        self.steps: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                if self.clip is not None:
                    self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm=self.clip)
                # Under the autocast of training_step, Adafactor's products underflow in float16 and weights become NaN.
                with torch.autocast("cpu", enabled=False):
                    optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.model(input_ids=batch, labels=batch, use_cache=False)

    def configure_optimizers(self) -> Any:
        optimizers = self.make_optimizers([weight for weight in self.parameters() if weight.requires_grad])
        self.steps = [0] * len(optimizers)
        for number, optimizer in enumerate(optimizers):
            optimizer.register_step_post_hook(lambda *_, number=number: self._count(number))
        return optimizers

    def _count(self, number: int) -> None:
        self.steps[number] += 1


def make_batches(number: int, *, vocabulary: int = 40, seed: int = 0, length: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (1, length), generator=generator) for _ in range(number)]


def make_loader(batches: Sequence[Tensor]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def quiet(callbacks: Iterable[Any] = (), **options: Any) -> dict[str, Any]:
    """Options of a trainer on the CPU that says and writes nothing."""
    callbacks = list(callbacks)
    return {
        "callbacks": callbacks,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        **options,
    }


def fit(
    module: Any, callbacks: Iterable[Any] = (), *, steps: int = 4, ckpt_path: Any = None, **options: Any
) -> pl.Trainer:
    """Fit on so many batches, an epoch of them unless options say otherwise."""
    trainer = pl.Trainer(**quiet(callbacks, **options))
    vocabulary = module.model.config.vocab_size
    trainer.fit(module, make_loader(make_batches(steps, vocabulary=vocabulary)), ckpt_path=ckpt_path)
    return trainer


def mask_of_everything(model: nn.Module, fraction: float = 0.2) -> SafetyMask:
    """Some weights of every tensor, norms and embeddings too: some selected and some not in each."""
    selected, shapes = {}, {}
    for name, weight in named_weights(model).items():
        mask = select_random({name: weight.detach().float()}, fraction, seed=len(selected))
        selected |= mask.indices
        shapes |= mask.shapes
    return SafetyMask(selected, shapes, {"method": "test"})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in named_weights(model).items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each weight whether its bits differ from `before`; flat, by tensor."""
    found = {}
    for name, weight in named_weights(model).items():
        integer = {2: torch.int16, 4: torch.int32}[weight.element_size()]
        old = before[name].to(weight.dtype).flatten().view(integer)
        found[name] = weight.detach().flatten().view(integer) != old
    return found


def chosen(mask: SafetyMask, name: str, numel: int) -> Tensor:
    places = torch.zeros(numel, dtype=torch.bool)
    if name in mask.indices:
        places[mask.indices[name].long()] = True
    return places


def assert_held(
    model: nn.Module, before: dict[str, Tensor], mask: SafetyMask, *, trained: Iterable[str] | None = None
) -> None:
    """No selected weight moved, and in every trained tensor (default: all) some other one did."""
    for name, change in moved(model, before).items():
        held = chosen(mask, name, change.numel())
        assert not change[held].any(), f"{name}: {int(change[held].sum())} held weights moved"
        if trained is None or name in trained:
            assert change[~held].any(), f"{name}: no free weight moved"


def assert_only_selected_moved(model: nn.Module, before: dict[str, Tensor], mask: SafetyMask) -> None:
    """No other weight moved, and in every tensor with selected weights some of these did."""
    for name, change in moved(model, before).items():
        selected = chosen(mask, name, change.numel())
        assert not change[~selected].any(), f"{name}: {int(change[~selected].sum())} other weights moved"
        if selected.any():
            assert change[selected].any(), f"{name}: no selected weight moved"


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    for name, change in moved(model, weights_of(other)).items():
        assert not change.any(), name


def count_traces(model: nn.Module, trainer: Any) -> int:
    """Count the hooks that are left on modules, parameters and optimizers; `OwnModule` has one on each optimizer."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    for weight in model.parameters():
        hooks += len(weight._post_accumulate_grad_hooks or ()) + len(weight._backward_hooks or ())
    return hooks + sum(len(optimizer._optimizer_step_post_hooks) - 1 for optimizer in trainer.optimizers)


@contextlib.contextmanager
def no_scoring(monkeypatch: Any) -> Any:
    """Inside, scoring a model is an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was scored")

    with monkeypatch.context() as patched:
        patched.setattr("lightning_safety.callbacks.choice.expected_safety_impact", refuse)
        yield


def assert_acted(
    kind: type[SelectedWeightsCallback], model: nn.Module, before: dict[str, Tensor], mask: SafetyMask
) -> None:
    if kind is SafetyPreservingAdaptation:
        assert_held(model, before, mask)
    else:
        assert_only_selected_moved(model, before, mask)


def halves(model: nn.Module) -> tuple[SafetyMask, SafetyMask]:
    """Two masks over all tensors without a common weight."""
    everything = mask_of_everything(model, 0.4)
    first = SafetyMask({name: index[::2] for name, index in everything.indices.items()}, everything.shapes)
    return first, everything - first


def refuse(module: OwnModule, callbacks: list[Any], message: str, error: type[Exception] = ValueError) -> None:
    """The fit ends with the error, and weights, flags and hooks are as if there had been none."""
    before, flags = weights_of(module), [weight.requires_grad for weight in module.parameters()]
    trainer = pl.Trainer(**quiet(callbacks))
    with pytest.raises(error, match=message):
        trainer.fit(module, make_loader(make_batches(2)))
    assert count_traces(module, trainer) == 0
    assert [weight.requires_grad for weight in module.parameters()] == flags
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(module).items())
