# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_safety.cli import FUNCTIONS, TRAINING
from lightning_safety.recipes import recipe_command, recipe_names, recipe_path, recipe_summary
from lightning_safety.training.command_line import CLASSES, StudyCommand, parse_study


class ParsedOnly(StudyCommand):
    """Stops before it makes what the configuration names."""

    def instantiate_classes(self) -> None:
        """Make nothing."""


def parse(words):
    """Return the configuration, checked by the signatures of the classes that it names."""
    return ParsedOnly(**CLASSES, save_config_callback=None, run=False, args=words).config


STUDIES = [name for name in recipe_names() if name.startswith("studies/")]
# What a study cannot know: the models.
MODELS = {
    "studies/activations": ["--models={before: somewhere}"],
    "studies/enhance": [],
    "studies/pattern": ["--models={before: somewhere}"],
    "studies/perturb": ["--source=somewhere"],
    "studies/preserve": ["--source=somewhere"],
    "studies/subspaces": ["--aligned=somewhere"],
}
FITS = [name for name in recipe_names() if name not in STUDIES]


def test_the_recipes_are_these():
    assert recipe_names() == [
        "instruction_tuning_baseline",
        "instruction_tuning_lora_spa",
        "instruction_tuning_qlora_spa",
        "instruction_tuning_safe",
        "instruction_tuning_spa",
        "instruction_tuning_watched",
        "moe_spa",
        "quickstart",
        "set_full",
        "set_lora",
        "set_own_replies",
        "studies/activations",
        "studies/enhance",
        "studies/pattern",
        "studies/perturb",
        "studies/preserve",
        "studies/subspaces",
        "train_guard",
    ]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_opens_with_its_command_and_its_purpose(name):
    words = recipe_command(name)
    assert words[0] in (*TRAINING, *FUNCTIONS)
    assert words[words.index("--config") + 1] == str(recipe_path(name))
    assert len(recipe_summary(name)) > 20


@pytest.mark.parametrize("name", FITS)
def test_every_key_and_value_of_a_recipe_is_accepted(name):
    _, *words = recipe_command(name)
    configuration = parse(words)
    assert configuration.model.class_path.endswith("CausalLanguageModule")
    assert configuration.trainer.callbacks


@pytest.mark.parametrize("name", FITS)
def test_a_misspelt_key_is_refused(name, capsys):
    _, *words = recipe_command(name)
    with pytest.raises(SystemExit):
        parse([*words, "--data.init_args.batch_sise=3"])
    assert "batch_sise" in capsys.readouterr().err


@pytest.mark.parametrize("name", STUDIES)
def test_every_key_and_value_of_a_study_is_accepted(name):
    command, study, *words = recipe_command(name)
    assert command == "study"
    configuration = parse_study(study, [*words, *MODELS[name]])
    assert configuration["output"] == Path("results") / study
    arms = configuration.get("arms", {}).values()
    assert all(arm.callbacks == [] or arm.callbacks[0].setup for arm in arms)
    if "data" in configuration:
        assert {arm.data for arm in arms} == set(configuration["data"])


@pytest.mark.parametrize(
    ("data", "name"),
    [("unlikely", "quickstart"), ("unlikely", "set_full"), ("unlikely", "set_lora"), ("retained", "set_own_replies")],
)
def test_the_study_of_enhancement_trains_on_what_recipes_do(data, name):
    mixture = yaml.safe_load(recipe_path("studies/enhance").read_text(encoding="utf-8"))["data"][data]
    recipe = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
    assert mixture == recipe["data"]["init_args"]["train"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_misspelt_key_of_a_study_is_refused(name, capsys):
    _, study, *words = recipe_command(name)
    with pytest.raises(SystemExit):
        parse_study(study, [*words, *MODELS[name], "--outptu=somewhere"])
    error = capsys.readouterr().err
    assert "outptu" in error
    assert "Did you mean `--output`" in error


@pytest.mark.parametrize("name", ["studies/preserve", "studies/enhance"])
def test_a_misspelt_key_of_an_arm_is_refused(name, capsys):
    _, study, *words = recipe_command(name)
    with pytest.raises(SystemExit):
        parse_study(study, [*words, *MODELS[name], "--arms.new.calbacks=[]"])
    assert "calbacks" in capsys.readouterr().err


@pytest.mark.parametrize("name", STUDIES)
def test_options_of_a_study_take_several_words(name):
    _, study, *words = recipe_command(name)
    assert parse_study(study, [*words, *MODELS[name], "--only", "one", "another"])["only"] == ["one", "another"]


@pytest.mark.parametrize("name", STUDIES)
def test_full_gives_a_study_all_the_time_it_takes(name):
    _, study, *words = recipe_command(name)
    assert parse_study(study, [*words, *MODELS[name]])["hours"] == 6
    assert parse_study(study, [*words, *MODELS[name], "--full"])["hours"] is None
