# SPDX-License-Identifier: Apache-2.0
"""How the report names metrics and writes numbers and foreign text."""

from __future__ import annotations

import math
import unicodedata

METRICS: dict[str, tuple[str, str]] = {
    "attack_success_rate": ("Attack success", "harmful replies to harmful prompts, of those scored; lower is safer"),
    "refusal_rate": ("Refusal of harmful prompts", "refused harmful prompts, of those scored; higher is safer"),
    "over_refusal_rate": (
        "Over-refusal of borderline prompts",
        "refused prompts that only look harmful; lower is more useful",
    ),
    "unscored_rate": ("Unscored replies", "replies the judge could not judge; never counted as safe"),
    "refusal_margin": (
        "Refusal margin",
        "log-probability per token of a refusal minus that of “Sure, here is”, in nats; higher is safer",
    ),
    "perplexity_written": ("Perplexity of written answers", "lower is better"),
    "perplexity_own": ("Perplexity of the start model’s replies", "lower is closer to how the model wrote before"),
    "subspace_overlap": ("Subspace overlap", "of the update with the safety subspace, mean over matrices"),
    "energy_kept": ("Energy kept", "share of the update’s energy that lies in the safety subspace"),
    "subspace_overlap_utility": ("Subspace overlap, utility", "the same with the subspace of everyday answers"),
    "energy_kept_utility": ("Energy kept, utility", "the same in the subspace of everyday answers"),
    "activation_overlap": (
        "Activation overlap",
        "of harmful and harmless prompts, mean over layers; the control is that of prompts drawn at random",
    ),
    "activation_overlap_centred": ("Activation overlap, centred", "the same without each set’s mean"),
    "activation_separability": (
        "Activation separability",
        "share of prompts that a linear classifier tells apart by their activations",
    ),
    "refusal_direction_cosine": ("Refusal direction", "cosine between the refusal direction now and at the start"),
    "update_norm": ("Size of the update", "norm of what training has changed so far"),
    "held_fraction": ("Held weights", "share of all weights that cannot move"),
    "check_seconds": ("Seconds a check took", "what watching costs"),
}
"""Label and meaning of each metric that this package logs; others are shown by their own name."""

_BIDIRECTIONAL = {chr(code) for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def label(metric: str) -> str:
    """Return what a metric is called; what stands after a slash in its name, such as the judge, stands after a dot.

    Example:
        >>> label("attack_success_rate/keyword_refusal")
        'Attack success · keyword_refusal'
        >>> label("weight_drift")
        'Weight drift'
    """
    base, _, detail = metric.partition("/")
    name = METRICS[base][0] if base in METRICS else base.replace("_", " ").capitalize()
    return f"{name} · {detail}" if detail else name


def label_in_sentence(metric: str) -> str:
    """Return the label of a metric with the judge in brackets.

    Example:
        >>> label_in_sentence("attack_success_rate/keyword_refusal")
        'Attack success (keyword_refusal)'
    """
    base, _, detail = metric.partition("/")
    return f"{label(base)} ({detail})" if detail else label(base)


def meaning(metric: str) -> str:
    """Return what a metric measures, in a few words; empty for an unknown one."""
    return METRICS.get(metric.partition("/")[0], ("", ""))[1]


def is_rate(metric: str) -> bool:
    """Whether a metric is a share of prompts, between 0 and 1."""
    return metric.partition("/")[0].endswith("_rate")


def number(value: float | None, *, decimals: int | None = None) -> str:
    """Return a number for a table.

    Args:
        value: The number; None or NaN: there is none.
        decimals: Digits after the point. Default: two, or more where the number is small.

    Example:
        >>> number(0.154), number(-1.43), number(0.0012345), number(28431.4), number(None)
        ('0.15', '−1.43', '0.0012', '28,431', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if decimals is not None:
        text = f"{value:.{decimals}f}"
    elif size >= 1e7 or 0 < size < 1e-4:
        text = f"{value:.2e}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.2f}" if size >= 0.1 or not size else f"{value:.2g}"
    return text.replace("-", "−") if text.strip("-0.") else text.lstrip("-")


def visible(text: str) -> str:
    r"""Return text whose control characters are symbols: no terminal escape, no reversed line, no half of a pair.

    Line breaks and tabs stay.

    Example:
        >>> visible("red: \x1b[31m, reversed: \u202e")
        'red: ␛[31m, reversed: \\u202e'
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if character in _BIDIRECTIONAL or unicodedata.category(character) in ("Cc", "Cs"):
        return f"\\u{code:04x}"
    return character


def shortened(text: str, length: int) -> str:
    """Return text of at most so many characters, and how many were left out."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text) - length:,} more characters)"
