# SPDX-License-Identifier: Apache-2.0
"""What it takes to select the top 1 % of the 106 million scores of SmolLM2-135M, in time and in memory.

python benchmarks/selection.py [--json FILE] [--quick]

Scores are random, spread log-normally around a scale of each tensor's own, with zeros as of neurons that no prompt
reaches, and half of the tensors rounded to bfloat16, which makes many of them equal; and again with four values only,
of which the boundary cuts through one. All ways return the flat indices for each tensor.

"Sampled threshold" selects what lies above the quantile of a sample: of a million scores in all, or of 100,000 from
each tensor, as published. "kthvalue" and "topk" work on a copy of all scores in one tensor; of the former, what equals
the threshold is selected as well. Off by: how many are selected beyond those asked for; wrong: in how many places a
selection differs from the head of a stable sort. Extra memory is the peak of a fresh process each, less the scores.

`--quick` takes two of 30 layers and few rounds to show that the script works; its numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from memory import in_fresh_process, peak, reset_peak, resident
from side_by_side import parse_arguments, print_table, print_times, summary, take_turns, write_json
from streaming_memory import SHAPES
from torch import Tensor

from lightning_safety.scoring import select_top
from lightning_safety.scoring.selection import number_to_select

FRACTION = 0.01
ROUNDS = 11
SAMPLE = 1_000_000
SAMPLE_OF_TENSOR = 100_000
SEED = 0
LOG_NORMAL, FOUR_VALUES = "log-normal", "four values"
OURS, SAMPLED, SAMPLED_EACH = "select_top", "sampled threshold", "sampled threshold, of each tensor"
KTHVALUE, ALONE, TOPK = "kthvalue", "kthvalue, the threshold alone", "topk"
Scores = dict[str, Tensor]


def make_scores(kind: str, quick: bool) -> Scores:
    """Return scores of all linear layers; the same ones for the same arguments."""
    generator = torch.Generator().manual_seed(SEED)
    scores = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        if "embed_tokens" in name or (quick and ".layers." in name and int(name.split(".")[2]) > 1):
            continue
        if kind == FOUR_VALUES:
            scores[name] = torch.randint(4, shape, generator=generator).float()
            continue
        scale = float(torch.randn((), generator=generator))
        score = torch.randn(shape, generator=generator).mul_(1.5).add_(scale - 16).exp_()
        score[torch.rand(shape[0], generator=generator) < 0.01] = 0
        scores[name] = score.bfloat16().float() if number % 2 else score
    return scores


def sampled_threshold(scores: Scores) -> Scores:
    """Select what lies above a threshold that a sample gives: about as many as asked for."""
    total = count(scores)
    return above_quantile(scores, {name: SAMPLE * score.numel() // total for name, score in scores.items()})


def sampled_threshold_of_each(scores: Scores) -> Scores:
    """Select the same way, with as many samples of a small tensor as of a large one."""
    return above_quantile(scores, dict.fromkeys(scores, SAMPLE_OF_TENSOR))


def above_quantile(scores: Scores, samples: dict[str, int]) -> Scores:
    """Select what lies above the quantile of so many samples of each tensor."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.cat(
        [
            score.view(-1)[torch.randint(score.numel(), (samples[name],), generator=generator)]
            for name, score in scores.items()
        ]
    )
    # `torch.quantile` takes 16 million values at most.
    threshold = drawn.kthvalue(drawn.numel() - number_to_select(FRACTION, drawn.numel())).values
    return {name: (score.view(-1) > threshold).nonzero().squeeze(1) for name, score in scores.items()}


def by_kthvalue(scores: Scores) -> Scores:
    """Select what reaches the k-th largest value: all that was asked for, and whatever equals it."""
    threshold = kthvalue(scores)
    return {name: (score.view(-1) >= threshold).nonzero().squeeze(1) for name, score in scores.items()}


def kthvalue(scores: Scores) -> Tensor:
    """Return the k-th largest value."""
    copy = torch.cat([score.view(-1) for score in scores.values()])
    return copy.kthvalue(copy.numel() + 1 - number_to_select(FRACTION, copy.numel())).values


