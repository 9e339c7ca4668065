# SPDX-License-Identifier: Apache-2.0
"""`SafetyPreservingAdaptation` that chooses anew as the model moves, or leaves out what usefulness needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from lightning_safety.callbacks import HarmfulnessMonitor, SafetyBudget, SafetyEnhancementTuning
from lightning_safety.callbacks import SafetyPreservingAdaptation as Preserving
from lightning_safety.data import load_prompts
from lightning_safety.scoring import (
    RefusalLikelihood,
    RefusalMargin,
    SafetyMask,
    expected_safety_impact,
    select_random,
    select_top,
)
from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from tests.callbacks.toys import (
    OwnModule,
    assert_same_bits,
    chosen,
    count_traces,
    fit,
    make_batches,
    make_loader,
    mask_of_everything,
    moved,
    quiet,
    refuse,
    weights_of,
)
from tests.tiny import make_tiny_model
from tests.training.fits import make_trainer

OBJECTIVE = RefusalMargin(limit=4)


class Record(pl.Callback):
    """The weights and the mask after every batch, once all callbacks have done what they do."""

    def __init__(self, spa: Preserving) -> None:
        self.spa = spa
        self.weights: list[dict[str, Tensor]] = []
        self.masks: list[SafetyMask] = []

    def chosen(self) -> list[int]:
        """Return for each batch how many other masks there were before."""
        new = [number > 0 and mask is not self.masks[number - 1] for number, mask in enumerate(self.masks)]
        return [sum(new[: number + 1]) for number in range(len(new))]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert self.spa.mask is not None
        self.weights.append(weights_of(pl_module.model))
        self.masks.append(self.spa.mask)


def module_of(tokenizer: PreTrainedTokenizerFast, **options: Any) -> OwnModule:
    return OwnModule(make_tiny_model().train(), tokenizer=tokenizer, **options)


def rescored(**options: Any) -> Preserving:
    return Preserving(0.05, objective=OBJECTIVE, rescore_every_n_steps=2, show_progress=False, **options)


def scored_by_hand(weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast) -> SafetyMask:
    model = make_tiny_model()
    model.load_state_dict(weights, strict=False)
    return select_top(expected_safety_impact(model, OBJECTIVE, tokenizer), 0.05)


def assert_holds(before: dict[str, Tensor], after: dict[str, Tensor], mask: SafetyMask) -> None:
    model = make_tiny_model()
    model.load_state_dict(after, strict=False)
    changes = moved(model, before)
    for name, change in changes.items():
        assert not change[chosen(mask, name, change.numel())].any(), name
    assert any(change.any() for change in changes.values())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_present_model_is_scored_and_its_choice_held(
    tiny_tokenizer: PreTrainedTokenizerFast, accumulate: int
) -> None:
    spa = rescored()
    record = Record(spa)
    module = module_of(tiny_tokenizer)
    fit(module, [spa, record], steps=5 * accumulate, accumulate_grad_batches=accumulate)
    weights, masks = record.weights[accumulate - 1 :: accumulate], record.masks[accumulate - 1 :: accumulate]
    assert masks[0] == scored_by_hand(weights_of(make_tiny_model()), tiny_tokenizer)
    # Chosen after the second step and the fourth; nothing would be left to hold after the last.
    assert masks[1] == scored_by_hand(weights[1], tiny_tokenizer) != masks[0]
    assert masks[3] == scored_by_hand(weights[3], tiny_tokenizer) != masks[1]
    assert masks[2] == masks[1]
    assert masks[4] == masks[3]
    start = weights_of(make_tiny_model())
    assert_holds(start, weights[1], masks[0])
    assert_holds(weights[1], weights[3], masks[1])
    assert_holds(weights[3], weights[4], masks[3])
    # What was let go moves: a hook that stayed behind would hold it.
    let_go = masks[0] - masks[1]
    after = make_tiny_model()
    after.load_state_dict(weights[3], strict=False)
    changed = moved(after, weights[1])
    assert any(changed[name][chosen(let_go, name, changed[name].numel())].any() for name in changed)
    trainer = module.trainer
    assert count_traces(module, trainer) == 0
    kept = masks[1].overlap(masks[3]) / masks[1].count
    assert float(trainer.callback_metrics["safety/mask_kept"]) == pytest.approx(kept)


def test_rescoring_at_the_last_step_is_left_out(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spa = rescored()
    record = Record(spa)
    fit(module_of(tiny_tokenizer), [spa, record], steps=2)
    assert record.masks[0] == record.masks[1]


def test_it_goes_on_to_the_end_with_two_optimizers_by_hand(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Each of their steps counts: four batches are eight steps."""

    def two(weights: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part, lr=0.1) for part in (weights[:5], weights[5:])]

    spa = rescored()
    record = Record(spa)
    fit(module_of(tiny_tokenizer, make_optimizers=two, manual=True), [spa, record], steps=4)
    assert record.chosen() == [0, 1, 2, 2]


