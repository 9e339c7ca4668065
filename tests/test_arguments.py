# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest

from lightning_safety.arguments import check_fraction, check_positive, closest


@pytest.mark.parametrize("value", [0, -0.1, 5, 1.0001, 250, math.nan, math.inf, -math.inf])
def test_a_fraction_outside_is_a_value_error_that_says_how_to_write_it(value):
    with pytest.raises(ValueError, match=r"`fraction` expected to be in \(0, 1\] but got .*`fraction=0\.\d+`"):
        check_fraction(value)


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="`fraction` expected to be a number"):
        check_fraction(value)


@pytest.mark.parametrize("value", [1e-9, 0.5, 1, 1.0])
def test_a_fraction_passes(value):
    assert check_fraction(value) == value


def test_positive_integers():
    assert check_positive(3, "batch_size") == 3
    with pytest.raises(ValueError, match="`batch_size` expected to be at least 1 but got 0"):
        check_positive(0, "batch_size")
    for value in (1.0, True, "3"):
        with pytest.raises(TypeError, match="`batch_size` expected to be an integer"):
            check_positive(value, "batch_size")


def test_closest_names_the_nearest_or_all():
    assert closest("q_prj", ["q_proj", "k_proj", "up"]).startswith("Did you mean `q_proj`")
    assert closest("zzz", ["a", "b"]) == "Choose from `a`, `b`."
    assert "(3 more)" in closest("zzz", [str(number) * 9 for number in range(15)])
    assert closest("a", []) == "There is nothing to choose from."
