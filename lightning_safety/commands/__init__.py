# SPDX-License-Identifier: Apache-2.0
"""What the words after ``lightning-safety`` do, but for training (`cli.py`): each function is one command.

Names, defaults and help texts of the options are those of the functions.
"""

from __future__ import annotations

from lightning_safety.commands.judgements import evaluate, judge_agreement
from lightning_safety.commands.models import export, patch_apply, patch_info, patch_revert
from lightning_safety.commands.recipe_files import recipes_cp, recipes_ls, recipes_show
from lightning_safety.commands.reports import report, results
from lightning_safety.commands.scores import mask_describe, score
from lightning_safety.commands.subspaces import project, subspace

__all__ = [
    "evaluate",
    "export",
    "judge_agreement",
    "mask_describe",
    "patch_apply",
    "patch_info",
    "patch_revert",
    "project",
    "recipes_cp",
    "recipes_ls",
    "recipes_show",
    "report",
    "results",
    "score",
    "subspace",
]