def by_topk(scores: Scores) -> Scores:
    """Select by `torch.topk`: as many as asked for, and any of those that equal the last."""
    copy = torch.cat([score.view(-1) for score in scores.values()])
    return by_tensor(copy.topk(number_to_select(FRACTION, copy.numel()), sorted=False).indices, scores)


def by_stable_sort(scores: Scores) -> Scores:
    """Select the head of a stable descending sort: what the selection is defined as."""
    copy = torch.cat([score.view(-1) for score in scores.values()])
    order = copy.sort(descending=True, stable=True).indices
    return by_tensor(order[: number_to_select(FRACTION, copy.numel())].clone(), scores)


def by_tensor(places: Tensor, scores: Scores) -> Scores:
    """Return places in all scores as sorted flat indices of each tensor."""
    lengths = torch.tensor([0, *(score.numel() for score in scores.values())])
    starts = lengths.cumsum(0)
    places = places.sort().values
    ends = torch.searchsorted(places, starts).tolist()
    return {name: places[ends[number] : ends[number + 1]] - starts[number] for number, name in enumerate(scores)}


def count(tensors: Scores) -> int:
    """Return how many entries there are in all."""
    return sum(tensor.numel() for tensor in tensors.values())


WAYS: dict[str, Callable[[Scores], Scores]] = {
    OURS: lambda scores: dict(select_top(scores, FRACTION).indices),
    SAMPLED: sampled_threshold,
    SAMPLED_EACH: sampled_threshold_of_each,
    KTHVALUE: by_kthvalue,
    ALONE: lambda scores: {"threshold": kthvalue(scores)},
    TOPK: by_topk,
}


def wrong_places(selected: Scores, exact: Scores) -> int:
    """Count the weights that are in one selection only."""
    common = sum(int(torch.isin(selected[name], exact[name]).sum()) for name in exact)
    return count(selected) + count(exact) - 2 * common


def measure_peak(way: str, kind: str, quick: bool) -> float:
    """Return the peak of a selection above its scores, in MB."""
    WAYS[way](make_scores(kind, quick=True))  # Whatever else a first call loads into memory comes before.
    scores = make_scores(kind, quick)
    before = resident()
    reset_peak()
    WAYS[way](scores)
    return peak() - before


def main() -> None:
    """Print the tables."""
    arguments = parse_arguments(__doc__)
    results = {}
    for kind in (LOG_NORMAL, FOUR_VALUES):
        scores = make_scores(kind, arguments.quick)
        asked = number_to_select(FRACTION, count(scores))
        print(f"{count(scores):,} scores, {kind}; {asked:,} to select:\n")
        times = take_turns(
            {way: partial(select, scores) for way, select in WAYS.items()}, rounds=3 if arguments.quick else ROUNDS
        )
        print_times(times, unit="seconds", against=OURS)
        exact = by_stable_sort(scores)
        selections = {way: WAYS[way](scores) for way in WAYS if way != ALONE}
        off = {way: count(selected) - asked for way, selected in selections.items()}
        wrong = {way: wrong_places(selected, exact) for way, selected in selections.items()}
        del scores, exact, selections
        extra = {way: in_fresh_process(measure_peak, way, kind, arguments.quick) for way in off}
        print_table(
            ["", "off by", "wrong", "extra memory, MB"],
            [[way, f"{off[way]:+,}", f"{wrong[way]:,}", f"{extra[way]:.0f}"] for way in off],
        )
        results[kind.replace("-", "_").replace(" ", "_")] = {
            "asked": asked,
            "times": summary(times, against=OURS),
            "off_by": off,
            "wrong": wrong,
            "extra_megabytes": extra,
        }
    write_json(
        arguments,
        settings={"fraction": FRACTION, "sample": SAMPLE, "sample_of_each_tensor": SAMPLE_OF_TENSOR},
        **results,
    )


if __name__ == "__main__":
    main()
