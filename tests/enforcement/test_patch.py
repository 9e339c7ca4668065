# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_safety.enforcement import CompactTraining, SafetyPatch, patch_file, snapshot_entries
from lightning_safety.scoring.mask import SafetyMask
from tests.enforcement.toys import bits, chosen, make_toy, toy_mask, train, weights_of


def trained(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, SafetyPatch]:
    """A model before, the same after, and the patch between them."""
    mask, start, model = toy_mask(), make_toy().to(dtype), make_toy().to(dtype)
    before = snapshot_entries(model, mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with CompactTraining(mask).attach(model, [optimizer]):
        train(model, optimizer)
    return start, model, SafetyPatch.capture(model, mask, before, {"model": "toy", "steps": "5"})


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(bits(a.detach()), bits(b.detach())) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_makes_the_trained_model_and_revert_the_start(tmp_path: Path, dtype: torch.dtype) -> None:
    start, model, patch = trained(dtype)
    patch.save(tmp_path / "patch.safetensors")
    loaded = SafetyPatch.load(tmp_path / "patch.safetensors")
    assert loaded.mask == patch.mask
    assert loaded.mask.metadata == {"method": "test"}
    assert loaded.metadata == {"model": "toy", "steps": "5"}
    subject = make_toy().to(dtype)
    loaded.apply(subject)
    assert same_bits(subject, model)
    loaded.revert(subject)
    assert same_bits(subject, start)


def test_values_are_copies() -> None:
    model = nn.Linear(2, 1, bias=False)
    mask = SafetyMask({"weight": torch.tensor([1])}, {"weight": (1, 2)})
    patch = SafetyPatch(mask, {"weight": model.weight.detach()[0, 1:]}, {"weight": torch.tensor([9.0])})
    patch.apply(model)
    patch.revert(model)
    assert model.weight[0, 1] != 9.0


def test_counts_and_info() -> None:
    mask = toy_mask()
    values = {"embedding.weight": torch.zeros(3), "middle.weight": torch.zeros(2)}
    after = {"embedding.weight": torch.tensor([0.0, -0.0, 1.0]), "middle.weight": torch.zeros(2)}
    patch = SafetyPatch(mask, values, after, {"model": "toy"})
    assert (patch.count, patch.changed) == (5, 2)
    assert repr(patch) == "SafetyPatch(5 weights in 2 tensors, 2 changed)"
    lines = dict(line.split(maxsplit=1) for line in patch.info().splitlines())
    assert lines == {
        "weights": "5 in 2 tensors",
        "changed": "2",
        "dtype": "float32",
        "model": "toy",
        "mask.method": "test",
    }


def test_nan_and_negative_zero_before_are_recognised() -> None:
    model = make_toy()
    with torch.no_grad():
        model.middle.weight.view(-1)[3:5] = torch.tensor([float("nan"), -0.0])
    mask = toy_mask()
    before = snapshot_entries(model, mask)
    after = {name: torch.ones_like(value) for name, value in before.items()}
    SafetyPatch(mask, before, after).apply(model)
    assert model.middle.weight.flatten()[3:5].tolist() == [1.0, 1.0]


class TestRefusedWithNothingChanged:
    def refuse(self, action: Callable[[nn.Module], None], model: nn.Module, message: str) -> None:
        before = weights_of(model)
        with pytest.raises(ValueError, match=message):
            action(model)
        for name, weight in model.named_parameters():
            assert torch.equal(bits(weight.detach()), bits(before[name]))

    def test_applied_twice(self) -> None:
        start, _, patch = trained()
        patch.apply(start)
        self.refuse(patch.apply, start, "the patch is already applied. Use `revert`")

    def test_reverted_twice(self) -> None:
        start, _, patch = trained()
        self.refuse(patch.revert, start, "the patch is not applied. Use `apply` first")

    def test_another_model(self) -> None:
        _, _, patch = trained()
        self.refuse(patch.apply, make_toy(seed=1), r"5 of 5 places hold others: .* far apart: probably another model")

    def test_same_model_from_another_dtype(self) -> None:
        start, _, patch = trained()
        self.refuse(
            patch.apply, start.bfloat16().float(), r"5 of 5 places .* another dtype or quantisation.*very model"
        )

    def test_only_the_last_tensor_differs(self) -> None:
        start, _, patch = trained()
        with torch.no_grad():
            start.middle.weight.view(-1)[4] += 1e-3
        self.refuse(patch.apply, start, r"1 of 5 places hold others: `middle\.weight` \(1\)\. They are close")

    def test_model_loaded_in_another_dtype(self) -> None:
        start, _, patch = trained()
        message = r"`embedding\.weight` is torch\.bfloat16 in the model and torch\.float32.*`dtype=torch\.float32`"
        self.refuse(patch.apply, start.bfloat16(), message)

    def test_other_architecture(self) -> None:
        _, _, patch = trained()
        self.refuse(patch.apply, nn.Linear(4, 4), r"embedding\.weight")


class TestBadValues:
    def build(self, message: str, **sides: dict[str, Any]) -> None:
        good = {"embedding.weight": torch.zeros(3), "middle.weight": torch.zeros(2)}
        with pytest.raises(ValueError, match=message):
            SafetyPatch(toy_mask(), **{"before": good, "after": good, **sides})

    def test_missing_tensor(self) -> None:
        self.build("`middle.weight` has no values", before={"embedding.weight": torch.zeros(3)})

    def test_tensor_without_selection(self) -> None:
        extra = {"embedding.weight": torch.zeros(3), "middle.weight": torch.zeros(2), "head": torch.zeros(1)}
        self.build("`head` has no selected weights", after=extra)

    def test_wrong_number(self) -> None:
        self.build(
            "2 floating-point values", after={"embedding.weight": torch.zeros(3), "middle.weight": torch.zeros(3)}
        )

    def test_integers(self) -> None:
        values = {"embedding.weight": torch.zeros(3), "middle.weight": torch.zeros(2, dtype=torch.int64)}
        self.build("2 floating-point values", before=values)

    def test_two_dtypes(self) -> None:
        values = {"embedding.weight": torch.zeros(3), "middle.weight": torch.zeros(2).half()}
        self.build("one dtype", before=values)


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        trained()[2].save(tmp_path / "patch.safetensors")
        return tmp_path / "patch.safetensors"

    def rewrite(self, path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata()
        change(tensors, header)
        save_file(tensors, path, metadata=header)

    def refuse(self, path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SafetyPatch.load(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="expected to be a patch but there is none"):
            SafetyPatch.load(tmp_path / "none.safetensors")

    @pytest.mark.parametrize("keep", [0, 5, 200, -1])
    def test_truncated(self, path: Path, keep: int) -> None:
        path.write_bytes(path.read_bytes()[:keep])
        self.refuse(path, "cannot be read.*truncated")

    def test_a_mask_is_no_patch(self, tmp_path: Path) -> None:
        toy_mask().save(tmp_path / "mask.safetensors")
        self.refuse(tmp_path / "mask.safetensors", "another kind of safetensors file")

    def test_newer_version(self, path: Path) -> None:
        self.rewrite(path, lambda tensors, header: header.update(version="2"))
        self.refuse(path, "version '2'.*Update")

    def test_altered_value(self, path: Path) -> None:
        self.rewrite(path, lambda tensors, header: tensors["after/middle.weight"].add_(1))
        self.refuse(path, "was altered after it was written")

    def test_altered_metadata(self, path: Path) -> None:
        self.rewrite(path, lambda tensors, header: header.update(metadata=json.dumps({"model": "other"})))
        self.refuse(path, "was altered after it was written")

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            ([-1, 4], r"in \[0, 64\) .* got -1"),
            ([3, 64], r"in \[0, 64\) .* got 64"),
            ([3, 2**31 - 1], r"in \[0, 64\)"),
            ([4, 3], "sorted without duplicates"),
            ([3, 3], "sorted without duplicates"),
        ],
    )
    def test_bad_indices(self, path: Path, indices: list[int], message: str) -> None:
        wrong = torch.tensor(indices, dtype=torch.int32)
        self.rewrite(path, lambda tensors, header: tensors.update({"indices/middle.weight": wrong}))
        self.refuse(path, rf"is not a valid patch\. .*{message}")

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors, header: tensors.pop("before/middle.weight"),
            lambda tensors, header: tensors.pop("indices/middle.weight"),
            lambda tensors, header: tensors.update({"extra/middle.weight": torch.zeros(2)}),
            lambda tensors, header: tensors.update({"after/middle.weight": torch.zeros(2).half()}),
            lambda tensors, header: header.update(shapes="[]"),
            lambda tensors, header: header.update(shapes="{"),
            lambda tensors, header: header.update(shapes=json.dumps({"middle.weight": [2**40, 2**40]})),
            lambda tensors, header: header.update(metadata=json.dumps({"model": 1})),
            lambda tensors, header: header.update(mask="[" * 100_000),
        ],
    )
    def test_inconsistent(self, path: Path, change: Callable[..., Any]) -> None:
        self.rewrite(path, change)
        self.refuse(path, "is not a valid patch")

    def test_missing_header_entry(self, path: Path) -> None:
        self.rewrite(path, lambda tensors, header: header.pop("mask"))
        self.refuse(path, "in its header but has not")

    def test_full_disk_keeps_the_older_file(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        older = path.read_bytes()

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(patch_file, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            trained()[2].save(path)
        assert path.read_bytes() == older
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_only_selected_places_differ() -> None:
    start, model, patch = trained()
    moved = 0
    for (name, left), right in zip(start.named_parameters(), model.parameters(), strict=True):
        different = bits(left.detach()) != bits(right.detach())
        assert not different[~chosen(patch.mask, name, left.numel())].any()
        moved += int(different.sum())
    assert moved == patch.changed == patch.count
