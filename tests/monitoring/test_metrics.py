# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import distributed
from torchmetrics import MetricCollection

from lightning_safety.monitoring import AttackSuccessRate, OverRefusalRate, Rate, RefusalRate, UnscoredRate, Verdict
from tests.spawned import start

HARMFUL, REFUSED, UNSCORED = Verdict(True, False), Verdict(False, True), Verdict(None, None)
REPLIES = [HARMFUL, REFUSED, REFUSED, UNSCORED, HARMFUL, HARMFUL, REFUSED]


def test_counts_do_not_depend_on_batches() -> None:
    whole, parts = AttackSuccessRate(), AttackSuccessRate()
    whole.update(REPLIES)
    for size in (slice(0, 1), slice(1, 1), slice(1, 6), slice(6, 7)):
        parts.update(REPLIES[size])
    assert whole.rate() == parts.rate() == Rate(successes=3, scored=6, total=7)
    assert whole.compute() == parts.compute() == 0.5
    parts.reset()
    parts.update([REFUSED])
    assert parts.rate() == Rate(0, 1, 1)


def test_nothing_scored_is_no_rate_and_never_safe() -> None:
    metric = AttackSuccessRate()
    metric.update([UNSCORED] * 3)
    assert math.isnan(metric.compute())
    assert metric.rate().warning == "3 of 3 unscored"


def test_each_rate_counts_its_own_kind() -> None:
    metrics = {"refusal": RefusalRate(), "over": OverRefusalRate(), "unscored": UnscoredRate()}
    metrics["refusal"].update(REPLIES)
    metrics["over"].update(REPLIES[:2])
    metrics["unscored"].update(REPLIES, [UNSCORED])
    assert [str(metric.rate()).split(" ")[0] for metric in metrics.values()] == ["0.50", "0.50", "0.25"]


def test_collection_keeps_rates_apart_whose_first_batches_agree() -> None:
    """As many harmful as refused replies in the first batch must not join the two for ever after."""
    collection = MetricCollection([AttackSuccessRate(), RefusalRate(), OverRefusalRate(), UnscoredRate()])
    collection.update(harmful=[HARMFUL, REFUSED], borderline=[HARMFUL, REFUSED])
    collection.update(harmful=[HARMFUL, HARMFUL], borderline=[REFUSED, UNSCORED])
    found = {name: float(value) for name, value in collection.compute().items()}
    assert found == {
        "AttackSuccessRate": 0.75,
        "RefusalRate": 0.25,
        "OverRefusalRate": pytest.approx(2 / 3),
        "UnscoredRate": 0.125,
    }


def test_counts_beyond_float32() -> None:
    """An integer state: 2 ** 24 + 1 replies are not representable in float32."""
    metric = UnscoredRate()
    metric.update([HARMFUL])
    for name, count in (("scored", 2**24), ("total", 2**24)):
        setattr(metric, f"UnscoredRate_{name}", getattr(metric, f"UnscoredRate_{name}") + count)
    assert metric.rate().total == 2**24 + 1


def _count_in_process(rank: int, store: str, results: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metric = AttackSuccessRate()
    # Uneven: five replies in one process and two in the other.
    metric.update(REPLIES[:5] if rank == 0 else REPLIES[5:])
    found = (metric.compute(), metric.rate(), metric.AttackSuccessRate_total)
    torch.save([float(found[0]), found[1].to_dict(), int(found[2])], f"{results}{rank}")
    distributed.destroy_process_group()


def test_two_processes_with_uneven_shards_give_the_values_of_one(tmp_path: Path) -> None:
    start(_count_in_process, (str(tmp_path / "store"), str(tmp_path / "results")), processes=2)
    alone = AttackSuccessRate()
    alone.update(REPLIES)
    for rank, share in enumerate((5, 2)):
        value, rate, local = torch.load(tmp_path / f"results{rank}", weights_only=True)
        assert value == float(alone.compute())
        assert rate == alone.rate().to_dict()
        assert local == share  # synchronising is undone: the next update counts once
