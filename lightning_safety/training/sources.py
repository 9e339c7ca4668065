# SPDX-License-Identifier: Apache-2.0
"""What to train on: a prompt set, rows in memory, or a mixture of several with shares, as YAML can say it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_safety.arguments import check_positive, closest
from lightning_safety.data import BUILT_IN_SETS, Example, load_prompts
from lightning_safety.language.guards import INSTRUCTED

# The splits of the built-in sets that each argument may not use: tuning, decisions during a run and evaluation
# never share a prompt.
_REFUSED_SPLITS = {"train": ("monitor", "test"), "val": ("test",), "test": ()}
_DEFAULT_SPLIT = {"train": "train", "val": "monitor", "test": "test"}
_LOADING_KEYS = ("split", "prompt_column", "response_column", "limit")
_KEYS = (
    "source",
    "share",
    "weight",
    "response",
    "judgement",
    "retention",
    "own_replies",
    "unlikely",
    "max_response_tokens",
    *_LOADING_KEYS,
)
# So that a third may be written 0.333.
_SHARE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Source:
    """Examples from one place.

    Attributes:
        name: The place, for messages.
        examples: At least one; each has a response.
        share: The share of every batch, in (0, 1], or None.
        retention: Whether the KL term to the start model applies to these rows.
        own_replies: Whether the start model's own replies are learned instead of the responses.
        max_response_tokens: Learn only the first so many tokens of each response; None: as the data module says.
        weight: How often each row counts in the loss.
        unlikely: Whether the responses are what the model must not say.
    """

    name: str
    examples: Sequence[Example]
    share: float | None = None
    retention: bool = False
    own_replies: bool = False
    max_response_tokens: int | None = None
    weight: float = 1.0
    unlikely: bool = False


def read_sources(value: object, argument: str) -> list[Source]:
    """Load what an argument of `InstructionDataModule` names.

    Args:
        value: The name or path of a prompt set; or a list of `Example`; or a mapping with the key ``source`` (either of
            these) and optionally the keys of `InstructionDataModule`; or a list of such mappings.
        argument: ``"train"``, ``"val"`` or ``"test"``: decides which splits of the built-in sets are refused, and
            which one a set named alone means (train, monitor, test).

    Returns:
        At least one source. Either all have a share, and they sum to 1, or none has.

    Raises:
        TypeError: `value` is of another kind.
        ValueError: An unknown key, a refused split, a row without response, or shares that do not sum to 1.

    Example:
        >>> read_sources([Example("Hello", "Good morning.")], "train")[0].name
        'train'
    """
    if isinstance(value, str | os.PathLike | Mapping):
        entries: list[Any] = [value]
    elif isinstance(value, Sequence) and value and all(isinstance(item, Example) for item in value):
        entries = [{"source": value}]
    elif isinstance(value, Sequence) and value and all(isinstance(item, str | os.PathLike | Mapping) for item in value):
        entries = list(value)
    else:
        raise TypeError(
            f"`{argument}` expected to be a prompt set's name or path, a mapping with the key `source`, a list of "
            f"these, or a list of Example, but got {value!r:.200}."
        )
    sources = [
        _read_source(dict(entry) if isinstance(entry, Mapping) else {"source": entry}, argument) for entry in entries
    ]
    _check_shares([source.share for source in sources], argument)
    return sources


def _read_source(entry: dict[str, Any], argument: str) -> Source:
    for key in entry:
        if key not in _KEYS:
            raise ValueError(
                f"`{argument}` expected the keys {_list(_KEYS)} but got `{key}`. {closest(str(key), _KEYS)}"
            )
    if "source" not in entry:
        raise ValueError(f"`{argument}` expected the key `source` in every entry but got {entry!r:.200}.")
    value = entry["source"]
    retention, own_replies, unlikely = (_flag(entry, key, argument) for key in ("retention", "own_replies", "unlikely"))
    if unlikely and (own_replies or argument != "train"):
        given = "`own_replies: true`, which are those it does" if own_replies else f"a source of `{argument}`"
        raise ValueError(
            f"`{argument}.unlikely` expected a source of `train` with responses that the model must not give but got"
            f" {given}. Leave `unlikely` out."
        )
    loading = {key: entry[key] for key in _LOADING_KEYS if entry.get(key) is not None}
    if isinstance(value, str | os.PathLike):
        name, examples = _load(value, loading, argument)
    elif isinstance(value, Sequence) and value and all(isinstance(item, Example) for item in value):
        if loading:
            raise ValueError(f"`{argument}` expected no {_list(loading)} beside rows that are loaded already.")
        name, examples = argument, list(value)
    else:
        raise TypeError(f"`{argument}.source` expected to be a name, a path or Examples but got {value!r:.200}.")
    limit = entry.get("max_response_tokens")
    if limit is not None:
        check_positive(limit, f"{argument}.max_response_tokens")
    responses = _read_responses(entry, own_replies, argument)
    if responses:
        examples = [
            replace(example, response=responses[number % len(responses)]) for number, example in enumerate(examples)
        ]
    if not own_replies:
        _check_responses(examples, name, argument)
    if entry.get("judgement") is not None:
        examples = _as_questions(examples, entry["judgement"], own_replies, argument)
    return Source(name, examples, entry.get("share"), retention, own_replies, limit, _weight(entry, argument), unlikely)


def _weight(entry: Mapping[str, Any], argument: str) -> float:
    value = entry.get("weight", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"`{argument}.weight` expected to be a number above 0 but got {value!r}.")
    return float(value)


def _flag(entry: Mapping[str, Any], key: str, argument: str) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}.{key}` expected to be true or false but got {value!r}.")
    return value


def _read_responses(entry: Mapping[str, Any], own_replies: bool, argument: str) -> list[str]:
    """Return the responses that stand for those of the rows, in turns; empty: the rows keep theirs."""
    value = entry.get("response")
    if value is None:
        return []
    responses = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not responses or not all(isinstance(response, str) and response.strip() for response in responses):
        raise ValueError(
            f"`{argument}.response` expected to be the text of a response, or a list of these, but got {value!r:.200}."
        )
    if own_replies:
        raise ValueError(f"`{argument}` expected `response` or `own_replies: true` but got both. Leave one out.")
    return responses


def _as_questions(examples: Sequence[Example], answer: object, own_replies: bool, argument: str) -> list[Example]:
    """Return the rows as questions to a guard, with its answer."""
    answers = (*INSTRUCTED.safe, *INSTRUCTED.unsafe)
    if answer not in answers:
        raise ValueError(
            f"`{argument}.judgement` expected to be {' or '.join(answers)} but got {answer!r}. "
            f"{closest(str(answer), answers)}"
        )
    if own_replies:
        raise ValueError(f"`{argument}` expected `judgement` or `own_replies: true` but got both. Leave one out.")
    return [
        Example(INSTRUCTED.instruction.format(prompt=example.prompt, response=example.response), str(answer))
        for example in examples
    ]


def _load(source: str | os.PathLike[str], loading: dict[str, Any], argument: str) -> tuple[str, list[Example]]:
    if source in BUILT_IN_SETS:
        loading = {"split": _DEFAULT_SPLIT[argument], **loading}
        if loading["split"] in _REFUSED_SPLITS[argument]:
            allowed = [split for split in ("train", "score", "monitor") if split not in _REFUSED_SPLITS[argument]]
            raise ValueError(
                f"`{argument}` expected a split of {source!r} that is not kept for evaluation but got "
                f"{loading['split']!r}. Use {_list(allowed)}."
            )
    name = f"{os.fspath(source)}/{loading['split']}" if "split" in loading else os.fspath(source)
    return name, load_prompts(source, **loading)


def _check_responses(examples: Sequence[Example], name: str, argument: str) -> None:
    missing = [row for row, example in enumerate(examples) if not example.response or not example.response.strip()]
    if missing:
        raise ValueError(
            f"`{argument}` expected a response in every row but {len(missing)} of the {len(examples)} rows of {name!r} "
            f"have none (first: row {missing[0] + 1}, {examples[missing[0]].prompt!r:.60}). "
            f"Name its column with `response_column`."
        )


def _check_shares(shares: Sequence[object], argument: str) -> None:
    given = [share for share in shares if share is not None]
    if not given:
        return
    if len(given) < len(shares):
        raise ValueError(f"`{argument}` expected a share for every source or for none but got {list(shares)}.")
    total = 0.0
    for share in given:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"`{argument}.share` expected to be in (0, 1] but got {share!r}. For one half, write 0.5.")
        total += share
    if not math.isclose(total, 1, abs_tol=_SHARE_TOLERANCE):
        raise ValueError(f"`{argument}` expected shares that sum to 1 but they sum to {total:g}.")


def _list(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)
