# SPDX-License-Identifier: Apache-2.0
"""What everyday instructions leave of a model's safety, with and without what is meant to keep it.

python benchmarks/preserve.py --arms '[plain, rehearsal]' --source safe --harmful advbench.jsonl --output preserve

Full fine-tuning (or LoRA: `--lora true`) on the built-in `harmless` set in float32, batches of four, at a learning rate
that stays. Both judges read replies of 24 tokens to the harmful prompts and to `borderline/test`, at each of the steps
`--at`; perplexity is that of the written answers of `harmless/test`. Each arm has a JSON file, written at each of them;
arms whose file is whole are not run again. `safe` is a model made safe by the quickstart, `advbench.jsonl` a file of
prompts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import auto_cli

from lightning_safety import CausalLanguageModule, InstructionDataModule, SafetyPreservingAdaptation, SafetyRehearsal
from lightning_safety.data import Example, load_prompts
from lightning_safety.files import replace_atomically
from lightning_safety.language import find_language_model
from lightning_safety.monitoring import KeywordRefusalJudge, RefusalClassifier, measure_harmfulness, perplexity
from lightning_safety.monitoring.sets import read_prompts
from lightning_safety.randomness import preserved_random_state

ARMS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain": list,
    "rehearsal": lambda: [SafetyRehearsal()],
    "project": lambda: [SafetyRehearsal(every=1, mode="project")],
    "adaptive": lambda: [SafetyRehearsal("adaptive")],
    "spa": lambda: [SafetyPreservingAdaptation(0.01)],
    "spa-random": lambda: [SafetyPreservingAdaptation(0.01, method="random")],
    "spa-rehearsal": lambda: [SafetyPreservingAdaptation(0.01), SafetyRehearsal()],
}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}


class Evaluate(pl.Callback):
    """Evaluates at some steps, and keeps the time of training apart from that of evaluating."""

    def __init__(self, harmful: list[Example], at: list[int], path: Path) -> None:
        self.harmful = harmful
        self.at = at
        self.path = path
        self.found: list[dict[str, Any]] = []
        self._started = self._spent = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Begin to count the time of training."""
        self._started = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate before the first step."""
        if 0 in self.at:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Evaluate after a step."""
        if trainer.global_step in self.at:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: Any) -> None:
        begun = time.perf_counter()
        model, borderline = find_language_model(pl_module), load_prompts("borderline", split="test")
        with preserved_random_state():
            rates = measure_harmfulness(
                model,
                pl_module.tokenizer,
                self.harmful,
                borderline,
                judges=[KeywordRefusalJudge(), RefusalClassifier()],
                batch_size=32,
            ).named_rates
            task = perplexity(model, pl_module.tokenizer, load_prompts("harmless", split="test"))
        rehearsed = [callback.metrics for callback in trainer.callbacks if isinstance(callback, SafetyRehearsal)]
        self.found.append(
            {
                "step": trainer.global_step,
                "training_seconds": begun - self._started - self._spent,
                "rates": {name: rate.to_dict() for name, rate in rates.items() if "/" in name},
                "perplexity": asdict(task),
                "rehearsal": rehearsed[0] if rehearsed else {},
            }
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(self.path) as temporary:
            temporary.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        self._spent += time.perf_counter() - begun


def main(
    source: str,
    harmful: str = "harmful",
    arms: list[str] = list(ARMS),  # noqa: B006 # read, never changed
    at: list[int] = [0, 120, 500],  # noqa: B006 # read, never changed
    prompts: int | None = None,
    learning_rate: float = 1e-4,
    lora: bool = False,
    output: Path = Path("preserve"),
) -> None:
    """Fit the arms, one after the other, and write what was found.

    Args:
        source: The model to begin with.
        harmful: Prompts that should be refused: a file, or a built-in set (its split ``test``).
        arms: Which to fit.
        at: After which optimizer steps to evaluate; the last ends the fit.
        prompts: At most so many harmful prompts, spread evenly. Default: all.
        learning_rate: Of AdamW.
        lora: Whether adapters train instead of the weights.
        output: Folder of the JSON files.
    """
    rows = read_prompts(harmful, "harmful", split="test", limit=prompts)[1]
    for arm in arms:
        path = output / f"{arm}.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))[-1]["step"] == max(at):
            continue
        pl.seed_everything(0, verbose=False)
        module = CausalLanguageModule(
            source, dtype="float32", learning_rate=learning_rate, schedule="constant", lora=LORA if lora else None
        )
        evaluate = Evaluate(rows, at, path)
        trainer = pl.Trainer(
            max_steps=max(at),
            max_epochs=-1,
            gradient_clip_val=1.0,
            callbacks=[evaluate, *ARMS[arm]()],
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=InstructionDataModule("harmless", batch_size=4, max_length=512))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
