"""A run starts parts of its network from another run, a checkpoint or a release, and says what it took."""

import shutil
from functools import partial

import pytest
import torch

from lcl_ds.convert import main as convert
from lcl_ds.errors import UserError
from lcl_ds.evaluate import first_network
from lcl_ds.models.build import build_empty_model
from lcl_ds.models.initial import fill_weights
from lcl_ds.models.settings import part_of
from lcl_ds.models.weights.transfer import given_weights
from lcl_ds.training.checkpoint import all_checkpoints, load_model
from lcl_ds.training.warm_start import agree_on_start, find_start, open_start
from tests.support.small import ROW_TOKENS, VOCABULARY, small_config


def started(*overrides):
    config = small_config(*overrides)
    model = build_empty_model(config.model, VOCABULARY.size, ROW_TOKENS)
    opened = partial(open_start, config.model, find_start(config.model))
    given, said = given_weights(model, config.model, VOCABULARY.text_size, 0, opened)
    fill_weights(model, 0, given)
    return model, said


@pytest.fixture
def run(saved_run):
    return saved_run[0]


@pytest.mark.parametrize("parts", [["pooling", "decoder"], ["heads"], ["vision", "pooling", "decoder", "heads"]])
def test_chosen_parts_come_from_the_newest_checkpoint_or_the_named_one_and_the_others_stay(run, parts):
    chosen = f"model.init_parts=[{', '.join(parts)}]"
    untouched, _ = started()
    older, newest = all_checkpoints(run)
    for path, checkpoint in ((run, newest), (newest, newest), (older, older)):
        model, sentences = started(f"model.init_from={path}", chosen)
        theirs = load_model(checkpoint)
        for name, weight in model.named_parameters():
            assert torch.equal(weight, (theirs if part_of(name) in parts else untouched).get_parameter(name)), name
        count = sum(part_of(name) in parts for name, _ in model.named_parameters())
        assert sentences == [f"model.init_from: {checkpoint}: {count} weights"]


def test_the_untrained_network_of_a_run_is_the_one_that_it_started_from(run):
    config = small_config(f"model.init_from={run}", "model.init_parts=[vision]")
    first, theirs = first_network(config, VOCABULARY.size), load_model(all_checkpoints(run)[-1])
    untouched, _ = started()
    for name, weight in first.named_parameters():
        source = theirs if part_of(name) == "vision" else untouched
        assert torch.equal(weight, source.get_parameter(name)), name


def test_a_release_of_the_run_gives_the_same_weights(run, tmp_path):
    assert convert([str(run), str(tmp_path / "out"), "--part", "full"]) == 0
    ours, theirs = (started(f"model.init_from={path}")[0].state_dict() for path in (run, tmp_path / "out"))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.vision.num_attention_heads=4"], "model.vision.num_attention_heads: here 4"),
        (["model.vision.image_size=32"], "positions of 2 x 2 patches, image_size and patch_size here make 4 x 4"),
        (["model.init_ema=true"], "has no moving average of the encoder; leave out model.init_ema"),
    ],
)
def test_what_does_not_fit_is_refused_and_names_the_checkpoint(run, overrides, sentence):
    with pytest.raises(UserError) as error:
        started(f"model.init_from={run}", *overrides)
    (problem,) = error.value.problems
    assert problem.startswith("model.init_from: ")
    assert sentence in problem
    assert str(all_checkpoints(run)[-1]) in problem


def test_a_release_has_no_moving_average(run, tmp_path):
    convert([str(run), str(tmp_path / "out"), "--part", "full"])
    with pytest.raises(UserError, match="is no run or checkpoint of one; leave out model.init_ema"):
        started(f"model.init_from={tmp_path / 'out'}", "model.init_ema=true")


@pytest.mark.parametrize("overrides", [[], ["model.init_from=runs/a", "model.init_parts=[decoder]"]])
def test_an_average_of_nothing_is_refused(overrides):
    with pytest.raises(UserError, match="init_ema: nothing starts from a moving average"):
        small_config("model.init_ema=true", *overrides)


def test_a_run_without_a_checkpoint_is_named(tmp_path, only_rank):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"model.init_from: {tmp_path}: neither a complete checkpoint nor a run folder"):
        agree_on_start(small_config(f"model.init_from={tmp_path}").model, only_rank)


def test_a_damaged_file_of_weights_is_found_before_it_is_read(run, tmp_path, only_rank):
    checkpoint = shutil.copytree(all_checkpoints(run)[-1], tmp_path / "step_00000004")
    settings = small_config(f"model.init_from={checkpoint}").model
    assert agree_on_start(settings, only_rank) == checkpoint
    (file,) = (checkpoint / "weights").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is not what was written: its hash differs from the manifest's"):
        agree_on_start(settings, only_rank)
