# SPDX-License-Identifier: Apache-2.0
"""A causal language model that learns responses."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_safety.arguments import check_choice
from lightning_safety.language import find_tokenizer, load_causal_lm, load_tokenizer
from lightning_safety.language.quantization import Quantization
from lightning_safety.training.adapters import add_lora, check_lora
from lightning_safety.training.loss import Mean, predict_responses, response_loss, retention_divergence
from lightning_safety.training.resumable import ResumableLanguageModule
from lightning_safety.training.schedule import SCHEDULES, make_schedule
from lightning_safety.training.sharding import shard_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPTIMIZERS = ("adamw", "adamw_8bit")
LOSS_AVERAGES = ("token", "example")


class CausalLanguageModule(ResumableLanguageModule):
    """Trains a causal language model on the batches of `InstructionDataModule`.

    Logs ``train/loss``, ``val/loss``, ``val/perplexity`` and, with a retention term, ``train/retention``. Validation
    numbers are means over all response tokens, whatever the batches. Its checkpoints hold configuration and
    tokenizer too, so that ``lightning-safety export`` needs nothing else. Under `ModelParallelStrategy` (data
    parallelism alone) its weights are spread over the processes, in `dtype`; every process loads them whole first.

    Args:
        source: A hub id, a folder, a GGUF file, a name that `load_causal_lm` knows, or a loaded model (then with
            `tokenizer`).
        tokenizer: The tokenizer or its path. Default: that of `source`.
        dtype: The dtype of the weights. ``"float32"`` trains well with ``Trainer(precision="bf16-mixed")``.
        gguf_file: The file's name, where `source` is a folder or hub id with GGUF files.
        trust_remote_code: Whether to run Python code that comes with the model.
        learning_rate: The highest learning rate.
        optimizer: ``"adamw"``, or ``"adamw_8bit"`` of bitsandbytes. For another one override `configure_optimizers` or
            use LightningCLI's ``--optimizer``.
        betas: AdamW's running average coefficients.
        weight_decay: AdamW's decay, of every weight that is trained.
        schedule: ``"constant"``, ``"cosine"`` or ``"linear"``, over the optimizer steps of the whole fit.
        warmup_fraction: Share of the steps during which the learning rate rises, in [0, 1).
        loss_average: ``"token"``: the mean negative log-likelihood over the response tokens of the batch.
            ``"example"``: the mean over examples of each one's mean, so that short responses count like long ones.
        retention_weight: Adds this times the mean KL divergence, in nats per response token, from the start model to
            the current one, on the rows whose source says ``retention: true``. Costs a second forward pass and a second
            copy of the weights, never saved in checkpoints; with adapters no copy: the start model is that without.
        gradient_checkpointing: Computes activations twice instead of keeping them.
        lora: Arguments of `peft.LoraConfig` (`LORA_ARGUMENTS`): trains LoRA adapters, by default on all linear layers
            but the output head, and nothing else; ``{}`` for peft's defaults. Checkpoints then hold what trains and not
            the base, which is loaded again from `source` and must be the same. A `PeftModel` as `source` is treated
            alike.
        quantization: ``"nf4"`` or ``"int8"``: the base in 4 or 8 bits (bitsandbytes), for `lora`. All that is not
            quantised has `dtype`, in which products are computed too.

    Raises:
        TypeError: A loaded model came without `tokenizer`.
        ValueError: An unknown name or a number out of range, `quantization` without `lora` or of a loaded model, or
            `retention_weight` with adapters that the start model cannot be told from.

    Example:
        >>> CausalLanguageModule("smollm2-135m-instruct", loss_average="tokens")
        Traceback (most recent call last):
        ...
        ValueError: `loss_average` expected to be one of 'token', 'example' but got 'tokens'. Did you mean `token`?
    """

    def __init__(
        self,
        # The model first: jsonargparse would take what YAML says of one for a path.
        source: PreTrainedModel | str | os.PathLike[str],
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        dtype: str = "float32",
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
        learning_rate: float = 3e-5,
        optimizer: Literal["adamw", "adamw_8bit"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: Literal["constant", "cosine", "linear"] = "constant",
        warmup_fraction: float = 0.0,
        loss_average: Literal["token", "example"] = "token",
        retention_weight: float = 0.0,
        gradient_checkpointing: bool = False,
        lora: dict[str, Any] | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        check_choice(optimizer, "optimizer", OPTIMIZERS)
        check_choice(schedule, "schedule", SCHEDULES)
        check_choice(loss_average, "loss_average", LOSS_AVERAGES)
        _check_range("learning_rate", learning_rate, 0, math.inf)
        _check_range("weight_decay", weight_decay, 0, math.inf)
        _check_range("warmup_fraction", warmup_fraction, 0, 1)
        _check_range("retention_weight", retention_weight, 0, math.inf)
        loaded = not isinstance(source, str | os.PathLike)
        lora = None if lora is None else check_lora(lora)
        _check_quantization(quantization, lora, loaded=loaded)
        model, tokenizer_object = _load(source, tokenizer, dtype, gguf_file, trust_remote_code, quantization)
        model = model if lora is None else add_lora(model, lora)
        super().__init__(model, tokenizer_object, keeps_start=bool(retention_weight))
        self.save_hyperparameters(
            {
                "source": str(getattr(source, "name_or_path", "")) if loaded else os.fspath(source),
                "tokenizer": tokenizer if isinstance(tokenizer, str) else None,
                "dtype": dtype,
                "gguf_file": gguf_file,
                "trust_remote_code": trust_remote_code,
                "learning_rate": learning_rate,
                "optimizer": optimizer,
                "betas": list(betas),
                "weight_decay": weight_decay,
                "schedule": schedule,
                "warmup_fraction": warmup_fraction,
                "loss_average": loss_average,
                "retention_weight": retention_weight,
                "gradient_checkpointing": gradient_checkpointing,
                "lora": lora,
                "quantization": quantization,
            }
        )
        self.learning_rate = learning_rate
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Models are loaded in evaluation mode, and Lightning trains what it finds.
        self.model.train()

    def configure_model(self) -> None:
        """Spread the weights over the processes of `ModelParallelStrategy` (FSDP2), layer by layer."""
        if self.device_mesh is not None:
            shard_model(self.model, self.device_mesh, hyperparameters=self.hparams)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits [batch, length, vocabulary]."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of one batch of `InstructionDataModule`, or of any with tokens, attention mask and labels."""
        predictions = predict_responses(self.language_model, batch)
        loss = self._over_processes(response_loss(predictions, self.hparams["loss_average"], batch.get("weight")))
        examples = len(batch["labels"])
        # Over processes: the mean of what `_over_processes` returns is the mean over all of their batches.
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=examples, sync_dist=True)
        if self.hparams["retention_weight"]:
            with self.start_model(loss.device) as start_model:
                divergence = self._over_processes(retention_divergence(predictions, start_model, batch))
            self.log("train/retention", divergence.detach(), batch_size=examples, sync_dist=True)
            loss = loss + self.hparams["retention_weight"] * divergence
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Add one batch to ``val/loss``."""
        self._evaluate(batch, self.val_loss)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and ``val/perplexity``."""
        self._log_evaluation("val", self.val_loss)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Add one batch to ``test/loss``."""
        self._evaluate(batch, self.test_loss)

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` and ``test/perplexity``."""
        self._log_evaluation("test", self.test_loss)

    def configure_optimizers(self) -> Any:
        """Return AdamW over the weights that require a gradient, and the schedule.

        Raises:
            ValueError: The schedule needs a number of steps and the trainer has none.
        """
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        options = {"lr": self.learning_rate, "betas": tuple(self.hparams["betas"])}
        if self.hparams["optimizer"] == "adamw_8bit":
            import bitsandbytes

            adamw: Any = bitsandbytes.optim.AdamW8bit
        else:
            adamw = torch.optim.AdamW
        optimizer = adamw(weights, **options, weight_decay=self.hparams["weight_decay"])
        schedule, warmup = self.hparams["schedule"], self.hparams["warmup_fraction"]
        if schedule == "constant" and not warmup:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total) or total < 0:
            raise ValueError(
                f"`schedule={schedule!r}` with `warmup_fraction={warmup:g}` expected a trainer that ends but it has "
                f"neither `max_steps` nor `max_epochs`. Set one, or use `schedule='constant'` without warm-up."
            )
        multiplier = make_schedule(schedule, warmup_steps=int(warmup * total), total_steps=total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch: dict[str, Tensor], metric: MeanMetric) -> None:
        predictions = predict_responses(self.language_model, batch)
        counted = 0 if "filler" in batch else len(predictions.targets)
        metric.update(response_loss(predictions).value, weight=counted)

    def _over_processes(self, mean: Mean) -> Tensor:
        """Return what, averaged over processes, is the mean over the batches of all, whatever each one's count."""
        if self._trainer is None or self.trainer.world_size == 1:
            return mean.value
        divisor = self.trainer.strategy.reduce(mean.divisor.clone(), reduce_op="mean")
        return Mean(mean.total, divisor).value

    def _log_evaluation(self, stage: str, metric: MeanMetric) -> None:
        loss = metric.compute()
        self.log_dict({f"{stage}/loss": loss, f"{stage}/perplexity": loss.exp()}, prog_bar=True)
        metric.reset()


