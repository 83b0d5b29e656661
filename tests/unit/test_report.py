import json
import os
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lcl_ds
from lcl_ds.errors import UserError
from lcl_ds.metrics import read_metrics
from lcl_ds.report import figures
from lcl_ds.report.__main__ import main
from lcl_ds.report.charts import COUNT, NUMBER, PERCENT, SIDE, Series, chart
from lcl_ds.report.comparison import comparison_page
from lcl_ds.report.examples import PICTURES, Examples, Gaze, write_pictures
from lcl_ds.report.facts import key_figures
from lcl_ds.report.figures import RetrievalExample, column, moving_average, plot_retrieval
from lcl_ds.report.numbers import MINUS
from lcl_ds.report.page import write_report
from lcl_ds.report.run import read_runs
from lcl_ds.report.single import run_page
from tests.support.runs import make_run, metrics

EVALUATION = {
    "step": 600,
    "documents": 600,
    "probe": {"shape": {"trained": 0.61, "untrained": 0.17, "raw_pixels": 0.13, "chance": 0.125}},
    "retrieval": {"pairs": 1500, "recall_at_1": 0.05, "recall_at_5": 0.2, "median_rank": 20, "chance": 0.00067},
    "figures": [
        {"task": "linear", "features": "mean", "label": "shape", "metric": "accuracy", "low": 0.55, "high": 0.65},
        {"task": "retrieval image_to_context", "metric": "recall_at_1", "low": 0.04, "high": 0.06},
    ],
}


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 60)


@pytest.mark.parametrize("torn", ["{", '{"step": 5, "lo', '{"step": 5, "loss": 1', "[", '"'])
def test_a_torn_last_line_is_ignored(run, torn):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(torn)
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0] == metrics(1)
    assert rows[3]["contrastive_loss"] is None


def test_a_byte_order_mark_is_no_damage(run):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]


def test_runs_whose_names_are_not_unicode_are_drawn(tmp_path):
    runs = [make_run(tmp_path / os.fsdecode(name)) for name in (b"caf\xe9", b"two [red]")]
    assert "caf\\udce9" in write_report(runs[:1]).read_text()
    assert "caf\\udce9" in write_report(runs).read_text()


def test_a_broken_line_before_the_last_is_named(run):
    path = run / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 "):
        read_metrics(run)


def test_key_figures_sum_over_steps(run):
    figures = key_figures(read_metrics(run))
    assert figures["Steps"] == "4"
    assert figures["Images"] == "400"
    assert figures["Tokens"] == "12,000"
    assert figures["Mean tokens per second"] == "6,000"
    assert figures["Mean images per second"] == "200"
    assert figures["Padding"] == "25.0\xa0%"
    assert figures["Samples skipped"] == "4"
    assert figures["Steps not applied"] == "1"
    assert figures["Generation loss, mean of last 4 steps"] == "2.000"
    assert "Peak memory" not in figures


def test_key_figures_of_a_gpu_run():
    figures = key_figures([metrics(1, mfu=0.4, memory_gb=30.0), metrics(2, mfu=0.5, memory_gb=31.0)])
    assert figures["Model FLOPs utilisation"] == "45.0\xa0%"
    assert figures["Peak memory"] == "31.0 GiB"


def page_of(*runs: Path) -> str:
    """The page about a run, or about several, without the figures that would be drawn beside it."""
    read = read_runs(runs)
    return comparison_page(read) if len(read) > 1 else run_page(read[0], "the state")


def words_of(page: str) -> str:
    """What a reader sees of a page, in order."""
    without = re.sub(r"<(style|title|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", without)).split())


