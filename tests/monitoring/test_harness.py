# SPDX-License-Identifier: Apache-2.0
"""The evaluation harness on a task of our own: a tiny model, local files, no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lightning_safety.cli import main
from lightning_safety.monitoring.harness import TaskScore, evaluate_tasks, task_table
from tests.tiny import make_tiny_model

TASK = """
task: capitals_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: [" Rome", " Paris"]
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


GROUP = """
group: places_here
task: [capitals_here]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("harness")
    rows = [{"country": "Italy", "label": 0}, {"country": "France", "label": 1}, {"country": "Lazio", "label": 0}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    text = TASK.format(rows=tmp_path / "rows.jsonl", cache=tmp_path / "cache")
    (tmp_path / "tasks" / "capitals.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "tasks" / "places.yaml").write_text(GROUP, encoding="utf-8")
    return tmp_path / "tasks"


@pytest.mark.filterwarnings("ignore")
def test_a_task_is_scored_and_the_model_left_as_it_was(folder: Path, tiny_tokenizer) -> None:
    model = make_tiny_model().train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    (score,) = evaluate_tasks(model, tiny_tokenizer, ["capitals_here"], folder=folder)
    assert (score.task, score.metric, score.examples) == ("capitals_here", "acc,none", 3)
    assert score.standard_error is not None
    assert score.value in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    # A group has the examples of its tasks.
    (all_of_them,) = evaluate_tasks(model, tiny_tokenizer, ["places_here"], folder=folder)
    assert (all_of_them.task, all_of_them.examples, all_of_them.value) == ("places_here", 3, score.value)
    (fewer,) = evaluate_tasks(model, tiny_tokenizer, ["capitals_here"], folder=folder, limit=1)
    assert fewer.examples == 1


@pytest.mark.filterwarnings("ignore")
def test_the_right_answer_is_told_from_the_wrong_one(folder: Path, tiny_tokenizer) -> None:
    """Control: where one answer is made likelier in every row, the score is the share of rows where it is right."""
    model = make_tiny_model(tie_word_embeddings=False)
    found = []
    for wanted in (" Rome", " Paris"):
        ids = tiny_tokenizer(wanted, add_special_tokens=False).input_ids
        other = tiny_tokenizer(" Paris" if wanted == " Rome" else " Rome", add_special_tokens=False).input_ids

        def prefer(module, inputs, output, ids=ids, other=other):
            output = output.clone()
            output[..., [i for i in ids if i not in other]] += 100.0
            return output

        handle = model.lm_head.register_forward_hook(prefer)
        found.append(evaluate_tasks(model, tiny_tokenizer, ["capitals_here"], folder=folder)[0].value)
        handle.remove()
    assert found == [pytest.approx(2 / 3), pytest.approx(1 / 3)]


@pytest.mark.filterwarnings("ignore")
def test_unknown_tasks_suggest_the_closest(folder: Path, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match=r"`tasks` expected .* got 'capitals_her'\. Did you mean `capitals_here`"):
        evaluate_tasks(make_tiny_model(), tiny_tokenizer, ["capitals_her"], folder=folder)


def test_without_the_harness_the_error_says_what_to_install(monkeypatch, tiny_tokenizer) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-safety\[tasks\]'"):
        evaluate_tasks(make_tiny_model(), tiny_tokenizer, ["gsm8k"])


def test_tables_have_a_column_for_each_model() -> None:
    scores = [TaskScore("a", "acc,none", 0.5, 0.1, 10)], [TaskScore("a", "acc,none", 0.25, None, 10)]
    assert task_table({"before": scores[0], "after": scores[1]}) == [
        ["task", "metric", "n", "before", "after"],
        ["a", "acc,none", "10", "0.500 ± 0.100", "0.250"],
    ]


@pytest.mark.filterwarnings("ignore")
def test_the_command_shows_tasks_below_the_rates(folder: Path, tmp_path: Path, tiny_tokenizer, capsys) -> None:
    make_tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    words = ["--limit=2", "--max_new_tokens=2", "--tasks", "capitals_here", f"--tasks_folder={folder}"]
    main(["evaluate", str(tmp_path / "model"), *words, "-o", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert printed.index("attack success") < printed.index("capitals_here")
    (score,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["before"]["tasks"]
    assert (score["task"], score["metric"], score["examples"]) == ("capitals_here", "acc,none", 2)
