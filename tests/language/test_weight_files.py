# SPDX-License-Identifier: Apache-2.0
"""Reading weights from files: single, sharded, of several types, incomplete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository `owner/name` on a hub whose snapshots are in `cache`; each download adds its files."""
    repository, snapshot = tmp_path / "hub", tmp_path / "cache" / "snapshots" / "0123abc"

    def download(
        source: str, revision: str | None = None, allow_patterns: object = None, ignore_patterns: object = None
    ) -> str:
        assert source == "owner/name"
        assert revision == ("0123abc" if snapshot.exists() else None)
        names = [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):  # type: ignore[arg-type]
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    make_tiny_model().save_pretrained(repository, max_shard_size="30KB")
    for name in (
        "consolidated.safetensors",
        "original/model.safetensors",
        "onnx/config.json",
        "README.md",
        "model.bin",
    ):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"large")
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"):
        (repository / name).write_text("{}")
    return repository


def fetched(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_the_shards_of_the_index_are_downloaded(hub: Path) -> None:
    files = WeightFiles("owner/name")
    assert len(files.files()) > 2
    assert fetched(files.folder) == {INDEX, "config.json", *(path.name for path in hub.glob("model-*.safetensors"))}
    assert set(files.shapes) == set(WeightFiles(hub).shapes)


def test_only_the_single_file_is_downloaded(hub: Path) -> None:
    (hub / INDEX).unlink()
    save(hub, {"a": torch.randn(3, 3)})
    files = WeightFiles("owner/name")
    assert files.shapes == {"a": (3, 3)}
    assert fetched(files.folder) == {"model.safetensors", "config.json"}


def test_settings_and_tokenizer_are_downloaded_when_asked(hub: Path) -> None:
    plain = WeightFiles("owner/name")
    before = fetched(plain.folder)
    shutil.rmtree(plain.folder)
    asked = fetched(WeightFiles("owner/name", settings=True).folder)
    assert {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"} <= asked - before
    assert not {name for name in asked if "/" in name or name.startswith(("consolidated", "README", "model.bin"))}


@pytest.mark.parametrize("shard", ["../model.safetensors", "original/model.safetensors", "model.bin"])
def test_an_index_names_safetensors_files_beside_it(hub: Path, shard: str) -> None:
    (hub / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    for source in ("owner/name", str(hub)):
        with pytest.raises(ValueError, match=rf"expected an index of \.safetensors files beside it .* '{shard}'"):
            WeightFiles(source)


def test_an_index_cannot_ask_for_all_files(hub: Path) -> None:
    (hub / INDEX).write_text(json.dumps({"weight_map": {"a": "*.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="lacks"):
        WeightFiles("owner/name")


def test_a_hub_repository_without_safetensors(hub: Path) -> None:
    (hub / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"'owner/name' expected to hold .* holds neither"):
        WeightFiles("owner/name")


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


def test_only_names_that_are_wanted_are_checked(tmp_path: Path) -> None:
    body = {"a": torch.randn(3, 4), "b": torch.randn(4), "c": torch.randn(5)}
    one = WeightFiles(save(tmp_path / "one", body))
    other = WeightFiles(save(tmp_path / "other", {"a": torch.randn(3, 4), "c": torch.randn(6), "d": torch.randn(1)}))
    assert common_shapes([one, other], ["a", "nowhere"]) == {"a": (3, 4)}
    with pytest.raises(ValueError, match=r"`d` and .*one' does not\. .*Leave it out\."):
        common_shapes([one, other], ["a", "d"], advice="Leave it out.")
    with pytest.raises(ValueError, match=r"`c` is \(5,\) in"):
        common_shapes([one, other], ["c"])


def test_a_tied_head_that_one_checkpoint_stores(tmp_path: Path) -> None:
    head = {"embed.weight": torch.randn(6, 2), "lm_head.weight": torch.randn(6, 2)}
    with_head = WeightFiles(save(tmp_path / "with", head))
    without = save(tmp_path / "without", {"embed.weight": head["embed.weight"]})
    with pytest.raises(ValueError, match=r"holds `lm_head.weight` and .* does not"):
        common_shapes([with_head, WeightFiles(without)])
    (without / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert common_shapes([with_head, WeightFiles(without)]) == {"embed.weight": (6, 2)}
