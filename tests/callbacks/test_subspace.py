# SPDX-License-Identifier: Apache-2.0
"""What the subspace monitor measures, against the same by hand; and that it leaves a fit alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from peft import LoraConfig, get_peft_model
from pytorch_lightning.loggers import CSVLogger

from lightning_safety.callbacks import SafetyEnhancementTuning, subspace
from lightning_safety.monitoring import energy_kept_ratio, left_basis, subspace_overlap
from lightning_safety.monitoring.subspace_file import SubspaceFile
from lightning_safety.scoring import RefusalLikelihood, RefusalMargin, mean_gradients, scored_weights
from tests.callbacks.fits import UserModule, fit, make_loader, make_trainer, read_lines
from tests.callbacks.subspaces import EVERYDAY, HARMFUL, Weights, make_monitor
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(litlogger|not have many workers|log_every|not empty|mid-epoch)")


def test_values_equal_those_by_hand(tiny_tokenizer: Any, tmp_path: Path) -> None:
    weights = Weights()
    fit(tiny_tokenizer, tmp_path, [weights, make_monitor()], max_steps=5)
    torch.manual_seed(7)
    model = UserModule(tiny_tokenizer).network
    start = weights.seen[0]
    gradients = {
        "": mean_gradients(model, RefusalMargin(HARMFUL), tiny_tokenizer),
        "_utility": mean_gradients(model, RefusalLikelihood(EVERYDAY), tiny_tokenizer),
    }
    lines = list(read_lines(tmp_path))
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        updates = {name: weight - start[name] for name, weight in weights.seen[line["step"]].items()}
        norm = math.sqrt(sum(float(update.double().square().sum()) for update in updates.values()))
        assert line["safety/update_norm"] == pytest.approx(norm, rel=1e-6)
        for suffix, gradient in gradients.items():
            references = {name: left_basis(gradient[name], energy=0.8) for name in updates}
            own = {name: left_basis(update, energy=0.8) for name, update in updates.items()}
            overlaps = [subspace_overlap(own[name], references[name]) for name in updates]
            assert line[f"safety/subspace_overlap{suffix}"] == pytest.approx(sum(overlaps) / len(overlaps), abs=1e-5)
            kept = energy_kept_ratio(updates, references)
            assert line[f"safety/energy_kept{suffix}"] == pytest.approx(kept, abs=1e-5)
            chance = [max(own[n].rank, references[n].rank) / len(updates[n]) for n in updates]
            assert line[f"safety/subspace_overlap{suffix}_random"] == pytest.approx(sum(chance) / len(chance))
            energies = [float(update.double().square().sum()) for update in updates.values()]
            shares = [references[name].rank / len(updates[name]) for name in updates]
            kept_random = sum(e * share for e, share in zip(energies, shares, strict=True)) / sum(energies)
            assert line[f"safety/energy_kept{suffix}_random"] == pytest.approx(kept_random, rel=1e-5)
            of_values = [o for name, o in zip(updates, overlaps, strict=True) if "v_proj" in name]
            kind = "utility" if suffix else "safety"
            found = line["components"]["v"][kind]["subspace_overlap"]
            assert found == pytest.approx(sum(of_values) / len(of_values), abs=1e-5)
        both = [
            subspace_overlap(*(left_basis(gradient[name], energy=0.8) for gradient in gradients.values()))
            for name in start
        ]
        assert line["entanglement"]["overlap"] == pytest.approx(sum(both) / len(both), abs=1e-5)
        assert set(line["components"]) == {"q", "k", "v", "o", "gate", "up", "down", "head"}
        assert set(line["layers"]) == {"0", "1", "head"}


def test_before_the_first_step_overlaps_are_undefined(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer, _ = fit(
        tiny_tokenizer, tmp_path, [make_monitor(every_n_steps=None, at_start=True, at_end=False)], max_steps=1
    )
    (line,) = read_lines(tmp_path)
    assert line["safety/update_norm"] == 0
    assert line["safety/subspace_overlap"] is None
    assert math.isnan(trainer.callback_metrics["safety/subspace_overlap"])
    assert line["safety/energy_kept"] is None


def test_training_is_left_alone(tiny_tokenizer: Any, tmp_path: Path) -> None:
    _, watched = fit(tiny_tokenizer, tmp_path / "a", [make_monitor(every_n_steps=1, figures=True)], max_steps=8)
    _, plain = fit(tiny_tokenizer, tmp_path / "b", [], max_steps=8)
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in watched.state_dict().items())


def test_alignment_update_as_reference(tiny_tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = UserModule(tiny_tokenizer).network
    model.save_pretrained(tmp_path / "aligned")
    names = list(scored_weights(model))
    directions = {name: torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])
                  for name, weight in scored_weights(model).items()}  # fmt: skip
    with torch.no_grad():
        for name, weight in scored_weights(model).items():
            weight.sub_(directions[name])
    model.save_pretrained(tmp_path / "base")
    reference = {"base": str(tmp_path / "base"), "aligned": str(tmp_path / "aligned")}
    monitor = make_monitor(reference=reference, watch_utility=False)
    fit(tiny_tokenizer, tmp_path / "run", [monitor], max_steps=2)
    file = SubspaceFile(tmp_path / "run" / "safety_subspaces.safetensors")
    assert file.matrices("safety") == sorted(names)
    assert file.matrices("utility") == []
    for name in names:
        basis = file.bases(["safety"], name)["safety"]
        assert basis.shape[1] == 1
        assert energy_kept_ratio(directions[name], basis) == pytest.approx(1, abs=1e-5)
    other = make_tiny_model(seed=4)  # without a head of its own
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"they have no `lm_head.weight`"):
        fit(tiny_tokenizer, tmp_path, [make_monitor(reference={**reference, "base": str(tmp_path / "other")})])


def test_an_earlier_runs_subspaces_as_reference(tiny_tokenizer: Any, tmp_path: Path) -> None:
    fit(tiny_tokenizer, tmp_path / "one", [make_monitor()], max_steps=2)
    file = tmp_path / "one" / "safety_subspaces.safetensors"
    fit(tiny_tokenizer, tmp_path / "two", [make_monitor(reference=str(file))], max_steps=2)
    one, two = (next(iter(read_lines(tmp_path / name))) for name in ("one", "two"))
    assert one["safety/subspace_overlap"] == two["safety/subspace_overlap"]
    partial = make_monitor(include="*mlp*")
    fit(tiny_tokenizer, tmp_path / "three", [partial], max_steps=2)
    sampled = tmp_path / "three" / "safety_subspaces.safetensors"
    assert len(SubspaceFile(sampled).matrices("safety")) == 6
    with pytest.raises(ValueError, match=r"has none of `model.layers.0.self_attn.q_proj.weight`"):
        fit(tiny_tokenizer, tmp_path / "four", [make_monitor(reference=str(sampled))], max_steps=2)
    with pytest.raises(FileNotFoundError, match="expected to be a file of subspaces but there is none"):
        fit(tiny_tokenizer, tmp_path / "four", [make_monitor(reference=str(tmp_path / "none"))], max_steps=2)


def test_under_enhancement_tuning_only_selected_weights_move(tiny_tokenizer: Any, tmp_path: Path) -> None:
    enhance = SafetyEnhancementTuning(0.05, method="random")
    for callbacks in ([enhance, make_monitor()], [make_monitor(), enhance]):
        folder = tmp_path / type(callbacks[0]).__name__
        fit(tiny_tokenizer, folder, callbacks, max_steps=4)
    first, second = (
        [line["safety/update_norm"] for line in read_lines(tmp_path / name)]
        for name in ("SafetyEnhancementTuning", "SubspaceOverlapMonitor")
    )
    assert first == second
    # Of a twentieth of the weights; the others, held, would add most of the norm.
    _, _free = fit(tiny_tokenizer, tmp_path / "free", [make_monitor()], max_steps=4)
    whole = [line["safety/update_norm"] for line in read_lines(tmp_path / "free")]
    assert all(0 < norm < 0.4 * other for norm, other in zip(first, whole, strict=True))


def test_the_figure_goes_to_the_run_folder(tiny_tokenizer: Any, tmp_path: Path) -> None:
    fit(tiny_tokenizer, tmp_path, [make_monitor(figures=True)], max_steps=2, logger=CSVLogger(tmp_path, version=0))
    folder = tmp_path / "lightning_logs" / "version_0"
    assert (folder / "safety_figures" / "subspace_overlap-2.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "safety.jsonl").read_text().splitlines()[0])["monitor"] == "SubspaceOverlapMonitor"


def test_fast_dev_run_leaves_no_file(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer, _ = fit(tiny_tokenizer, tmp_path, [make_monitor()], fast_dev_run=True)
    assert trainer.callback_metrics["safety/update_norm"] > 0
    assert list(tmp_path.rglob("*")) == []


def test_bad_arguments(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`every_n_steps` expected to be at least 1 but got 0"):
        make_monitor(every_n_steps=0)
    with pytest.raises(ValueError, match="`energy` expected to be in"):
        make_monitor(energy=90)
    with pytest.raises(ValueError, match="`reference` expected to name `base` and `aligned` but names 'base'"):
        make_monitor(reference={"base": "x"})
    with pytest.raises(TypeError, match=r"`reference` expected to be a SafetyObjective, .* but got int"):
        make_monitor(reference=3)
    with pytest.raises(TypeError, match="`utility` expected to be a SafetyObjective but got str"):
        make_monitor(utility="harmless")
    with pytest.raises(ValueError, match="`include` expected to match names"):
        fit(tiny_tokenizer, tmp_path, [make_monitor(include="nothing")], max_steps=1)


def test_validate_and_test_are_left_alone(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [make_monitor()], limit_val_batches=1)
    loader = torch.utils.data.DataLoader(torch.ones(1, 4, dtype=torch.int64))  # type: ignore[arg-type]
    trainer.validate(UserModule(tiny_tokenizer), loader, verbose=False)
    trainer.test(UserModule(tiny_tokenizer), loader, verbose=False)
    assert not list(tmp_path.rglob("safety.jsonl"))


def test_adapters_are_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = UserModule(tiny_tokenizer)
    module.network = get_peft_model(module.network, LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[assignment]
    trainer = make_trainer(tmp_path, [make_monitor()], max_steps=1)
    with pytest.raises(ValueError, match=r"`include` expected to select weights without adapters but .*q_proj"):
        trainer.fit(module, make_loader())
    watched = make_trainer(tmp_path, [make_monitor(include="*.mlp.*")], max_steps=1)
    watched.fit(module, make_loader())


def test_long_checks_are_announced(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subspace, "_CPU_OPERATIONS", 1e3)
    with pytest.warns(UserWarning, match=r"will decompose 15 matrices of up to 32 rows or columns, about \d+ s"):
        fit(tiny_tokenizer, tmp_path, [make_monitor()], max_steps=1)
    assert "compares 15 matrices with the subspaces of RefusalMargin (2 given examples) and of everyday" in caplog.text


@pytest.mark.parametrize(
    "reference",
    [
        {"class_path": "lightning_safety.RefusalMargin", "init_args": {"limit": 3}},
        {"base": "a", "aligned": "b"},
        "runs/safety_subspaces.safetensors",
        None,
    ],
)
def test_arguments_are_expressible_in_yaml(reference: Any) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.Callback, "callback")
    given = {"reference": reference, "energy": 0.3, "include": ["*.mlp.*"], "figures": False, "every_n_steps": 7}
    config = {"callback": {"class_path": "lightning_safety.SubspaceOverlapMonitor", "init_args": given}}
    made = parser.instantiate_classes(parser.parse_object(config)).callback
    assert (made.energy, made.include, made.every_n_steps) == (0.3, ["*.mlp.*"], 7)
    if isinstance(reference, dict) and "class_path" in reference:
        assert isinstance(made.reference, RefusalMargin)
        assert made.reference.limit == 3
    else:
        assert made.reference == reference
