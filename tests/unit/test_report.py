import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lcl_ds
from lcl_ds.errors import UserError
from lcl_ds.metrics import read_metrics
from lcl_ds.report import figures
from lcl_ds.report.__main__ import main
from lcl_ds.report.figures import RetrievalExample, column, moving_average, plot_retrieval
from lcl_ds.report.page import key_figures, write_report
from tests.support.runs import make_run, metrics

EVALUATION = {
    "step": 600,
    "documents": 600,
    "probe": {"shape": {"trained": 0.61, "untrained": 0.17, "raw_pixels": 0.13, "chance": 0.125}},
    "retrieval": {"pairs": 1500, "recall_at_1": 0.05, "recall_at_5": 0.2, "median_rank": 20, "chance": 0.00067},
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
    assert figures["Padding"] == "25.0 %"
    assert figures["Samples skipped"] == "4"
    assert figures["Steps not applied"] == "1"
    assert figures["Generation loss, mean of last 4 steps"] == "2.000"
    assert "Peak memory" not in figures


def test_key_figures_of_a_gpu_run():
    figures = key_figures([metrics(1, mfu=0.4, memory_gb=30.0), metrics(2, mfu=0.5, memory_gb=31.0)])
    assert figures["Model FLOPs utilisation"] == "45.0 %"
    assert figures["Peak memory"] == "31.0 GiB"


def test_one_run(run, capsys):
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    example = RetrievalExample("a context", [np.zeros((8, 8, 3), np.uint8)], [True])
    plot_retrieval([example], run / "plots" / "retrieval.png")
    assert main([str(run)]) == 0
    page = run / "report.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') == 4
    assert "http" not in text.split("<body>")[0]  # nothing is loaded from elsewhere
    assert "<title>run</title>" in text
    assert "&lt;b&gt;demo&lt;/b&gt;" in text
    assert "<b>demo" not in text
    assert "A &amp; B" in text
    assert "prefers-color-scheme: dark" in text
    for cell in ("61.0 %", "17.0 %", "12.5 %", "5.0 %", "0.07 %", "1,500 pairs", "after step 600"):
        assert cell in text
    for name in ("losses", "schedule", "throughput"):
        with Image.open(run / "plots" / f"{name}.png") as image:
            image.load()
            assert image.width > image.height > 100
            assert len(image.convert("L").getcolors()) > 20  # something is drawn


def test_a_run_of_one_step_without_other_files(tmp_path):
    run = tmp_path / "short"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps(metrics(1, contrastive_loss=None)) + "\n")
    text = write_report([run]).read_text()
    assert "Final evaluation" not in text
    assert "<details>" not in text


def test_several_runs_are_compared(tmp_path, run):
    other = make_run(tmp_path / "elsewhere" / "_$x$<i>", steps=6)
    (other / "evaluation.json").write_text(json.dumps(EVALUATION))
    page = write_report([run, other], tmp_path / "pages" / "both.html")
    assert page == tmp_path / "pages" / "both.html"
    text = page.read_text()
    assert '<th scope="col">run</th><th scope="col">_$x$&lt;i&gt;</th>' in text
    assert '<th scope="row">Images</th><td>400</td><td>600</td>' in text
    assert '<th scope="row">Probe: shape, trained</th><td>-</td><td>61.0 %</td>' in text
    assert '<th scope="row">train.steps</th><td>4</td><td>6</td>' in text
    assert ">train.seed<" not in text  # the same in both
    assert (tmp_path / "pages" / "plots" / "both_losses.png").is_file()
    assert not (run / "plots").exists()


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
