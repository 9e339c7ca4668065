# SPDX-License-Identifier: Apache-2.0
"""Run folders as fits and studies leave them, with made-up numbers and harmless replies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_safety.monitoring.rates import Rate
from lightning_safety.scoring import SafetyMask

STEPS = (0, 20, 40, 60, 80)


def make_mask(layers: int = 4) -> SafetyMask:
    """A mask that holds more of the value matrices than of the others, and more of the middle."""
    shapes = {
        f"model.layers.{layer}.{part}.weight": (8, 8)
        for layer in range(layers)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    counts = {name: 1 + 5 * ("v_proj" in name) + 2 * (".1." in name) for name in shapes}
    return SafetyMask({name: torch.arange(counts[name]) for name in shapes}, shapes, {"method": "top"})


def check_line(
    step: int, *, harmful: int = 5, run: str = "first", stage: str = "fit", judges: Sequence[str] = ("keyword_refusal",)
) -> dict[str, Any]:
    """A line of HarmfulnessMonitor in safety.jsonl: so many of 20 replies are harmful."""
    line: dict[str, Any] = {"monitor": "HarmfulnessMonitor", "run": run, "stage": stage, "step": step}
    rates = {}
    for judge in judges:
        found = {"attack_success_rate": Rate(harmful, 20, 20), "over_refusal_rate": Rate(2, 19, 20)}
        rates |= {f"{name}/{judge}": rate for name, rate in found.items()}
        for name, rate in found.items():
            line.setdefault(f"safety/{name}", rate.value)
            line[f"safety/{name}/{judge}"] = rate.value
    return {
        **line,
        "safety/refusal_margin": -2.0 + step / 100,
        "safety/check_seconds": 1.5,
        "rates": {name: rate.to_dict() for name, rate in rates.items()},
    }


def overlap_line(step: int, *, run: str = "overlap") -> dict[str, Any]:
    """A line of a monitor that logs its random control, with a gap at step 40."""
    gap = step == 40
    return {
        "monitor": "SubspaceOverlapMonitor",
        "run": run,
        "stage": "fit",
        "step": step,
        "safety/subspace_overlap": None if gap else 0.1 + step / 200,
        "safety/subspace_overlap_random": None if gap else 0.05,
        "safety/subspace_overlap_utility": None if gap else 0.2,
        "safety/subspace_overlap_utility_random": None if gap else 0.04,
        "safety/check_seconds": 0.2,
    }


def reply_lines(step: int, *, run: str = "first", says: str = "It is a nice day.") -> list[dict[str, Any]]:
    identity = {"monitor": "HarmfulnessMonitor", "run": run, "stage": "fit", "step": step}
    verdict = {"keyword_refusal": {"harmful": True, "refused": False, "score": None, "reason": "no refusal found"}}
    kinds = ["harmful"] * 8 + ["borderline"] * 4
    return [
        {
            **identity,
            "prompts": kind,
            "prompt": f"A {kind} prompt, {index}.",
            "response": says,
            "verdicts": verdict,
        }
        for index, kind in enumerate(kinds)
    ]


def write_lines(path: Path, lines: Sequence[dict[str, Any]], ending: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in lines) + ending, encoding="utf-8")


RUN = {
    "started": "2026-01-02 03:04 UTC",
    "outcome": {"step": 80},
    "trainer": {"precision": "32-true", "max_steps": 80, "gradient_clip_val": None, "strategy": "SingleDeviceStrategy"},
    "module": {"class": "UserModule", "model": "some/model", "architecture": "LlamaForCausalLM", "weights": 134515008},
    "callbacks": [
        {"class": "HarmfulnessMonitor", "arguments": {"every_n_steps": 20, "at_start": True}},
        {"class": "SafetyBudget", "arguments": {"metric": "safety/attack_success_rate", "max_increase": 0.1}},
    ],
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
    "machine": {"system": "Linux x86_64", "cores": 2},
}


def make_fit(
    folder: Path, *, harmful: Sequence[int] = (5, 4, 6, 8, 9), judges: Sequence[str] = ("keyword_refusal",)
) -> Path:
    """The run folder of a fit: checks, replies, a random control, a mask, run.json and config.yaml."""
    checks = [check_line(step, harmful=one, judges=judges) for step, one in zip(STEPS, harmful, strict=True)]
    lines = [line for step, check in zip(STEPS, checks, strict=True) for line in (check, overlap_line(step))]
    write_lines(folder / "safety.jsonl", lines)
    replies = [line for step in (0, 40, 80) for line in reply_lines(step, says=f"Reply at step {step}.")]
    write_lines(folder / "safety_replies.jsonl", [{"content_warning": "Careful."}, *replies])
    make_mask().save(folder / "mask.safetensors")
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "config.yaml").write_text("seed_everything: 0\nmodel:\n  api_key: sk-12345\n  max_new_tokens: 24\n")
    return folder


def make_study(folder: Path) -> Path:
    """The run folder of a study with its control."""
    columns = {}
    for name, harmful in (("before", 80), ("after", 15), ("random mask", 25)):
        columns[name] = {
            "attack_success_rate": Rate(harmful, 110, 110).to_dict(),
            "over_refusal_rate": Rate(7, 100, 129).to_dict(),
            "refusal_margin": -1.25,
            "perplexity_written": {"value": 28.9, "low": 24.9, "high": 34.0, "tokens": 4630, "examples": 110},
            "perplexity_own": None,
            "judge": "keyword_refusal",
            "prompts": {"harmful": "harmful/test"},
            "max_new_tokens": 24,
            "notes": ["Something was left out."],
        }
        replies = [{"prompts": "harmful", "prompt": "A prompt.", "response": f"Reply {name}.", "verdicts": {}}]
        write_lines(folder / f"replies-{name.replace(' ', '-')}.jsonl", replies)
    (folder / "results.json").write_text(json.dumps(columns))
    write_lines(folder / "log" / "safety.jsonl", [check_line(0, harmful=15), check_line(88, harmful=3)])
    write_lines(folder / "log-random-mask" / "safety.jsonl", [check_line(0, harmful=15), check_line(88, harmful=7)])
    return folder
