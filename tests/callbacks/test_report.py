# SPDX-License-Identifier: Apache-2.0
"""SafetyReport: the page and run.json at the end of fits that finish, stop, fail or are interrupted."""

from __future__ import annotations

import builtins
import json
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning.callbacks import EarlyStopping

from lightning_safety import SafetyPreservingAdaptation, SafetyReport
from lightning_safety.report import read_run
from lightning_safety.report.figures import Picture
from tests.callbacks.fits import ScriptedJudge, UserModule, fit, make_loader, make_monitor, make_trainer
from tests.callbacks.toys import mask_of_everything
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(litlogger|not have many workers|log_every|not empty|mid-epoch)")
PAGE = "safety_report.html"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is tested in tests/report."""
    monkeypatch.setattr("lightning_safety.report.page.draw_pictures", lambda subject: Picture("data:,", "data:,", 4, 3))


class _Fail(pl.Callback):
    """Ends a fit at a step by an error."""

    def __init__(self, error: BaseException, step: int = 3) -> None:
        self.error = error
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise self.error


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("reverse", [False, True])
def test_a_page_and_what_the_run_was_made_with(tiny_tokenizer: Any, tmp_path: Path, reverse: bool) -> None:
    mask = mask_of_everything(make_tiny_model(tie_word_embeddings=False))
    some = type(mask)({name: index[:3] for name, index in mask.indices.items()}, mask.shapes, {"method": "by hand"})
    holding = SafetyPreservingAdaptation(mask=some, fraction=0.02)
    # EarlyStopping ends the fit between two checks: the last one is made in on_train_end.
    stopper = EarlyStopping("safety/attack_success_rate", stopping_threshold=0.5, mode="min", patience=9)
    callbacks = [
        SafetyReport(title="My run"),
        holding,
        stopper,
        make_monitor(every_n_steps=4, judges=ScriptedJudge([1])),
    ]
    fit(tiny_tokenizer, tmp_path, callbacks[:: -1 if reverse else 1], max_epochs=9, limit_val_batches=1)
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "<h1>My run</h1>" in text
    assert "The fit finished at step 6." in text
    assert "last check, step 6" in text
    assert "Where the selected weights are" in text
    assert stat.S_IMODE((tmp_path / PAGE).stat().st_mode) == 0o600
    found = settings(tmp_path)
    assert found["trainer"]["max_epochs"] == 9
    assert found["trainer"]["precision"] == "32-true"
    assert found["module"]["class"] == "UserModule"
    assert found["module"]["weights"] == sum(
        one.numel() for one in make_tiny_model(tie_word_embeddings=False).parameters()
    )
    assert found["versions"].keys() >= {"python", "torch", "pytorch-lightning", "transformers", "lightning-safety"}
    arguments = {one["class"]: one["arguments"] for one in found["callbacks"]}
    assert arguments["SafetyPreservingAdaptation"]["fraction"] == 0.02
    assert arguments["HarmfulnessMonitor"]["judges"] == ["scripted"]
    assert "EarlyStopping" not in arguments
    assert "log" not in arguments["HarmfulnessMonitor"]
    assert str(Path.home()) + "/" not in (tmp_path / "run.json").read_text()
    assert read_run(tmp_path).masks == {"SafetyPreservingAdaptation": some.describe()}
    assert {entry.name for entry in tmp_path.iterdir() if "safety" not in entry.name} <= {"run.json", "checkpoints"}


def test_a_mask_file_in_the_run_folder_is_not_written_down_twice(tiny_tokenizer: Any, tmp_path: Path) -> None:
    mask = mask_of_everything(make_tiny_model(tie_word_embeddings=False))
    half = type(mask)({name: index[::2] for name, index in mask.indices.items()}, mask.shapes)
    holding = SafetyPreservingAdaptation(mask=half, save_mask=tmp_path / "mask.safetensors")
    fit(tiny_tokenizer, tmp_path, [SafetyReport(), holding], max_steps=1)
    assert "masks" not in settings(tmp_path)
    assert "mask.safetensors" in (tmp_path / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("error", "raised"), [(ZeroDivisionError(), ZeroDivisionError), (KeyboardInterrupt(), SystemExit)]
)
def test_what_there_is_when_a_fit_is_ended(
    tiny_tokenizer: Any, tmp_path: Path, error: BaseException, raised: Any
) -> None:
    with pytest.raises(raised):
        fit(tiny_tokenizer, tmp_path, [_Fail(error), SafetyReport(), make_monitor(every_n_steps=2)], max_steps=6)
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert f"{type(error).__name__} at step 3; this is what there was until then." in text
    assert "last check, step 2" in text
    assert settings(tmp_path)["outcome"] == {"step": 3, "exception": type(error).__name__}


def test_a_fit_that_fails_before_it_begins_leaves_no_page(tiny_tokenizer: Any, tmp_path: Path) -> None:
    class FailAtStart(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            raise ZeroDivisionError

    fit(tiny_tokenizer, tmp_path, [make_monitor(every_n_steps=None)], max_steps=1)
    with pytest.raises(ZeroDivisionError):
        fit(tiny_tokenizer, tmp_path, [SafetyReport(), FailAtStart()], max_steps=1)
    assert not (tmp_path / PAGE).exists()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_page_that_cannot_be_written_is_a_warning(
    tiny_tokenizer: Any, tmp_path: Path, fails: bool, strict: bool, monkeypatch: Any, caplog: Any, recwarn: Any
) -> None:
    def write(*arguments: Any, **options: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("lightning_safety.callbacks.report.write_report", write)
    if strict:
        # A user who turns warnings into errors keeps the error that ended the fit.
        warnings.filterwarnings("error", message="SafetyReport could not write")
    callbacks = [SafetyReport(), make_monitor(every_n_steps=None)]
    if fails:
        with pytest.raises(ZeroDivisionError):
            fit(tiny_tokenizer, tmp_path, [*callbacks, _Fail(ZeroDivisionError())], max_steps=6)
    else:
        trainer, _ = fit(tiny_tokenizer, tmp_path, callbacks, max_steps=4)
        assert trainer.global_step == 4
    said = caplog.messages if strict else [str(warning.message) for warning in recwarn]
    assert sum("SafetyReport could not write its report: the disk is full" in one for one in said) == 1


def test_a_run_without_monitors_says_what_to_add(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Add HarmfulnessMonitor"):
        fit(tiny_tokenizer, tmp_path, [SafetyReport()], max_steps=1)
    assert not (tmp_path / PAGE).exists()


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_stops_the_run_before_it_begins(
    library: str, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    judge = ScriptedJudge()
    with pytest.raises(ModuleNotFoundError, match=rf"{library} is not .*pip install 'lightning-safety\[report\]'"):
        fit(tiny_tokenizer, tmp_path, [make_monitor(judges=judge), SafetyReport()], max_steps=1)
    assert judge.checks == 0


def test_fast_dev_run_writes_nothing(tiny_tokenizer: Any, tmp_path: Path) -> None:
    fit(tiny_tokenizer, tmp_path, [SafetyReport(), make_monitor()], fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test(tiny_tokenizer: Any, tmp_path: Path, stage: str) -> None:
    trainer = make_trainer(
        tmp_path, [SafetyReport("page.html"), make_monitor()], limit_val_batches=1, limit_test_batches=1
    )
    getattr(trainer, stage)(UserModule(tiny_tokenizer), make_loader(1), verbose=False)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f">{stage}</th>" in text
    assert "<blockquote" in text


def test_a_second_fit_is_another_run(tiny_tokenizer: Any, tmp_path: Path) -> None:
    callbacks = [SafetyReport(), make_monitor(every_n_steps=None)]
    fit(tiny_tokenizer, tmp_path, callbacks, max_steps=2)
    fit(tiny_tokenizer, tmp_path, callbacks, max_steps=4)
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "The fit finished at step 4 of 4." in text
    assert "holds the checks of 2 fits" in text


@pytest.mark.parametrize(
    ("filename", "error"), [("", ValueError), (" ", ValueError), (3, TypeError), (None, TypeError)]
)
def test_wrong_arguments(filename: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`filename` expected to be"):
        SafetyReport(filename)


def test_arguments_in_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[pl.Callback])
    arguments = {"filename": "page.html", "title": "Mine"}
    text = yaml.safe_dump({"callbacks": [{"class_path": "lightning_safety.SafetyReport", "init_args": arguments}]})
    (callback,) = parser.instantiate_classes(parser.parse_string(text)).callbacks
    assert (callback.filename, callback.title) == ("page.html", "Mine")
