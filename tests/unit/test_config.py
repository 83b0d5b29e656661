"""Settings: validated at once, every problem named with file and key."""

import re

import pytest
import yaml

from lcl_ds.config import DS_CONFIGS, RECIPES, Config, load_config, recipe_path
from lcl_ds.errors import UserError
from lcl_ds.objectives import NAMES

DEMO = RECIPES / "demo.yaml"


def problems(tmp_path, change, overrides=()):
    tree = yaml.safe_load(DEMO.read_text())
    change(tree)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as error:
        load_config(path, list(overrides))
    return path, error.value.problems


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_trains_any_objective_by_one_setting(path, name):
    assert load_config(path, [f"objective.name={name}"]).objective.name == name


def test_what_a_recipe_says_of_its_objective_is_left_out_for_another_and_named(tmp_path, caplog):
    caplog.set_level("INFO")
    tree = yaml.safe_load(DEMO.read_text())
    path = tmp_path / "mine.yaml"
    tree["objective"] = {"contrastive_weight": 0.5, "normalization": "reference"}
    path.write_text(yaml.safe_dump(tree))
    assert load_config(path, ["objective.name=lcl"]).objective.contrastive_weight == 0.5
    assert not caplog.text
    objective = load_config(path, ["objective.name=coca", "objective.generation_weight=3"]).objective
    assert (objective.contrastive_weight, objective.generation_weight, objective.normalization) == (1, 3, "global")
    said = f"{path}: objective.contrastive_weight, objective.normalization: of lcl, and left out for coca"
    load_config(path, ["objective.name=coca"])
    assert caplog.text.count(said) == 1
    with pytest.raises(UserError, match=r"command line: objective\.contrastive_weight: unknown setting"):
        load_config(path, ["objective.name=clip", "objective.contrastive_weight=0.5"])


def test_settings_survive_a_round_trip_through_yaml():
    config = load_config(DEMO)
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_all_problems_are_reported_together_with_file_key_and_hint(tmp_path):
    def spoil(tree):
        tree["train"]["stepz"] = tree["train"].pop("steps")
        tree["model"]["vision"]["hiden_size"] = 1
        tree["checkpoint"]["every"] = -1

    path, actual = problems(tmp_path, spoil)
    assert sorted(actual) == sorted(
        [
            f"{path}: train.steps: missing",
            f"{path}: train.stepz: unknown setting (did you mean 'steps'?)",
            f"{path}: model.vision: 'hiden_size' (did you mean 'hidden_size'?): no such key in the clip_vision_model "
            "configuration",
            f"{path}: checkpoint.every: input should be greater than 0, got -1",
        ]
    )


def test_overrides_are_yaml_values_and_named_as_such_when_wrong(tmp_path):
    config = load_config(DEMO, ["train.steps=3", "data.crop_scale=[0.5, 1]", "evaluation.shards=null"])
    assert (config.train.steps, config.data.crop_scale, config.evaluation.shards) == (3, (0.5, 1.0), None)
    with pytest.raises(UserError, match="command line: train.step: unknown setting"):
        load_config(DEMO, ["train.step=3"])
    with pytest.raises(UserError, match="written key.sub=value"):
        load_config(DEMO, ["train.steps"])


def test_plain_paths_become_sources():
    assert load_config(DEMO, ["data.shards=a.tar"]).data.shards[0].paths == "a.tar"
    assert [s.paths for s in load_config(DEMO, ["data.shards=[a.tar, b.tar]"]).data.shards] == ["a.tar", "b.tar"]


def test_purposes_have_their_own_seeds_if_set():
    config = load_config(DEMO, ["train.seed=5", "train.data_seed=6"])
    assert [config.seed(p) for p in ("init", "data", "augmentation")] == [5, 6, 5]


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(UserError, match="recipe nothing: there is no such file; shipped recipes: .*demo"):
        recipe_path("nothing")


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(UserError, match="x.yaml: cannot be read as YAML"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_ds_config_is_valid(path):
    from lcl_ds.training.engine import load_ds_config

    expected = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3, "zero3_large": 3, "zero3_hosts": 3}[path.stem]
    assert load_ds_config(path)["zero_optimization"]["stage"] == expected


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluation.every=null"], "checkpoints must be evaluated"),
        (["evaluation.every=30"], "a number that divides checkpoint.every 100"),
        (["evaluation.shards=null"], "checkpoints must be evaluated"),
        (["checkpoint.keep_best=linear/color"], "'linear/color' is not measured; there are contrastive_loss, gener"),
        (["checkpoint.keep_best=knn/colour"], "'knn/colour' is not measured"),
        (["objective.name=generation", "checkpoint.keep_best=retrieval/recall_at_1"], "is not measured"),
        (["evaluation.tasks=[linear, linear]"], "a task is named twice"),
    ],
)
def test_the_best_checkpoint_is_chosen_by_what_is_measured_where_checkpoints_are_made(overrides, sentence):
    good = ["evaluation.every=50", "checkpoint.keep_best=linear/colour"]
    assert load_config(DEMO, good).checkpoint.keep_best == "linear/colour"
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_config(DEMO, [*good, *overrides])
