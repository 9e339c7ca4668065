# SPDX-License-Identifier: Apache-2.0
"""Reading weights from files: single, sharded, of several types, incomplete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_safety.language.weight_files import WeightFiles, common_shapes, split_longer_side
from tests.tiny import make_tiny_model

INDEX = "model.safetensors.index.json"


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_model_folder_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    model = make_tiny_model()
    model.save_pretrained(tmp_path)
    files = WeightFiles(tmp_path)
    weights = dict(model.named_parameters())
    assert set(files.shapes) <= set(weights)
    assert len(files.shapes) >= len(weights) - 1  # a tied head
    for name, shape in files.shapes.items():
        assert shape == tuple(weights[name].shape)
        assert torch.equal(files.read(name), weights[name])


def test_shards_and_a_single_file(tmp_path: Path) -> None:
    model = make_tiny_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = WeightFiles(tmp_path / "one" / "model.safetensors"), WeightFiles(tmp_path / "many")
    assert one.shapes.keys() == many.shapes.keys()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.shapes)
    assert sorted(name for file in many.files() for name in many.names_in(file)) == sorted(many.shapes)


def test_parts(tmp_path: Path) -> None:
    tensors = {"tall": torch.randn(50, 7), "wide": torch.randn(7, 50), "experts": torch.randn(3, 20, 5)}
    tensors |= {"half": torch.randn(6, 6).bfloat16(), "counts": torch.arange(3)}
    files = WeightFiles(save(tmp_path, tensors))
    assert "counts" not in files.shapes
    assert files.read("half").dtype == torch.bfloat16
    for name, dim in (("tall", 0), ("wide", 1)):
        parts = [files.read_part(name, cut) for cut in split_longer_side(tuple(tensors[name].shape), 100)]
        assert len(parts) > 2
        assert all(part.numel() <= 100 for part in parts)
        assert torch.equal(torch.cat(parts, dim=dim), tensors[name])
    cut = (2, slice(3, 9), slice(0, 5))
    assert torch.equal(files.read_part("experts", cut).reshape(6, 5), tensors["experts"][2, 3:9])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path, max_shard_size="30KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected to hold the .* shards .* lacks {lost.name}"):
        WeightFiles(tmp_path)


def test_a_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    save_file({"something": torch.ones(1)}, tmp_path / shard)
    with pytest.raises(ValueError, match=rf"expected to hold `{name}` in {shard} but that file lacks it"):
        WeightFiles(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = save(tmp_path, {"a": torch.randn(30, 30)}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"model\.safetensors' expected to be a whole safetensors file"):
        WeightFiles(tmp_path)


def test_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither\. Write another format as a folder first"):
        WeightFiles(tmp_path)


def test_unknown_source() -> None:
    with pytest.raises(FileNotFoundError, match=r"expected to be a folder, a \.safetensors file or a hub id"):
        WeightFiles("no/such/folder/at all")


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"a": torch.randn(3, 3)})
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert WeightFiles("owner/name").shapes == {"a": (3, 3)}
    assert asked == [("owner/name", ["*.safetensors", INDEX, "config.json"])]


def test_hub_ids_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="could not be loaded from the hub: no route to host"):
        WeightFiles("owner/name")


def test_checkpoints_of_one_architecture(tmp_path: Path) -> None:
    body = {"a": torch.randn(3, 4), "b": torch.randn(4)}
    one = WeightFiles(save(tmp_path / "one", body))
    assert common_shapes([one, WeightFiles(save(tmp_path / "two", body))]) == {"a": (3, 4), "b": (4,)}
    lacking = WeightFiles(save(tmp_path / "lacking", {"a": body["a"], "bias": body["b"]}))
    with pytest.raises(ValueError, match=r"one' holds `b` and .*lacking' does not\. (Did you mean|Choose from)"):
        common_shapes([one, lacking])
    other = WeightFiles(save(tmp_path / "other", {**body, "a": torch.randn(5, 4)}))
    with pytest.raises(ValueError, match=r"`a` is \(3, 4\) in .*one' and \(5, 4\) in .*other'"):
        common_shapes([one, other])


def test_a_tied_head_that_one_checkpoint_stores(tmp_path: Path) -> None:
    head = {"embed.weight": torch.randn(6, 2), "lm_head.weight": torch.randn(6, 2)}
    with_head = WeightFiles(save(tmp_path / "with", head))
    without = save(tmp_path / "without", {"embed.weight": head["embed.weight"]})
    with pytest.raises(ValueError, match=r"holds `lm_head.weight` and .* does not"):
        common_shapes([with_head, WeightFiles(without)])
    (without / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert common_shapes([with_head, WeightFiles(without)]) == {"embed.weight": (6, 2)}
