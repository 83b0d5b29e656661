"""Pages as a browser lays them out: on a phone and on a desk, light and dark, with anything in them."""

import json

import numpy as np
import pytest

from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.stream.lanes import LaneSettings
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.report.batch_page import page
from lcl_ds.report.comparison import comparison_page
from lcl_ds.report.examples import Examples, Gaze, write_pictures
from lcl_ds.report.figures import RetrievalExample
from lcl_ds.report.run import read_runs
from lcl_ds.report.single import run_page
from lcl_ds.study.page import study_page
from lcl_ds.study.settings import Measurement, Study
from lcl_ds.tokens import TextTokenizer
from tests.support.browser import BROWSER, problems_of
from tests.support.corpora import picture
from tests.support.runs import make_run, metrics
from tests.support.tars import write_tar

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here (Debian: apt-get install chromium)")

HOSTILE = "<script>alert('x')</script>" + "ä日本語🙂" * 10 + "x" * 200
BROKEN = (
    '<!doctype html><meta name="viewport" content="width=device-width"><body><p style="width:2000px">too wide</p>'
    '<p style="width:50px;overflow:hidden;white-space:nowrap">this text is cut off</p>'
    '<p style="color:#ccc;background:#fff">too faint</p><script>throw Error("an error")</script>'
)


def eventful_run(folder):
    """A run with everything that a page can show, and with names and texts that anybody may choose."""
    run = make_run(folder, steps=30)
    found = {
        "generation_loss": 2.1,
        f"linear/{HOSTILE}": 0.5,
        f"linear/{HOSTILE}/mean": 0.4,
        "retrieval/recall_at_1": 0,
    }
    with (run / "metrics.jsonl").open("a") as file:
        for step in (31, 32):
            extra = {"evaluation": found, "evaluation_s": 9.0, "mfu": 0.41, "memory_gb": 70.5, "loss": 1e30 * step}
            sources = {HOSTILE: {"documents": 3, "images": 4}}
            file.write(json.dumps(metrics(step, sources=sources, **extra)) + "\n")
    scores = {"trained": 0.61, "head": 0.7, "untrained": 0.17, "raw_pixels": 0.13, "chance": 0.125}
    figures = [{"task": "linear", "features": "mean", "label": HOSTILE, "metric": "accuracy", "low": 0.5, "high": 0.7}]
    recalls = {f"recall_at_{k}": 0.01 * k for k in (1, 5, 10)}
    retrieval = {"pairs": 12345678, "median_rank": 1234567, "chance": 1e-7, **recalls, "reverse": recalls}
    evaluation = {"step": 32, "documents": 9, "probe": {HOSTILE: scores}, "figures": figures, "retrieval": retrieval}
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "left_out": {HOSTILE: 3}, "notes": [HOSTILE]}))
    told = {"started": "2026-11-26T11:24:49+00:00", "host": HOSTILE, "gpu": HOSTILE, "world_size": 512}
    (run / "environment.json").write_text(json.dumps({**told, "git_commit": "0" * 40, "argv": ["train", HOSTILE]}))
    image = np.zeros((16, 16, 3), np.uint8)
    gaze = Gaze(image, np.full((2, 2), 0.25))
    write_pictures(run, 32, Examples([RetrievalExample(HOSTILE, [image] * 5, [True] + [False] * 4)], [gaze] * 3))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step_00000032")
    return run


def hostile_rows(folder, tokenizer):
    record = json.dumps({"texts": [HOSTILE, None, "x" * 400], "images": [None, "0.jpg", None]}).encode()
    key = "k" * 60
    shard = write_tar(folder / f"{'shard' * 8}.tar", [(f"{key}.json", record), (f"{key}.0.jpg", picture(0, side=400))])
    settings = LaneSettings(
        lanes=1,
        data_seed=1,
        augmentation_seed=2,
        row_tokens=200,
        row_images=4,
        image_tokens=16,
        image_size=384,
        pack_window=4,
    )
    batch = next(BatchLoader([Source("source" * 9, [index_shard(shard)])], settings, tokenizer, 3))
    return page(batch, tokenizer, f"{HOSTILE}, as lcl sees it")


def hostile_study(folder):
    """Twelve variants with names as long as they may be, two budgets, figures with any label."""
    variants = {f"{'long_name_' * 9}{number}": {} for number in range(12)}
    study = Study(
        title=HOSTILE,
        question=f"{HOSTILE}?",
        notes=[HOSTILE],
        recipe="study",
        budgets=[16000, 256000],
        variants=variants,
        measurements=[Measurement(tasks=["linear"])],
    )
    shape = {"task": "linear", "label": HOSTILE, "features": "mean", "metric": "accuracy", "chance": 0.1}
    ranks = {"task": "retrieval image_to_text", "metric": "median_rank"}
    records = [
        {
            "variant": variant,
            "budget": budget,
            "images": 1e9,
            "tflop": 1e9,
            "curves": {"images": [80, 160], "loss": [3.0, 2.0 + seed], f"{'long_' * 9}loss": [1e9, 1e-9]},
            "figures": {
                "trained": [{**shape, "value": 0.3 * seed}, {**ranks, "value": 1234567.0}],
                "untrained": [{**shape, "value": 0.2}],
            },
            "commands": [f"python -m lcl_ds.train {HOSTILE!r}"],
            "date": "2026-11-26",
            "git_commit": f"{seed}" * 40,
            "versions": {"torch": "2.13.0+cpu"},
        }
        for variant in variants
        for budget in ("16k", "256k")
        for seed in range(3)
    ]
    paths = [folder / "a_study.yaml", folder / "without_runs.yaml"]
    for path in paths:
        path.write_text(f"title: {HOSTILE}\n")
    return study_page([(paths[0], study, records, 0), (paths[1], study, [], 72)])


def test_nothing_is_cut_faint_or_wrong_at_any_width_and_a_broken_page_is_noticed(tmp_path, demo_folder):
    name = f"{'long_name_' * 9}日本語<b>"
    run = eventful_run(tmp_path / name)
    begun = make_run(tmp_path / "begun", steps=1)
    (one,) = read_runs([run])
    several = read_runs([run, begun, *(make_run(tmp_path / str(i)) for i in range(18))])
    problems = problems_of(
        {
            "report": run_page(one, "the state"),
            "begun": run_page(read_runs([begun])[0], "the state"),
            "comparison": comparison_page(several),
            "study": hostile_study(tmp_path),
            "rows": hostile_rows(tmp_path, TextTokenizer(demo_folder / "tokenizer")),
            "broken": BROKEN,
        }
    )
    broken = [problem for problem in problems if problem.startswith("broken") or "an error" in problem]
    assert [problem for problem in problems if problem not in broken] == []
    for what in ("wider than the window", "wider than its box", "too little contrast", "an error"):
        assert any(what in problem for problem in broken), what
    assert sum("contrast" in problem for problem in broken) == 4  # at both widths, light and dark