def _load(
    source: Any, tokenizer: Any, dtype: str, gguf_file: str | None, trust_remote_code: bool, quantization: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    if isinstance(source, str | os.PathLike):
        model = load_causal_lm(source, dtype=dtype, quantization=quantization, **options)
        return model, find_tokenizer(tokenizer) if tokenizer is not None else load_tokenizer(source, **options)
    if tokenizer is None:
        raise TypeError(
            "`tokenizer` expected to be given beside a loaded model but got None. Pass an object or a path."
        )
    return source, find_tokenizer(tokenizer)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        raise ValueError(f"`{name}` expected to be a number in [{low}, {high}) but got {value!r}.")


def _check_quantization(quantization: str | None, lora: dict[str, Any] | None, *, loaded: bool) -> None:
    if quantization is None:
        return
    check_choice(quantization, "quantization", get_args(Quantization))
    if lora is None:
        raise ValueError(
            f"`quantization={quantization!r}` expected `lora` beside it but got None: quantised weights cannot be"
            " trained, and adapters on them can. Pass `lora={}` or its arguments, or leave out `quantization`."
        )
    if loaded:
        raise ValueError(
            f"`quantization={quantization!r}` expected a `source` to load but got a loaded model. Load it so:"
            f" `load_causal_lm(…, quantization={quantization!r})`, and leave the argument out here."
        )
