"""Recipes: typed, strict, one file a run; every wrong key is explained."""

import tomllib
from pathlib import Path

import pytest

from hpc.build import registry
from hpc.config import RecipeError, apply_override, differences, load, options, resolve

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "jobs/recipes").glob("*.toml"))
REGISTRY = registry()


def minimal(**more):
    return {"run": "r", "data": {"train": "t"}, "task": {"name": "frames"}, "optim": {"learning_rate": 0.1}} | more


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipes_that_come_with_trireme_are_valid_and_survive_being_written_out(path):
    recipe = load(path, [], REGISTRY)
    again = resolve(tomllib.loads(recipe.to_toml()), REGISTRY)
    assert again.to_dict() == recipe.to_dict()
    assert not differences(again.to_dict(), recipe.to_dict(), ignore=())


def test_there_are_recipes():
    assert len(RECIPES) >= 2


def test_overrides_are_toml_values_or_bare_words():
    raw = minimal()
    for override in ("optim.learning_rate=0.05", "task.activation=relu", "data.verify=false", "splits = 8"):
        apply_override(raw, override)
    recipe = resolve(raw, REGISTRY)
    assert (recipe.optim.learning_rate, recipe.task.activation, recipe.data.verify, recipe.splits) == (
        0.05, "relu", False, 8,
    )
    apply_override(raw, "task.chunk=20")
    assert resolve(raw, REGISTRY).task.chunk == "20", "a number where text is expected"
    apply_override(raw, 'optim={name="adam", learning_rate=0.001}')
    assert options(resolve(raw, REGISTRY).optim)["beta2"] == 0.999


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.learning_rat=0.1"], ["optim.learning_rat", "learning_rate, momentum", "did you mean 'learning_rate'"]),
        (["batch=3"], ["unknown recipe key 'batch'", "valid here", "splits"]),
        (["data.bach=3"], ["data.bach", "did you mean 'batch'"]),
        (["optim.learning_rate=fast"], ["optim.learning_rate", "'fast'", "number"]),
        (["optim.learning_rate=-1"], ["optim.learning_rate", "-1", "greater than 0"]),
        (["splits=0"], ["splits", "0", "greater than or equal to 1"]),
        (["splits=2.5"], ["splits", "2.5", "integer"]),
        (["data.verify=1"], ["data.verify", "1", "boolean"]),
        (["precision=float16"], ["precision", "float16", "'float32'", "'bfloat16'"]),
        (["task.name=frame"], ["task.name", "'frame'", "did you mean 'frames'"]),
        (["strategy.name=bmuff"], ["strategy.name", "not registered", "allreduce"]),
        (["task.width=0", "task.layers=x"], ["task.width", "task.layers"]),
        (["schedule={name='steps', at=[1.0]}"], ["schedule.rates", "missing"]),
        (["task=3"], ["'task' = 3", "expected a table"]),
        (["optim"], ["not of the form key=value"]),
        (["run.x=1"], ["'run' is a value"]),
    ],
)
def test_a_wrong_key_type_or_range_is_explained(overrides, words, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('run = "r"\n[data]\ntrain = "t"\n[task]\nname = "frames"\n[optim]\nlearning_rate = 0.1\n')
    load(path, [], REGISTRY)
    with pytest.raises(RecipeError) as caught:
        load(path, overrides, REGISTRY)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_missing_files_and_broken_toml_are_explained(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        load(tmp_path / "none.toml", [], REGISTRY)
    (tmp_path / "bad.toml").write_text("run = ")
    with pytest.raises(RecipeError, match="is not TOML"):
        load(tmp_path / "bad.toml", [], REGISTRY)


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        resolve(minimal(), REGISTRY).seed = 2


def test_differences_leave_out_where_and_how_a_run_is_kept():
    one = resolve(minimal(), REGISTRY).to_dict()
    other = resolve(minimal(run="elsewhere", log={"every": 3}, seed=9), REGISTRY).to_dict()
    assert differences(one, other) == ["seed: 1 -> 9"]