def test_one_run(run, capsys):
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    image = np.zeros((8, 8, 3), np.uint8)
    gaze = Gaze(image, np.array([[0.1, 0.2], [0.3, 0.4]]))
    write_pictures(run, 600, Examples([RetrievalExample("a <i>context", [image], [True])], [gaze]))
    assert main([str(run)]) == 0
    page = run / "report.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') == 3
    assert "http" not in text.split("<body>")[0].replace("http-equiv", "")  # nothing is loaded from elsewhere
    assert "<script" not in text
    assert "<title>run</title>" in text
    assert "&lt;b&gt;demo&lt;/b&gt;" in text
    assert "<b>demo" not in text
    assert "A &amp; B" in text
    assert "prefers-color-scheme: dark" in text
    words = words_of(text)
    for said in (
        *("61.0 % 55.0 to 65.0", "17.0 %", "5.0 % 4.0 to 6.0", "Retrieval, 1,500 pairs", "after step 600"),
        "Best: mean patch token, 44.0 points above untrained encoder (17.0 %).",
        "Guessing the most frequent class: 12.5 %.",
        *("Guessing ranks 0.07 % first", "Where the pooling query looks", "a <i>context"),
    ):
        assert said in words
    for name in ("losses", "schedule", "throughput"):
        with Image.open(run / "plots" / f"{name}.png") as picture:
            picture.load()
            assert picture.width > picture.height > 100
            assert len(picture.convert("L").getcolors()) > 20  # something is drawn


def test_the_page_says_who_ran_what_where_and_how_to_go_on(run):
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step_00000004")
    for number, start in enumerate(("2026-11-26T11:24:49+00:00", "2026-11-27T08:00:00+00:00"), 1):
        folder = run / "history" / f"000{number}"
        folder.mkdir(parents=True)
        told = {"started": start, "host": "node-7", "gpu": "H100", "world_size": 8, "git_commit": "0123456789abcdef"}
        argv = ["launch/train.py", "--local_rank=0", "train.steps=4", "name=a b"]
        (folder / "environment.json").write_text(json.dumps({**told, "argv": argv}))
    words = words_of(page_of(run))
    for said in (
        "Started 26 November 2026, 11:24 UTC",
        "Continued once, last 27 November 2026, 08:00 UTC",
        *("Host node-7", "Device H100", "Ranks 8", "Commit 0123456789ab "),
        "Command launch/train.py train.steps=4 'name=a b'",
        f"Release the encoder lcl convert {run} out",
        f"Measure more lcl evaluate {run} --task linear attentive knn --data FOLDER",
    ):
        assert said in words


def test_pictures_of_another_step_are_not_shown_and_damaged_ones_are_named(run, capsys):
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    image = np.zeros((8, 8, 3), np.uint8)
    write_pictures(run, 599, Examples(gazes=[Gaze(image, np.ones((1, 1)))]))
    assert "pooling query" not in page_of(run)
    for held in ('{"step": 600, "retrieval": [], "attention": [{"image": "PHN2Zz4=", "weights": [[1]]}]}', "[", "[]"):
        (run / PICTURES).write_text(held)
        assert main([str(run)]) == 2
        assert f"{run / PICTURES}: is damaged" in capsys.readouterr().err
    write_pictures(run, 600, Examples())
    assert not (run / PICTURES).exists()


def test_what_an_evaluation_found_during_training_stands_beside_the_losses(run):
    found = {"generation_loss": 2.5, "linear/co/lour": 0.5, "linear/co/lour/mean": 0.25, "retrieval/recall_at_1": 0.125}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics(5, evaluation=found)) + "\n")
    page = page_of(run)
    words = words_of(page)
    assert "training held out" in words
    assert "co/lour: accuracy linear, pooling head linear, mean patch token" in words
    assert "Retrieval of contexts by images recall at 1" in words
    assert "linear, pooling head: 50.0\xa0%\nlinear, mean patch token: 25.0\xa0%" in page  # said to who points at it


def test_a_run_of_one_step_without_other_files(tmp_path):
    run = tmp_path / "short"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps(metrics(1, contrastive_loss=None)) + "\n")
    text = page_of(run)
    assert "Final evaluation" not in text
    assert "<details" not in text
    assert "No finite value at the end." in text


