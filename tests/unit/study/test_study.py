"""Studies before and after their runs: settings, budgets that are spent alike, records, tables and the page."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lcl_ds.cli import USER_ERROR
from lcl_ds.data.demo.textured import ensure_textured
from lcl_ds.data.settings import TexturedSettings
from lcl_ds.errors import UserError
from lcl_ds.study import jobs as jobs_module
from lcl_ds.study.__main__ import main
from lcl_ds.study.execution import encoders_of, measuring_commands, run_folder, training_command
from lcl_ds.study.jobs import Job, budget_name, configs_of, jobs_of, runs_of
from lcl_ds.study.page import study_page
from lcl_ds.study.record import (
    curves_of,
    find_record,
    find_same,
    fingerprint_of,
    record_path,
    settings_of,
    write_record,
)
from lcl_ds.study.settings import STUDIES, arguments_of, load_study
from lcl_ds.study.tables import column_of, markdown_of, summary_of

TREE = {
    "title": "A test",
    "question": "Does <b>it</b> hold?",
    "recipe": "study",
    "seeds": [0, 1, 2],
    "budgets": [16000, 64000],
    "variants": {"lcl": {}, "generation": {"objective.name": "generation"}},
    "encoders": ["trained", "untrained"],
    "measurements": [{"tasks": ["linear", "zeroshot"]}, {"tasks": ["retrieval"], "data": "pairs-*.tar"}],
}


def write_study(folder: Path, **changes) -> Path:
    path = folder / "a_test.yaml"
    path.write_text(yaml.safe_dump({**TREE, **changes}, sort_keys=False))
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return write_study(tmp_path)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_valid_and_ask_a_question(path):
    study = load_study(path)
    assert study.question.strip().endswith("?")
    assert configs_of(study, path).keys() == study.all_variants().keys()
    assert len({run.name for run in runs_of(study, path)}) == len(runs_of(study, path))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variant": {}}, "variant: unknown setting (did you mean 'variants'?)"),
        ({"variants": {}}, "variants: dictionary should have at least 1 item"),
        ({"variants": {"a/b": {}}}, "variants: the name 'a/b' may have letters"),
        ({"seeds": [0, 0]}, "seeds: a number stands there twice"),
        ({"budgets": [-1]}, "budgets: a number is negative"),
        ({"budgets": [], "match": "flops"}, "match=flops needs budgets"),
        ({"match": "time"}, "match: input should be 'images' or 'flops', got 'time'"),
        ({"measurements": [{"tasks": ["linar"]}]}, "there is no task 'linar' (did you mean 'linear'?)"),
        ({"measurements": [{"task": ["linear"]}]}, "measurements.0.task: unknown setting (did you mean 'tasks'?)"),
        ({"measurements": [{"tasks": ["zeroshot"], "prompts": ["a"]}]}, "measurements.0.prompts: 'a' lacks {}"),
    ],
)
def test_a_mistake_is_a_sentence_with_file_and_key(tmp_path, changes, sentence):
    path = write_study(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_study(path)
    assert any(problem.startswith(f"{path}: ") and sentence in problem for problem in error.value.problems), str(error)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variants": {"a": {"objective.nam": "clip"}}}, "variant a: objective.nam: unknown setting"),
        ({"variants": {"a": {"objective.name": "clipp"}}}, "variant a: objective.name: there is no 'clipp'"),
        ({"recipe": "nothing"}, "recipe nothing: there is no such file"),
        ({"overrides": {"evaluation.shards": None}}, "measurements.0.data: is missing, and variant lcl has no"),
    ],
)
def test_a_mistake_in_a_variant_is_a_sentence_with_its_name(tmp_path, changes, sentence):
    path = write_study(tmp_path, **changes)
    with pytest.raises(UserError, match=sentence):
        configs_of(load_study(path), path)


def test_the_command_line_names_a_variant_that_is_not_there(path, capsys):
    assert main([str(path), "--only", "lcll", "--no_run"]) == USER_ERROR
    assert "--only lcll:" in (error := capsys.readouterr().err)
    assert "did you mean 'lcl'" in error


def test_crossed_variants_have_the_settings_of_both(tmp_path):
    path = write_study(tmp_path, crossed_with={"slow": {"train.learning_rate": 1e-4}, "fast": {}})
    variants = load_study(path).all_variants()
    assert list(variants) == ["lcl-slow", "lcl-fast", "generation-slow", "generation-fast"]
    assert variants["generation-slow"] == {"objective.name": "generation", "train.learning_rate": 1e-4}


@pytest.mark.parametrize(("images", "name"), [(16000, "16k"), (256000, "256k"), (300, "300"), (16384, "16384")])
def test_a_budget_has_a_name_for_files(images, name):
    assert budget_name(images) == name


# Budgets


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("corpus") / "study"
    ensure_textured(TexturedSettings(folder=str(folder), documents=150, heldout_documents=9))
    return {
        "data.textured": None,
        "data.shards": f"{folder}/documents-*.tar",
        "data.tokenizer": f"{folder}/tokenizer",
        "evaluation.shards": f"{folder}/heldout-documents-*.tar",
    }


OBJECTIVES = ("lcl", "clip", "generation")


@pytest.fixture
def few_rows(monkeypatch):
    """Sampling is most of the work; what is compared comes from the same sample."""
    monkeypatch.setattr(jobs_module, "SAMPLED_ROWS", 60)


def sized(folder, corpus, **changes) -> dict[str, Job]:
    variants = {name: {"objective.name": name} for name in OBJECTIVES}
    path = write_study(folder, overrides=corpus, variants=variants, seeds=[3], budgets=[16000], **changes)
    study = load_study(path)
    return {job.run.variant: job for job in jobs_of(study, path, runs_of(study, path))}


def test_variants_see_as_many_images_in_as_large_steps(tmp_path, corpus, few_rows):
    jobs = sized(tmp_path, corpus, warmup=0.1)
    for job in jobs.values():
        assert job.images == pytest.approx(16000, rel=0.01)
        assert job.images / job.sizes["train.steps"] == pytest.approx(36, rel=0.05)
        assert job.sizes["train.warmup_steps"] == round(0.1 * job.sizes["train.steps"])
        assert job.sizes["train.seed"] == 3
    # clip sees no images in its rows of text, so fewer of them hold as many pairs.
    assert jobs["clip"].sizes["train.global_batch_rows"] < jobs["lcl"].sizes["train.global_batch_rows"]
    assert jobs["clip"].tflop < 0.9 * jobs["lcl"].tflop


def test_variants_spend_the_arithmetic_of_the_first_within_a_percent(tmp_path, corpus, few_rows):
    jobs = sized(tmp_path, corpus, match="flops")
    assert jobs["lcl"].images == pytest.approx(16000, rel=0.01)
    assert [jobs[name].tflop for name in OBJECTIVES] == pytest.approx([jobs["lcl"].tflop] * 3, rel=0.01)
    assert jobs["clip"].images > 1.1 * jobs["lcl"].images


def test_a_study_without_budgets_takes_the_steps_of_its_settings(tmp_path):
    changes = {"budgets": [], "overrides": {"train.steps": 7, "train.global_batch_rows": 2}}
    path = write_study(tmp_path, **changes)
    study = load_study(path)
    assert [run.name for run in runs_of(study, path)][:2] == ["lcl-recipe-0", "generation-recipe-0"]
    assert configs_of(study, path)["lcl"].train.steps == 7


# Commands


def job_of(path, variant="lcl", budget="16k", seed=0) -> Job:
    study = load_study(path)
    run = next(r for r in runs_of(study, path) if (r.variant, r.budget, r.seed) == (variant, budget, seed))
    sizes = {"train.steps": 5, "train.global_batch_rows": 6, "train.seed": seed}
    return Job(run, sizes, 160.0, 0.5)


def test_a_run_of_other_settings_trains_in_another_folder(path):
    study, job = load_study(path), job_of(path)
    folder = run_folder(Path("runs"), study, job)
    assert folder.parent == Path("runs/a_test")
    assert folder.name.startswith("lcl-16k-0-")
    assert run_folder(Path("runs"), study, job_of(path)) == folder
    slower = replace(job, run=replace(job.run, overrides={"train.learning_rate": 0.1}))
    longer = replace(job, sizes={**job.sizes, "train.steps": 6})
    assert len({folder, *(run_folder(Path("runs"), study, other) for other in (slower, longer))}) == 3


def test_training_is_one_command_and_with_several_ranks_a_launcher_s(path):
    study, job = load_study(path), job_of(path, "generation")
    command = training_command(study, job, Path("run"))
    assert command[:2] == ["-m", "lcl_ds.train"]
    assert {"objective.name=generation", "train.steps=5", "evaluation.shards=null"} <= set(command)
    several = training_command(study.model_copy(update={"ranks": 4}), job, Path("run"))
    assert several[:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", "-m"]


def test_tasks_with_text_are_left_to_objectives_that_read_it(path):
    study = load_study(path)
    commands = {
        variant: [" ".join(c) for _, _, c in measuring_commands(study, path, job_of(path, variant).run, Path("run"))]
        for variant in ("lcl", "generation")
    }
    assert len(commands["lcl"]) == 4  # two calls each, trained and untrained
    assert "--task linear zeroshot" in commands["lcl"][0]
    assert "--label shape texture colour size" in commands["lcl"][0]
    assert "--data pairs-*.tar" in commands["lcl"][1]
    assert "--label" not in commands["lcl"][1]
    assert commands["lcl"][2].endswith("--untrained")
    assert len(commands["generation"]) == 1
    assert "zeroshot" not in commands["generation"][0]


def test_the_first_weights_are_measured_once_for_each_seed(path):
    study = load_study(path)
    untrained = [run.name for run in runs_of(study, path) if "untrained" in encoders_of(study, run)]
    assert untrained == ["lcl-16k-0", "lcl-16k-1", "lcl-16k-2"]


# Figures


def record_of(path, variant="lcl", budget="16k", seed=0, value=0.5, **changes) -> dict:
    study, job = load_study(path), job_of(path, variant, budget, seed)
    shape = {"task": "linear", "label": "shape", "features": "mean", "metric": "accuracy", "chance": 0.0625}
    figures = {"trained": [{**shape, "value": value}]}
    if "untrained" in encoders_of(study, job.run):
        figures["untrained"] = [{**shape, "value": 0.11}]
    return {
        "version": 1,
        "study": "a_test",
        "variant": variant,
        "budget": budget,
        "seed": seed,
        "settings": settings_of(study, job.run),
        "sizes": job.sizes,
        "fingerprint": fingerprint_of(study, job),
        "images": 16010,
        "tflop": 2.5,
        "curves": {"step": [1, 2], "images": [80, 160], "loss": [3.0, 2.0 + value]},
        "figures": figures,
        "commands": ["python -m lcl_ds.train 'a b'"],
        "date": "2026-11-26",
        "git_commit": "0" * 40,
        "versions": {"torch": "2.13.0"},
        **changes,
    }


def test_a_run_whose_figures_are_there_is_found_and_those_of_other_settings_are_refused(path, tmp_path):
    study, job = load_study(path), job_of(path)
    assert find_record(tmp_path, study, job.run) is None
    write_record(tmp_path, job.run, record_of(path))
    assert find_record(tmp_path, study, job.run)["images"] == 16010
    changed = replace(job.run, overrides={"train.learning_rate": 0.1})
    with pytest.raises(UserError, match=r"overrides\.train\.learning_rate=None, and the study says 0\.1; remove"):
        find_record(tmp_path, study, changed)


def test_a_recipe_that_changed_where_the_study_overrides_it_keeps_its_figures(tmp_path):
    recipe = tmp_path / "a_recipe.yaml"
    recipe.write_text((STUDIES.parent / "recipes" / "study.yaml").read_text())
    path = write_study(tmp_path, recipe=str(recipe), overrides={"train.learning_rate": 0.1})
    study, job = load_study(path), job_of(path)
    record = record_of(path)
    write_record(tmp_path, job.run, record)
    recipe.write_text(recipe.read_text().replace("learning_rate: 5.0e-4", "learning_rate: 0.2"))
    assert find_record(tmp_path, study, job.run)["images"] == 16010
    with pytest.raises(UserError, match=r"warmup=None, and the study says 0\.2"):
        find_record(tmp_path, study.model_copy(update={"warmup": 0.2}), job.run)
    recipe.write_text(recipe.read_text().replace("weight_decay: 0.1", "weight_decay: 0.2"))
    with pytest.raises(UserError, match=r"recipe\.train\.\w+=0\.\w+, and the study says 0\.2"):
        find_record(tmp_path, study, job.run)


def test_damaged_figures_are_a_sentence(path, tmp_path):
    study, job = load_study(path), job_of(path)
    file = record_path(tmp_path, job.run)
    file.parent.mkdir()
    file.write_text("[1]")
    with pytest.raises(UserError, match="holds no figures"):
        find_record(tmp_path, study, job.run)


def test_the_same_run_of_another_study_is_taken_over_and_another_one_is_not(path, tmp_path):
    study, job = load_study(path), job_of(path)
    other = replace(job.run, study="other", variant="negative", overrides={"objective.contrastive_weight": 0.1})
    write_record(tmp_path, job.run, record_of(path))
    found = find_same(tmp_path, study, replace(job, run=other), ["trained"])
    assert found["copy_of"] == "a_test/lcl-16k-0"
    assert (found["study"], found["variant"], list(found["figures"])) == ("other", "negative", ["trained"])
    longer = replace(job, sizes={**job.sizes, "train.steps": 6})
    assert find_same(tmp_path, study, longer, ["trained"]) is None
    assert find_same(tmp_path, study, job, ["trained", "average"]) is None


@pytest.mark.parametrize(
    "other",
    [
        {"objective.name": "clip"},
        {"objective.contrastive_weight": 0.2},
        {"model.vision.hidden_size": 64},
        {"model.decoder.num_hidden_layers": 3},
        {"data.shards": "elsewhere-*.tar"},
        {"train.learning_rate": 0.1},
    ],
)
def test_runs_that_differ_in_a_setting_are_not_the_same(path, other):
    study, job = load_study(path), job_of(path)
    changed = replace(job, run=replace(job.run, overrides=other))
    assert fingerprint_of(study, changed) != fingerprint_of(study, job)
    named = replace(job, run=replace(job.run, overrides={"objective.name": "lcl", "objective.gather_with_grad": True}))
    assert fingerprint_of(study, named) == fingerprint_of(study, job)


def test_a_curve_is_the_mean_of_equal_parts():
    rows = [{"step": n, "images": 10, "loss": 0.0, "a_loss": float(n), "b_loss": 1.0} for n in range(1, 601)]
    curves = curves_of(rows)
    assert len(curves["a_loss"]) == 60
    assert curves["a_loss"][0] == 5.5
    assert (curves["step"][-1], curves["images"][-1]) == (600, 6000)
    assert sum(curves["a_loss"]) / 60 == pytest.approx(300.5)
    assert set(curves) == {"step", "images", "a_loss", "b_loss"}


def test_figures_have_names_without_what_does_not_apply():
    figure = {"task": "retrieval image_to_text", "metric": "recall_at_1"}
    assert column_of(figure) == "retrieval_image_to_text/recall_at_1"
    assert column_of({"task": "fewshot", "shots": 5, "label": "a", "metric": "accuracy"}) == "fewshot_5/a"


def all_records(path):
    values = {"lcl": (0.2, 0.3, 0.4), "generation": (0.1, 0.1, 0.1)}
    return [record_of(path, v, seed=seed, value=x) for v, of in values.items() for seed, x in enumerate(of)]


def test_a_line_has_mean_and_sample_deviation_over_seeds(path):
    summary = summary_of(load_study(path), all_records(path), missing=6)
    lines = {line.variant: line for line in summary.lines}
    assert list(lines) == ["lcl", "generation", "untrained", "guessing"]
    column = "linear/shape/mean"
    assert lines["lcl"].mean(column) == pytest.approx(0.3)
    assert lines["lcl"].deviation(column) == pytest.approx(np.std([0.2, 0.3, 0.4], ddof=1))
    assert summary.text(lines["lcl"], column) == "30.0 ± 10.0"
    table = markdown_of(summary).splitlines()
    assert table[2] == "| lcl | 16k | 3 | 16,010 | 2.5 | 30.0 ± 10.0 |"
    assert table[-1] == "| guessing |  |  |  |  | 6.2 |"


def test_columns_are_those_that_the_study_shows(tmp_path):
    path = write_study(tmp_path, columns=["knn/*"])
    assert summary_of(load_study(path), all_records(path), 0).columns == []


def test_the_command_line_chooses_columns(path, tmp_path, capsys):
    for record in all_records(path):
        write_record(tmp_path, job_of(path, record["variant"], seed=record["seed"]).run, record)
    command = [str(path), "--no_run", "--results", str(tmp_path), "--markdown", "--columns"]
    assert main([*command, "*/shape/*"]) == 0
    assert "| linear/shape/mean |" in capsys.readouterr().out
    assert main([*command, "knn/*", "zero*"]) == USER_ERROR
    assert f"--columns knn/* zero*: no figure of {path} has such a name; there are linear" in capsys.readouterr().err


def test_the_page_shows_question_error_bars_curves_and_what_was_run(path):
    study, records = load_study(path), all_records(path)
    html = study_page([(path, study, records, 6)])
    assert "Does &lt;b&gt;it&lt;/b&gt; hold?" in html
    assert "6 of 12" in html
    # 20 to 40 % on a scale that ends at 50.
    assert '<i class="interval" style="left:min(40.00%, 100% - 2px);width:40.00%">' in html
    assert "30.0 ± 10.0" in html
    assert "3 seeds" in html
    assert 'title="one deviation to either side: 20.0 to 40.0 %"' in html
    assert "image 80" in html  # the curve's axis
    assert "recipe: study" in html
    assert "python -m lcl_ds.train &#39;a b&#39;" in html
    assert "http" not in html.replace("http-equiv", "")


def test_deviations_of_what_is_no_fraction_are_not_in_percent(path):
    records = all_records(path)
    for record in records:
        ranks = {"task": "retrieval image_to_text", "metric": "median_rank"}
        record["figures"]["trained"] = [{**ranks, "value": 1000.0 + record["seed"]}]
    assert 'title="one deviation to either side: 1000 to 1002"' in study_page([(path, load_study(path), records, 6)])


def test_a_page_of_a_study_without_figures_says_so(path):
    html = study_page([(path, load_study(path), [], 12)])
    assert "0 of 12" in html


def test_tables_of_what_is_there_need_neither_data_nor_runs(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without any corpus
    for record in all_records(path):
        run = job_of(path, record["variant"], seed=record["seed"]).run
        write_record(tmp_path / "figures", run, record)
    page = tmp_path / "page.html"
    assert main([str(path), "--no_run", "--results", str(tmp_path / "figures"), "--page", str(page), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| lcl | 16k | 3 |" in printed
    assert "6 runs without figures yet" in printed
    assert "30.0 ± 10.0" in page.read_text()
    assert not (tmp_path / "data").exists()


def test_overrides_are_written_as_the_command_line_takes_them():
    overrides = {"a.b": None, "c": [1, "x"], "d": "text", "e": 0.1, "f": True}
    assert arguments_of(overrides) == ["a.b=null", 'c=[1, "x"]', "d=text", "e=0.1", "f=true"]
    assert json.loads(arguments_of(overrides)[1].partition("=")[2]) == [1, "x"]
