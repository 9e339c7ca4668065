# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn

from lightning_safety.enforcement.optimizers import check_elementwise, check_reports_steps
from tests.enforcement.toys import Lion

REFUSED = {
    "AdamW8bit": lambda weights: bitsandbytes.optim.AdamW8bit(weights),
    "PagedAdamW8bit": lambda weights: bitsandbytes.optim.PagedAdamW8bit(weights),
    "Lion8bit": lambda weights: bitsandbytes.optim.Lion8bit(weights),
    "AdamW": lambda weights: bitsandbytes.optim.AdamW(weights, optim_bits=8),
    "LAMB": lambda weights: bitsandbytes.optim.LAMB(weights),
    "LARS": lambda weights: bitsandbytes.optim.LARS(weights, lr=0.1, momentum=0.9),
    "Muon": lambda weights: torch.optim.Muon(weights),
    "Adafactor": lambda weights: torch.optim.Adafactor(weights),
    "LBFGS": lambda weights: torch.optim.LBFGS(weights),
}


@pytest.mark.parametrize(("name", "make"), REFUSED.items(), ids=list(REFUSED))
def test_optimizers_that_look_at_more_than_one_weight_are_refused(name: str, make) -> None:
    optimizer = make(nn.Linear(4, 4, bias=False).parameters())
    check_reports_steps(optimizer)
    with pytest.raises(ValueError, match=rf"`optimizer` expected .* but {name} .*torch\.optim\.AdamW"):
        check_elementwise(optimizer)


def test_transformers_adafactor_is_refused() -> None:
    optimizer = transformers.Adafactor(nn.Linear(4, 4).parameters())
    with pytest.raises(ValueError, match="Adafactor factors its state"):
        check_elementwise(optimizer)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.Adam,
        torch.optim.SGD,
        torch.optim.RMSprop,
        torch.optim.RAdam,
        Lion,
        bitsandbytes.optim.AdamW,
        bitsandbytes.optim.Lion,
    ],
)
def test_elementwise_optimizers_pass(make) -> None:
    optimizer = make(nn.Linear(4, 4).parameters(), lr=1e-3)
    check_reports_steps(optimizer)
    check_elementwise(optimizer)