def test_several_runs_are_compared(tmp_path, run):
    other = make_run(tmp_path / "elsewhere" / "_$x$<i>", steps=6)
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "probe": {"shape": {"trained": 0.5}}}))
    (other / "evaluation.json").write_text(json.dumps(EVALUATION))
    page = write_report([run, other], tmp_path / "pages" / "both.html")
    assert page == tmp_path / "pages" / "both.html"
    text = page.read_text()
    assert "_$x$&lt;i&gt;" in text
    assert "<i>" not in text
    words = words_of(text)
    for said in (
        *("1 run finished, 4 steps", "400 images", "2 _$x$<i> finished, 6 steps", "600 images"),
        "The runs end at different steps",
        "shape: mean patch token 1 50.0 % 2 \N{BLACK STAR} 61.0 % +11.0 points",
        f"Contrastive loss, training 1 2.444 2 \N{BLACK STAR} 1.827 {MINUS}0.618",
        "train.steps 4 1 6 2",
    ):
        assert said in words
    assert "train.seed" not in words  # the same in both
    assert (tmp_path / "pages" / "plots" / "both_losses.png").is_file()
    assert not (run / "plots").exists()


def test_none_is_best_where_all_are_the_same_and_equal_curves_take_turns(tmp_path):
    text = page_of(*(make_run(tmp_path / name) for name in "abc"))
    assert "\N{BLACK STAR}" not in words_of(text).replace("\N{BLACK STAR} best", "")
    shown = re.findall(r'stroke-dasharray="9 18" stroke-dashoffset="(-?\d+)', text)
    assert shown[:3] == ["0", "-9", "-18"]


def test_a_comparison_leaves_reports_of_its_runs_alone(tmp_path, run):
    other = make_run(tmp_path / "other" / "run")
    page = write_report([run, other, run])
    assert page == run / "comparison.html"
    assert "other/run" in page.read_text()  # as much of the path as tells the two apart
    assert not (run / "report.html").exists()