def test_it_goes_on_where_an_epoch_has_no_length(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(make_batches(5, vocabulary=512))

    spa = rescored()
    record = Record(spa)
    trainer = pl.Trainer(**quiet([spa, record]))
    trainer.fit(module_of(tiny_tokenizer), DataLoader(Stream(), batch_size=None))
    assert record.chosen() == [0, 1, 1, 2, 2]


def test_another_fit_of_the_same_trainer_counts_from_its_own_start(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spa = rescored()
    record = Record(spa)
    trainer, module = pl.Trainer(**quiet([spa, record])), module_of(tiny_tokenizer)
    loader = make_loader(make_batches(4, vocabulary=512))
    trainer.fit(module, loader)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader)
    assert trainer.global_step == 8
    # Scored at the start of the second fit, after step four: not again before step six.
    assert record.chosen() == [0, 1, 1, 1, 2, 3, 3, 3]


def test_random_choices_are_drawn_anew(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spa = rescored(method="random", seed=5)
    record = Record(spa)
    fit(module_of(tiny_tokenizer), [spa, record], steps=5)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in record.masks[0].shapes.items()}
    expected = [select_random(shapes, 0.05, seed) for seed in (5, 6, 6, 7, 7)]
    assert record.masks == expected


def test_file_holds_the_present_mask(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    spa = rescored(save_mask=tmp_path / "mask.safetensors")
    fit(module_of(tiny_tokenizer), [spa], steps=3)
    assert SafetyMask.load(tmp_path / "mask.safetensors") == spa.mask
    assert spa.mask != scored_by_hand(weights_of(make_tiny_model()), tiny_tokenizer)


@pytest.mark.filterwarnings("ignore:.*responses of.*are cut", "ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("saved_at", [1, 2, 3])
def test_resumed_is_uninterrupted(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, saved_at: int) -> None:
    """Saved before, at and after a new choice: the resumed fit holds the same and ends with the same bits."""

    def train(callbacks: list[Any], checkpoint: Path | None = None) -> torch.nn.Module:
        torch.manual_seed(3)
        module = CausalLanguageModule(
            make_tiny_model(attention_dropout=0.2), tokenizer=tiny_tokenizer, learning_rate=1e-2
        )
        rows = load_prompts("harmless", split="train", limit=10)
        trainer = make_trainer(tmp_path, callbacks, max_epochs=10, max_steps=6)
        data = InstructionDataModule(rows, batch_size=2, max_length=48)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return module.model

    spa, again, masks = rescored(), rescored(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            masks.append(again.mask)

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = train([spa, saver])
    resumed = train([again, Watch()], tmp_path / f"step={saved_at}.ckpt")
    assert len(masks) == 6 - saved_at
    assert masks[-1] == spa.mask
    assert_same_bits(resumed, whole)


def test_what_usefulness_needs_is_left_out(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    utility = RefusalLikelihood("harmless", limit=4)
    needed = select_top(expected_safety_impact(model, utility, tiny_tokenizer), 0.05)
    scores = expected_safety_impact(model, OBJECTIVE, tiny_tokenizer)
    plain, expected = select_top(scores, 0.05), select_top(scores, 0.05, exclude=needed)
    assert plain.overlap(needed)
    spa = Preserving(0.05, objective=OBJECTIVE, minus=utility, show_progress=False)
    fit(module_of(tiny_tokenizer), [spa], steps=1)
    assert spa.mask == expected
    assert spa.mask.count == plain.count
    assert spa.mask.overlap(needed) == 0
    assert spa.mask.metadata["minus_examples"] == "harmless"


def test_utility_by_name_is_that_of_the_written_answers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    masks = []
    for minus in ("utility", RefusalLikelihood("harmless")):
        spa = Preserving(0.05, objective=OBJECTIVE, minus=minus, show_progress=False)
        fit(module_of(tiny_tokenizer), [spa], steps=1)
        masks.append(spa.mask)
    assert masks[0] == masks[1]


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"rescore_every_n_steps": 0}, "`rescore_every_n_steps` expected to be at least 1 but got 0", ValueError),
        ({"rescore_every_n_steps": 1.5}, "`rescore_every_n_steps` expected to be an integer", TypeError),
        ({"minus": "utilty"}, r"`minus` expected to be one of 'utility' but got 'utilty'. Did you mean", ValueError),
        ({"minus": 3}, "`minus` expected to be 'utility' or a SafetyObjective but got int", TypeError),
        ({"minus": "utility", "fraction": 0.6}, "`fraction` expected to be at most 0.5 beside `minus`", ValueError),
        ({"minus": "utility", "granularity": "neuron"}, "`minus` expected `granularity='weight'`", ValueError),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        Preserving(**options)


def test_a_given_mask_is_not_chosen_anew() -> None:
    with pytest.raises(ValueError, match="`rescore_every_n_steps` expected no `mask` beside it"):
        Preserving(mask=mask_of_everything(make_tiny_model()), rescore_every_n_steps=2)


def test_set_beside_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    trained = SafetyEnhancementTuning(method="bottom", objective=OBJECTIVE)
    refuse(module_of(tiny_tokenizer), [rescored(), trained], "expected no SafetyEnhancementTuning beside it")


def test_adapters_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = get_peft_model(make_tiny_model().train(), LoraConfig(target_modules=["q_proj"]))
    refuse(OwnModule(model, tokenizer=tiny_tokenizer), [rescored()], "expected a model without adapters")


def test_averaging_beside_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    averaging = pl.callbacks.StochasticWeightAveraging(1e-3)
    refuse(module_of(tiny_tokenizer), [rescored(), averaging], "but StochasticWeightAveraging replaces them by a mean")


def test_budget_that_rolls_back_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    others = [HarmfulnessMonitor(every_n_steps=1), SafetyBudget(action="rollback")]
    refuse(module_of(tiny_tokenizer), [rescored(), *others], "expected weights that are held from the start on")
