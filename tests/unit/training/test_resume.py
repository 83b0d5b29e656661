"""Settings that change between two starts of a run: each is applied or refused, and the same said otherwise is none."""

import hashlib
import json

import pytest
import yaml

from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.objectives import NAMES
from lcl_ds.training.checkpoint import CONFIG, MANIFEST, STATE, resolve_checkpoint
from lcl_ds.training.input_folders import folder_contents
from lcl_ds.training.resume import DECISIONS, check_same_run, decision_of, engine_changes, resolved_settings
from tests.support.small import DECODERS, small_config


def saved(folder, config):
    """A checkpoint of a run with these settings, as far as they are compared."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json")))
    state = {
        "progress": {"step": 5, "applied_steps": 5, "skipped_in_a_row": 0},
        "loader": {"next_row": 0, "lanes": {}, "lane_count": 4, "fingerprint": {}},
        "optimizer_steps": 5,
        "vocab_size": 65,
        "folders": folder_contents(config),
    }
    (folder / STATE).write_text(json.dumps(state))
    return folder


@pytest.fixture
def continued(tmp_path):
    """Settings of the first and of the second start -> sentences for the log."""

    def continued(first, second, decoder="llama"):
        return check_same_run(
            saved(tmp_path / "step_00000005", small_config(*first, decoder=decoder)),
            small_config(*second, decoder=decoder),
        )

    return continued


@pytest.mark.parametrize("objective", NAMES)
@pytest.mark.parametrize("family", DECODERS)
def test_every_setting_has_a_decision(objective, family):
    for key in resolved_settings(small_config(f"objective.name={objective}", decoder=family)):
        decision_of(key)


def test_a_setting_of_training_that_nobody_decided_on_is_an_error():
    train = Config.model_fields["train"].annotation.model_fields
    assert all(f"train.{name}" in DECISIONS for name in train)
    with pytest.raises(KeyError):
        decision_of("train.new_setting")
    with pytest.raises(KeyError):
        decision_of("new_group.setting")


@pytest.mark.parametrize(
    "change",
    [
        "train.weight_decay=3",
        "train.betas=[0.8, 0.9]",
        "train.eps=1e-3",
        "train.learning_rate=1",
        "train.gradient_clipping=7",
        "train.steps=77",
        "model.logit_scale_max=50",
        "model.decoder.activation_checkpointing=true",
        "train.learning_rate_factors={vision: 0.1, heads: 2}",
        "precision=bf16",
    ],
)
def test_what_is_applied_is_logged(continued, change):
    (sentence,) = continued([], [change])
    assert f"applied from now on: {change.split('=')[0]}" in sentence


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("train.seed=1", "train.seed (for init_seed)"),
        ("train.data_seed=1", "train.data_seed"),
        ("data.row_tokens=64", "data.row_tokens"),
        ("data.document_tokens=24", "data.document_tokens"),
        ("objective.contrastive_weight=0.5", "objective.contrastive_weight"),
        ("objective.name=generation", "objective.name"),
        ("model.decoder.num_hidden_layers=1", "model.decoder.num_hidden_layers"),
        ("model.vision.image_mean=[0, 0, 0]", "model.vision.image_mean"),
        ("model.logit_scale_init=3", "model.logit_scale_init"),
        ("train.learning_rate_factors={vision: 0}", "train.learning_rate_factors"),
        ("data.shards=[{name: data, paths: a.tar, weight: {0: 1, 5: 2}}, {name: b, paths: b.tar}]", "data.shards"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(continued, change, key):
    with pytest.raises(UserError) as error:
        continued([], [change])
    assert any(problem.startswith(f"{key}: ") for problem in error.value.problems), error.value.problems


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["train.seed=3"], ["train.seed=3", "train.init_seed=3", "train.data_seed=3"]),
        (["train.init_seed=0"], []),
        ([], ["train.learning_rate_factors={vision: 1, heads: 1.0}"]),
        ([], ["model.vision.hidden_act=quick_gelu"]),
        ([], ["model.decoder.rms_norm_eps=1.0e-6"]),
        ([], ["data.document_tokens=48"]),
        (["data.shards=[{name: data, paths: a.tar, weight: 1}]"], ["data.shards=[{name: data, paths: a.tar}]"]),
        (["data.shards=a.tar"], ["data.shards=[{name: data, paths: a.tar, weight: {0: 1}}]"]),
        ([], ["data.workers=2", "log.every=5", "data.cache=/elsewhere"]),
    ],
    ids=lambda overrides: " ".join(overrides) or "as before",
)
def test_the_same_said_otherwise_is_no_change(continued, first, second):
    assert continued(first, second) == []
    assert continued(second, first) == []


def test_a_seed_of_all_that_no_purpose_uses_is_applied_to_dropout(continued):
    own = ["train.init_seed=0", "train.data_seed=0", "train.augmentation_seed=0"]
    (sentence,) = continued([], ["train.seed=9", *own])
    assert "train.seed 0 -> 9" in sentence


def test_shards_under_another_path_are_left_to_their_fingerprints(continued):
    (sentence,) = continued(["data.shards=/a/*.tar"], ["data.shards=/scratch/7/*.tar"])
    assert sentence.startswith("data.shards: data is read from /scratch/7/*.tar, before from /a/*.tar")


def test_another_order_or_weight_of_sources_is_refused(continued):
    two = "data.shards=[{name: a, paths: a.tar}, {name: b, paths: b.tar}]"
    for other in (
        "data.shards=[{name: b, paths: b.tar}, {name: a, paths: a.tar}]",
        "data.shards=[{name: a, paths: a.tar, weight: 2}, {name: b, paths: b.tar}]",
        "data.shards=[{name: a, paths: a.tar}]",
        "data.shards=[{name: a, paths: a.tar}, {name: c, paths: b.tar}]",
    ):
        with pytest.raises(UserError, match=r"data\.shards: the run was started with"):
            continued([two], [other])


def test_a_tokenizer_under_another_path_is_the_same_when_it_holds_the_same(continued, tmp_path):
    for name, text in (("here", "{}"), ("moved", "{}"), ("other", '{"a": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
    here, moved, other = (f"data.tokenizer={tmp_path / name}" for name in ("here", "moved", "other"))
    assert continued([here], [here]) == []
    (sentence,) = continued([here], [moved])
    assert "holds the same" in sentence
    with pytest.raises(UserError, match=r"data\.tokenizer: the run was started with .*other"):
        continued([here], [other])


def test_a_tokenizer_that_is_set_out_in_another_way_is_the_same(continued, tmp_path):
    trees = {"here": {"model": {"a": 1, "é": 2}}, "saved_again": {"truncation": {"max_length": 9}, "padding": None}}
    for name, tree in trees.items():
        (tmp_path / name).mkdir()
        text = json.dumps(trees["here"] | tree, indent=2 if tree else None, ensure_ascii=name == "here")
        (tmp_path / name / "tokenizer.json").write_text(text)
    here, again = (f"data.tokenizer={tmp_path / name}" for name in trees)
    (sentence,) = continued([here], [again])
    assert "holds the same" in sentence


def test_a_tokenizer_that_became_another_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    config = small_config(f"data.tokenizer={tmp_path}")
    checkpoint = saved(tmp_path / "step_00000005", config)
    (tmp_path / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(UserError, match="is another tokenizer than when the run was started"):
        check_same_run(checkpoint, config)


def test_a_batch_of_another_size_goes_with_weights_that_do_not_count_steps(continued):
    by_step = "data.shards=[{name: a, paths: a.tar, weight: {0: 1, 5: 2}}, {name: b, paths: b.tar}]"
    continued([], ["train.global_batch_rows=256"])
    with pytest.raises(UserError, match="weights by step"):
        continued([by_step], [by_step, "train.global_batch_rows=256"])


def test_a_run_whose_checkpoints_are_of_another_version_says_so(tmp_path):
    folder = tmp_path / "checkpoints" / "step_00000005"
    folder.parent.mkdir()
    saved(folder, small_config())
    (folder / CONFIG).write_text("new_setting: 1\n" + (folder / CONFIG).read_text())
    files = {name: (folder / name).read_bytes() for name in (CONFIG, STATE)}
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (folder / MANIFEST).write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"none of its 1 checkpoints can be used; .*new_setting: unknown"):
        resolve_checkpoint(tmp_path)


def test_engine_settings_that_changed_are_named(tmp_path):
    before = {"zero_optimization": {"stage": 3}, "train_batch_size": 8}
    now = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "train_batch_size": 9}
    assert engine_changes(tmp_path, now) == []
    (tmp_path / "ds_config.json").write_text(json.dumps(before))
    (sentence,) = engine_changes(tmp_path, now)
    assert "zero_optimization.offload_optimizer.device None -> 'cpu'" in sentence