def test_missing_metrics_are_named(tmp_path, run, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").touch()
    assert main([str(run), str(tmp_path / "empty"), str(tmp_path / "begun")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert str(tmp_path / "empty" / "metrics.jsonl") in output.err
    assert str(tmp_path / "begun" / "metrics.jsonl") in output.err
    assert "Traceback" not in output.err


def test_unreadable_evaluation_is_named(run, capsys):
    (run / "evaluation.json").write_text("{")
    assert main([str(run)]) == 2
    assert str(run / "evaluation.json") in capsys.readouterr().err


def curve(values, **options):
    steps = np.arange(1.0, len(values) + 1)
    return chart("a curve", [Series("", steps, np.array(values, float), **options)])


def test_a_flat_curve_is_drawn_flat():
    heights = [
        float(y) for y in re.findall(r",(-?[\d.]+)", curve([14.20, 14.28, 14.22], is_smoothed=False).curves[0].strong)
    ]
    assert max(heights) - min(heights) < 0.05 * SIDE
    falling = curve([5.0, 2.0, 1.0], is_smoothed=False)
    heights = [float(y) for y in re.findall(r",(-?[\d.]+)", falling.curves[0].strong)]
    assert max(heights) - min(heights) > 0.6 * SIDE


def test_a_curve_has_gaps_where_there_are_no_numbers_and_dots_for_single_ones():
    drawn = curve([1.0, np.nan, 2.0, 3.0, np.inf])
    assert drawn.curves[0].faint.count("M") == 2
    assert "h.1" in drawn.curves[0].faint
    assert curve([np.nan, np.nan]).curves[0].strong.count("M") == 0
    assert curve([2.0]).x_ticks[0].text == "step 1"


def test_long_runs_are_drawn_with_few_points_that_keep_extremes_in_sight():
    values = np.sin(np.arange(100_000) / 9_000) + 2
    values[50_000], values[70_000] = 3.5, 0.5
    drawn = curve(values)
    assert len(drawn.curves[0].faint) + len(drawn.curves[0].strong) < 20_000
    heights = [float(y) for y in re.findall(r",(-?[\d.]+)", drawn.curves[0].faint)]
    top, bottom = (float(drawn.y_ticks[i].text) for i in (-1, 0))
    ends = [top - y / SIDE * (top - bottom) for y in (min(heights), max(heights))]
    assert ends == pytest.approx([3.5, 0.5], abs=0.01)
    assert [tick.text for tick in drawn.x_ticks] == ["step 20k", "40k", "60k", "80k", "100k"]


def test_one_spike_does_not_flatten_the_rest_and_the_page_says_that_it_is_cut():
    drawn = curve([1.0, 2.0] * 200 + [1e9] + [1.0, 2.0] * 200, is_smoothed=False)
    assert drawn.notes == ["Values beyond the axis are cut off."]
    assert float(drawn.y_ticks[-1].text) < 10


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([0, 0.003], NUMBER, ["0", "1e-3", "2e-3", "3e-3"]),
        ([0, 90_000], COUNT, ["0", "25k", "50k", "75k", "100k"]),
        ([0, 0.04], PERCENT, ["0\xa0%", "1\xa0%", "2\xa0%", "3\xa0%", "4\xa0%"]),
        ([0, 1.4], NUMBER, ["0", "0.5", "1.0", "1.5"]),
        ([-2, 2], NUMBER, ["\N{MINUS SIGN}2", "\N{MINUS SIGN}1", "0", "1", "2"]),
    ],
    ids=["small", "large", "percent", "decimals", "negative"],
)
def test_numbers_of_an_axis_are_round_and_short(values, unit, expected):
    series = Series("", np.arange(2.0), np.array(values, float), is_smoothed=False)
    assert [tick.text for tick in chart("t", [series], unit).y_ticks] == [
        e.replace("e-", f"e{MINUS}") for e in expected
    ]


def test_moving_average_starts_at_the_first_value_and_passes_over_gaps():
    smooth = moving_average(np.array([np.nan, 4.0, np.nan, 2.0]), 2)
    np.testing.assert_allclose(smooth, [np.nan, 4, 4, (4 * 0.5 + 2) / 1.5])
    np.testing.assert_array_equal(moving_average(np.arange(5.0), 0.1), np.arange(5.0))


def test_column_has_a_value_per_row():
    np.testing.assert_array_equal(column([{"a": 1}, {"a": None}, {}], "a"), [1, np.nan, np.nan])


def test_retrieval_frames_the_right_image_green(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 100)
    images = [np.full((16, 16, 3), 40 * i, np.uint8) for i in range(5)]
    examples = [
        RetrievalExample("costs $5 or $6 " * 30, images, [i == 2 for i in range(5)]),
        RetrievalExample("日本語", images, [False] * 5),
    ]
    plot_retrieval(examples, tmp_path / "new" / "retrieval.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "retrieval.png").convert("RGB"))
    rows, columns = np.nonzero((pixels == (0x00, 0xA8, 0x78)).all(-1))
    height, width = pixels.shape[:2]
    assert rows.max() < height * 0.6  # only in the first row
    assert width * 0.55 < columns.min() < columns.max() < width * 0.8  # only the third image


def test_figure_of_the_method_is_well_formed():
    path = Path(lcl_ds.__file__).parent / "assets" / "lcl.svg"
    text = " ".join(" ".join(ElementTree.parse(path).getroot().itertext()).split())
    for words in ("causal decoder", "attentive pooling", "contrastive loss", "generation loss", "keep the ViT"):
        assert words in text


@pytest.mark.parametrize("reports", [{}, {"logit_scale": 14.3}, dict.fromkeys("abcd", 1.0)], ids=len)
def test_the_schedule_has_a_panel_for_each_number_that_an_objective_reports(tmp_path, monkeypatch, reports):
    drawn = []
    monkeypatch.setattr(figures, "_write", lambda figure, path: drawn.append(figure))
    row = {key: value for key, value in metrics(1).items() if key != "logit_scale"}
    figures.plot_schedule({"run": [row | reports]}, tmp_path / "schedule.png")
    shown = [axis.get_title(loc="left") for axis in drawn[0].axes if axis.get_visible()]
    assert shown == ["Learning rate", "Gradient norm", *(name.replace("_", " ").capitalize() for name in reports)]
