"""The command, and what it says about a run that was finished on CPUs."""

import json
import os

import pytest
import yaml

from lcl_ds.config import RECIPES, load_config, recipe_path
from lcl_ds.models.build import image_size, native_resolution, tokens_per_image
from lcl_ds.plan.__main__ import main
from lcl_ds.plan.check import Compared, compare, ran_on_gpus
from lcl_ds.plan.contents import RowContents, contents_of_run, made_up_row, with_largest_squares
from lcl_ds.plan.scaling import scale
from tests.support.runs import metrics
from tests.support.small import VOCABULARY, small_config
from tests.unit.plan.test_planner import planner_of

SMALL = ["--gpus", "8", "--gpu", "a100", "--text_per_image", "20"]


def test_it_prints_memory_time_and_cost_and_draws_scaling(tmp_path, capsys):
    drawn = tmp_path / "new" / "scaling.svg"
    assert main([*SMALL, "--price", "2.5", "--scaling", str(drawn), "train.global_batch_rows=512"]) == 0
    out = capsys.readouterr().out
    for words in (
        "planned, nothing was measured",
        "masters and moments",
        "fits: ",
        "dollars",
        "the fastest of",
        "weak: ",
        "4,096",
        "no rank is slower than another",
    ):
        assert words in out
    assert drawn.read_text().startswith("<?xml")
    assert "planned, not measured" in drawn.read_text()


def test_images_that_keep_their_aspect_ratio_count_as_the_largest_squares():
    native = ["model.vision.resolution=native", "data.row_image_tokens=100", "model.vision.min_image_tokens=4"]
    config = small_config(*native, "model.vision.max_image_tokens=24", "data.row_tokens=256")
    squares = with_largest_squares(config)
    assert (image_size(squares.model), tokens_per_image(squares.model, training=True)) == (40, 25)
    assert native_resolution(squares.model) is None
    row = made_up_row(squares, VOCABULARY)
    assert (row.image_count, row.images.shape[0]) == (4, 4)
    plain = small_config()
    assert with_largest_squares(plain) is plain


def test_what_does_not_fit_says_by_how_much_and_what_would(tmp_path, capsys):
    card = tmp_path / "card.yaml"
    numbers = {"memory_gib": 3, "peak_tflops": 100, "memory_gb_per_s": 500, "link_gb_per_s": 10, "network_gb_per_s": 1}
    card.write_text(yaml.safe_dump(numbers))
    rows = ["train.global_batch_rows=2048", "data.row_tokens=2048", "data.row_images=64"]
    assert main(["--gpus", "8", "--gpu", str(card), *rows]) == 0
    out = capsys.readouterr().out
    assert "does not fit: " in out
    assert "GiB too much" in out
    assert "what would fit: stage" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "h300"], "--gpu h300: there is no such GPU or file; known: "),
        (["--gpus", "0"], "--gpus 0: must be 1 or more"),
        (["--gpus", "12", "--nodes", "8"], "--nodes 8: 12 GPUs do not divide by it"),
        (["--efficiency", "40"], "--efficiency 40.0: must be above 0 and at most 1"),
        (["--price", "-1"], "--price -1.0: must not be negative"),
        (["--gpus", "7"], "train.global_batch_rows: 16 is not a multiple of"),
        (["--like", "nowhere"], "metrics.jsonl: no such file"),
        (["--scaling", "plot.txt", *SMALL], "--scaling plot.txt: name a file that ends in .svg, .png, .pdf"),
        (["train.step=3"], "train.step: unknown setting"),
    ],
)
def test_mistakes_are_named(arguments, sentence, capsys):
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture
def run_dir(tmp_path):
    """Four steps of the demo recipe on a CPU, 16 rows of 256 tokens each."""
    rows = [metrics(step, images=96, text_tokens=1600, token_squares=320_000, tflop=0.02) for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_what_rows_held_is_read_from_a_finished_run(run_dir):
    config = load_config(recipe_path("demo"))
    held = contents_of_run(run_dir, config, pairs_per_image=0.5)
    assert (held.images, held.labels, held.squares, held.pairs) == (6.0, 100.0, 20_000.0, 3.0)
    assert held.tokens == 256


def test_a_run_on_cpus_is_compared_by_what_it_read_and_computed(run_dir, capsys):
    planner = planner_of(load_config(recipe_path("demo")), contents=RowContents(256, 6.0, 100, 3, 20_000, ""))
    compared = {each.name: each for each in compare(planner.plan(planner.given()), run_dir, ran_on_gpus(run_dir))}
    assert [*compared] == [
        *("operations of a step", "images of a step", "labels of a step", "token squares of a step"),
    ]
    assert compared["images of a step"].off == 0
    assert compared["operations of a step"].recorded == 0.02
    assert main(["--check", str(run_dir), "--gpus", "2", "--text_vocabulary", "60"]) == 0
    assert "planned / recorded" in capsys.readouterr().out


def test_a_run_on_gpus_is_compared_by_its_time_and_memory_too(run_dir):
    rows = [metrics(step, mfu=0.3, memory_gb=40.0, token_squares=1, tflop=1.0) for step in range(1, 31)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planner = planner_of(load_config(recipe_path("demo")))
    compared = {each.name: each for each in compare(planner.plan(planner.given()), run_dir, ran_on_gpus(run_dir))}
    assert compared["MFU"].recorded == 30.0
    assert compared["memory allocated"].recorded == 40.0
    assert compared["seconds of a step"].recorded == 0.5
    assert Compared("a", "", 3.0, 2.0).off == 0.5


def test_weak_scaling_keeps_the_rows_of_a_gpu_and_strong_scaling_the_step():
    planner = planner_of(load_config(recipe_path("gpu_check"), ["train.global_batch_rows=512"]), gpus=8)
    points = scale(planner, 256)
    assert [point.gpus for point in points] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    each = [point.weak.images_per_s / point.gpus for point in points]
    assert each[3:] == sorted(each[3:], reverse=True), "from one host on"
    assert {point.weak.choice.rows for point in points} == {64}
    strong = [point.strong.images_per_s for point in points if point.strong]
    assert strong[-1] > strong[0]
    assert all(point.strong.work.images == points[0].strong.work.images for point in points if point.strong)


SIZED = {"lcl_vit_l14_1b": 64, "lcl_vit_h14_3b": 128, "lcl_vit_1b_7b": 256, "lcl_vit_6b_7b": 512}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SIZED if "EXTENDED_TESTS" in os.environ else [*SIZED][:1])
def test_a_recipe_at_size_fits_the_gpus_that_it_names(recipe):
    config = load_config(recipe_path(recipe))
    text = (RECIPES / f"{recipe}.yaml").read_text()
    assert f"--recipe {recipe} --ds_config zero3_large --gpus {SIZED[recipe]} --text_per_image 40" in text
    planner = planner_of(config, gpus=SIZED[recipe], hosts=SIZED[recipe] // 8, stage="zero3_large", text_tokens=40)
    plan = planner.plan(planner.given())
    assert plan.memory.needed < planner.gpu.memory_gib * 2**30
    assert f"{plan.memory.needed / 2**30:.0f} GiB a GPU" in text
    assert f"{plan.time.total:.1f} s a step" in text
    assert planner.config.data.lanes % (SIZED[recipe] * config.data.workers) == 0
