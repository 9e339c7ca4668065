# SPDX-License-Identifier: Apache-2.0
"""The recipe of a mixture of experts that it makes itself, with a small vocabulary."""

from __future__ import annotations

from lightning_safety.cli import main
from lightning_safety.language import load_causal_lm, named_weights
from lightning_safety.scoring import SafetyMask


def test_it_holds_weights_of_experts_and_shows_which(tiny_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.save_pretrained("tokenizer")
    sizes = {"vocab_size": len(tiny_tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    main(
        [
            "recipes",
            "run",
            "moe_spa",
            "--model.init_args.tokenizer=tokenizer",
            *(f"--model.init_args.source.init_args.config.init_args.{name}={size}" for name, size in sizes.items()),
            "--trainer.max_steps=4",
            "--trainer.accelerator=cpu",
        ]
    )
    mask = SafetyMask.load("runs/moe/mask.safetensors")
    assert mask.metadata["model"] == "OlmoeForCausalLM"
    assert all(".experts." in name for name in mask.shapes)
    assert mask.count == mask.scored // 100
    capsys.readouterr()
    main(["mask", "describe", "runs/moe/mask.safetensors"])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "/" in line]
    assert rows == ["layer/expert", *(f"{layer}/{expert}" for layer in (0, 1) for expert in range(8))]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    main(["export", str(checkpoint), "-o", "exported"])
    mask.check_model(load_causal_lm("exported"))
    assert "model.layers.1.mlp.gate.weight" in named_weights(load_causal_lm("exported"))
