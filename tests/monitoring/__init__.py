# SPDX-License-Identifier: Apache-2.0
"""Tests of `lightning_safety.monitoring`."""
