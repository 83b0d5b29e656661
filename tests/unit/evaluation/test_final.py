"""The end of a run: it is evaluated and reported once for each state of it, and keeps its report whatever happens."""

import json
from html import unescape

import pytest

from lcl_ds.evaluation import final
from lcl_ds.evaluation.final import close_run
from lcl_ds.models.build import build_model
from lcl_ds.report import figures
from lcl_ds.report.__main__ import main as report
from lcl_ds.tokens import TextTokenizer
from tests.support.corpora import picture
from tests.support.runs import make_run
from tests.support.small import small_config
from tests.support.tars import write_tar


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 40)
    monkeypatch.setattr(final, "EXAMPLES", 1)


@pytest.fixture
def config(tmp_path, demo_folder):
    shard = write_tar(
        tmp_path / "held.tar",
        [member for i in range(4) for member in ((f"{i}.jpg", picture(i)), (f"{i}.txt", b"a caption"))],
    )
    return small_config(f"data.tokenizer={demo_folder}/tokenizer", f"evaluation.shards={shard}")


class Closing:
    """Ends a run as ``launch/train.py`` does, and counts evaluations."""

    def __init__(self, config, run_dir):
        self.config, self.run_dir, self.evaluations = config, run_dir, 0

    def model(self):
        self.evaluations += 1
        size = TextTokenizer(self.config.data.tokenizer).vocabulary.size
        return build_model(self.config.model, size, self.config.data.row_tokens, seed=0).eval()

    def __call__(self, step=4, **evaluation):
        settings = self.config.evaluation.model_copy(update=evaluation)
        return close_run(self.config.model_copy(update={"evaluation": settings}), self.run_dir, step, self.model)

    @property
    def results(self):
        return json.loads((self.run_dir / "evaluation.json").read_text())

    @property
    def page(self):
        return (self.run_dir / "report.html").read_text()


@pytest.fixture
def closing(config, tmp_path):
    return Closing(config, make_run(tmp_path / "run", steps=4))


def go_on_to(run_dir, step):
    with (run_dir / "metrics.jsonl").open("a") as file:
        row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
        file.write(json.dumps({**row, "step": step}) + "\n")


def test_a_finished_run_is_closed_once(closing):
    assert closing() == 0
    before = closing.page
    assert closing() == 0
    assert (closing.evaluations, closing.page, closing.results["step"]) == (1, before, 4)
    assert "after step 4" in before


def test_a_run_that_went_on_is_evaluated_and_reported_again(closing):
    closing()
    go_on_to(closing.run_dir, 6)
    assert closing(step=6) == 0
    assert (closing.evaluations, closing.results["step"]) == (2, 6)
    assert "<dt>Steps</dt><dd>6</dd>" in closing.page
    assert "after step 6" in closing.page


def test_an_end_between_evaluation_and_report_is_caught_up(closing):
    closing()
    go_on_to(closing.run_dir, 6)
    old = closing.page
    closing(step=6)
    (closing.run_dir / "report.html").write_text(old)
    closing(step=6)
    assert closing.evaluations == 2
    assert "after step 6" in closing.page


@pytest.mark.parametrize(
    "change", [{"max_documents": 3}, {"probe_labels": ["colour"]}], ids=lambda change: next(iter(change))
)
def test_other_settings_of_the_evaluation_evaluate_again(closing, change):
    closing()
    closing(**change)
    assert closing.evaluations == 2


def test_a_damaged_evaluation_is_made_again(closing):
    closing()
    (closing.run_dir / "evaluation.json").write_text('{"step": 4, "docu')
    assert closing() == 0
    assert closing.results["documents"] == 4


def test_a_run_without_held_out_shards_gets_its_report_alone(closing):
    (closing.run_dir / "config.yaml").write_text("evaluation: {shards: null}\ntrain: {steps: 4}\n")
    assert closing(shards=None) == 0
    assert (closing.evaluations, (closing.run_dir / "evaluation.json").exists()) == (0, False)
    assert "There is none: evaluation.shards names no held-out documents." in closing.page
    go_on_to(closing.run_dir, 6)
    assert closing(step=6, shards=None) == 0
    assert "<dt>Steps</dt><dd>6</dd>" in closing.page


def test_shards_that_went_away_during_training_leave_a_report_that_says_so(closing, tmp_path, caplog):
    shard = tmp_path / "held.tar"
    kept = shard.read_bytes()
    shard.unlink()
    assert closing() == 2
    assert f"It failed after step 4: evaluation.shards: data path {shard}: no such file" in closing.page
    assert "the same command evaluates again" in caplog.text
    assert "Traceback" not in caplog.text
    shard.write_bytes(kept)
    assert closing() == 0
    assert "It failed" not in closing.page
    assert "after step 4" in closing.page


def test_any_other_failure_is_a_traceback_in_the_log_and_a_sentence_in_the_report(closing, caplog):
    def broken():
        raise RuntimeError("CUDA out of <memory>")

    closing.model = broken
    assert closing() == 1
    assert "It failed after step 4: RuntimeError: CUDA out of &lt;memory&gt;" in closing.page
    assert "Traceback" in caplog.text


def test_the_picture_of_an_earlier_step_is_not_shown_as_the_run_s_own(closing, tmp_path):
    closing()
    assert "What contexts expect to see" in closing.page
    assert "Where the pooling query looks" in closing.page
    (tmp_path / "held.tar").unlink()
    closing(step=6)
    assert "What contexts expect to see" not in closing.page
    assert "Where the pooling query looks" not in closing.page


def test_a_report_in_between_says_that_the_run_has_gone_on(closing):
    closing()
    go_on_to(closing.run_dir, 6)
    assert report([str(closing.run_dir)]) == 0
    assert "after step 4, before the run went on to step 6" in closing.page
    closing(step=6)
    assert "went on" not in closing.page


@pytest.mark.parametrize(
    ("steps", "reason"),
    [(9, "it follows the last of 9 steps"), (4, "the command that trained the run makes it")],
    ids=["in training", "trained"],
)
def test_a_report_without_an_evaluation_says_why(closing, steps, reason):
    (closing.run_dir / "config.yaml").write_text(f"evaluation: {{shards: a.tar}}\ntrain: {{steps: {steps}}}\n")
    assert report([str(closing.run_dir)]) == 0
    assert f"There is none yet: {reason}." in closing.page


def test_what_was_left_out_stands_in_the_report_and_on_the_terminal(closing, tmp_path, capsys):
    members = [("0.jpg", picture(0)), ("0.txt", b"a"), ("1.jpg", picture(1)), ("1.txt", b"b"), ("2.jpg", b"no picture")]
    write_tar(tmp_path / "held.tar", [*members, ("2.txt", b"c")])
    assert closing(probe_labels=["colour"]) == 0
    sentences = [
        "robes of 'colour' are left out: no image has this label",
        "eft out: an image in none of the accepted",
    ]
    shown = " ".join(capsys.readouterr().out.split())
    for sentence in sentences:
        assert sentence in shown
        assert sentence in unescape(closing.page)
