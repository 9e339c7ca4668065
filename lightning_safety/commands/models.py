# SPDX-License-Identifier: Apache-2.0
"""Writing models: with a patch, without it, or from a checkpoint."""

from __future__ import annotations


def patch_info(file: str) -> None:
    """Show what a safety patch changes.

    Args:
        file: A patch file.
    """
    from lightning_safety.enforcement import SafetyPatch

    print(SafetyPatch.load(file).info())


def patch_apply(model: str, file: str, output: str, dtype: str = "float32", gguf_file: str | None = None) -> None:
    """Write a model with a safety patch applied. The model itself is not changed.

    Args:
        model: A hub id, a folder, a .gguf file or `smollm2-135m-instruct`.
        file: A patch file.
        output: The folder to write the patched model and its tokenizer to.
        dtype: The type to load the weights in: the one that the patch was made in.
        gguf_file: The name of a GGUF file inside the folder or hub repository.
    """
    _patch(model, file, output, dtype, gguf_file, revert=False)


def patch_revert(model: str, file: str, output: str, dtype: str = "float32", gguf_file: str | None = None) -> None:
    """Write a patched model as it was before the patch, bit for bit.

    Args:
        model: A patched model's folder.
        file: A patch file.
        output: The folder to write the unpatched model and its tokenizer to.
        dtype: The type to load the weights in: the one that the patch was made in.
        gguf_file: The name of a GGUF file inside the folder or hub repository.
    """
    _patch(model, file, output, dtype, gguf_file, revert=True)


def _patch(model: str, file: str, output: str, dtype: str, gguf_file: str | None, *, revert: bool) -> None:
    from lightning_safety.enforcement import SafetyPatch
    from lightning_safety.language import load_causal_lm, load_tokenizer, save_language_model

    patch = SafetyPatch.load(file)
    language_model = load_causal_lm(model, dtype=dtype, gguf_file=gguf_file)
    (patch.revert if revert else patch.apply)(language_model)
    save_language_model(language_model, load_tokenizer(model, gguf_file=gguf_file), output)
    print(f"{'Reverted' if revert else 'Applied'}: {output}")


def export(checkpoint: str, output: str, base: str | None = None, adapter: bool = False) -> None:
    """Write a Hugging Face folder from a Lightning checkpoint: the whole model, LoRA adapters merged.

    Args:
        checkpoint: A .ckpt file.
        output: The folder to write.
        base: For a module of your own: the model it was made from (architecture and tokenizer). For LoRA adapters:
            where their base model is, if not where the fit had it.
        adapter: Write LoRA adapters as peft does, and with them the mask of the weights that were held, instead of a
            model.
    """
    from lightning_safety.training import export_checkpoint

    export_checkpoint(checkpoint, output, base=base, adapter=adapter)
    print(f"Exported: {output}")
