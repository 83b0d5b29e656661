"""From shards to a recipe: what ``info`` says is in them, what ``init`` writes, what ``inspect`` shows."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from lcl_ds import train
from lcl_ds.assembly import attach_objective, lane_settings, open_checked_data
from lcl_ds.config import load_config
from lcl_ds.data.__main__ import main
from lcl_ds.data.contents import measure
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.models.build import build_model
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.tokens import TextTokenizer
from tests.support.corpora import picture
from tests.support.pages import blocks_of
from tests.support.ranks import ROOT
from tests.support.tars import write_tar

KINDS = ("cat", "dog")


def commands_of_the_page():
    """The commands of docs/data.md that lead from photos to a run, as the module of each and its arguments."""
    block = next(block for block in blocks_of(ROOT / "docs" / "data.md") if "build photos" in block.text)
    for line in block.text.splitlines():
        python, m, module, *arguments = shlex.split(line, comments=True)
        assert [python, m] == ["python", "-m"]
        yield module, arguments


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What the commands of docs/data.md make of 120 labelled photos; its training is tried without a step."""
    folder = tmp_path_factory.mktemp("own")
    photos = folder / "photos"
    photos.mkdir()
    for number in range(120):
        (photos / f"ü {number}.jpg").write_bytes(picture(number, side=80 + number))
        (photos / f"ü {number}.txt").write_text(f"photo {number} of a {KINDS[number % 2]} on a sofa")
        (photos / f"ü {number}.json").write_text(json.dumps({"kind": KINDS[number % 2], "number": number}))
    ran = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for module, arguments in commands_of_the_page():
            run = train.main if module == "lcl_ds.train" else main
            more = ["--ds_config", "zero1", "--dry_run"] if module == "lcl_ds.train" else []
            assert run([*arguments, *more]) == 0, arguments
            ran.append(arguments[0] if run is main else "train")
    assert ran == ["build", "info", "init", "inspect", "train"]
    return folder


def test_info_counts_what_is_there(built, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(built)
    shards = str(built / "shards" / "mine" / "*.tar")
    assert main(["info", shards, "--recipe", str(built / "mine.yaml"), "--json", str(tmp_path / "facts.json")]) == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    source = Source("s", [index_shard(path) for path in expand_paths(shards)])
    texts = [source.read(number, "txt").decode() for number in range(len(source))]
    tokenizer = TextTokenizer(built / "mine-tokenizer")
    lengths = [len(tokenizer.encode(text)) + 64 + 2 + 2 for text in texts]
    assert [facts[name] for name in ("samples", "pairs", "images")] == [len(texts)] * 3
    assert facts["documents"] == 0
    assert facts["bytes"] == sum(Path(path).stat().st_size for path in expand_paths(shards))
    assert facts["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert facts["text_tokens"] == sum(lengths) - 68 * len(texts)
    assert facts["document_tokens"]["mean"] == pytest.approx(np.mean(lengths))
    assert facts["formats"] == {"JPEG": len(texts)}
    assert facts["labels"]["kind"]["images"] == len(texts)
    assert set(facts["labels"]) == {"kind", "number"}
    assert set(facts["labels"]["kind"]["most"]) == set(KINDS)
    assert set(facts["held_whole_by_row_of"].values()) == {1.0}
    out = capsys.readouterr().out
    assert "label kind" in out
    assert "100% with text before them" in out


def test_the_fraction_of_documents_that_a_row_holds_is_that_of_their_lengths(tmp_path):
    words = [3, 30, 300, 3000]
    members = [(f"{n}.json", json.dumps({"texts": ["abc " * n], "images": [None]}).encode()) for n in words]
    members.append(("bad.json", b"{"))
    contents = measure(Source("s", [index_shard(write_tar(tmp_path / "a.tar", members))]))
    assert contents.lengths(0).tolist() == [5, 32, 302, 3002]
    assert [contents.held_by(row, 0) for row in (4, 5, 32, 400, 4000)] == [0, 0.25, 0.5, 0.75, 1]
    assert contents.left_out == {"json that cannot be parsed": 1}


def test_the_recipe_fits_what_was_measured_and_names_what_can_be_evaluated(built, monkeypatch):
    monkeypatch.chdir(built)  # its paths are those of the command that wrote it
    config = load_config(built / "mine.yaml")
    data = open_checked_data(config)
    settings = lane_settings(config)
    contents = measure(data.sources[0], data.tokenizer)
    assert contents.held_by(config.data.row_tokens, settings.image_tokens) == 1
    in_row = config.data.row_tokens / contents.lengths(settings.image_tokens).mean()
    assert in_row <= config.data.row_images <= 1.25 * in_row + 1
    assert config.data.lanes == 1
    assert config.evaluation.shards == "shards/mine/heldout/*.tar"
    assert config.evaluation.probe_labels == ["kind"]  # a number for every image is no class
    assert config.train.warmup_steps < config.train.steps


def test_every_weight_learns_from_the_first_step_of_the_recipe(built, monkeypatch):
    monkeypatch.chdir(built)
    config = load_config(built / "mine.yaml")
    data = open_checked_data(config)
    batch = next(BatchLoader(data.sources, lane_settings(config), data.tokenizer, config.train.global_batch_rows))
    objective = attach_objective(
        build_model(config.model, data.tokenizer.vocabulary.size, config.data.longest_document, seed=0), config
    )
    objective(batch, *local_normalizers(objective, batch))["loss"].backward()
    assert all(weight.grad is not None for weight in objective.parameters() if weight.requires_grad)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_size_gives_a_valid_recipe(size, built, tmp_path):
    tokenizer = str(built / "mine-tokenizer")
    out = tmp_path / "other.yaml"
    command = ["init", str(built / "shards" / "mine" / "*.tar"), str(out), "--size", size, "--tokenizer", tokenizer]
    assert main(command) == 0
    config = load_config(out)
    assert config.name == "other"
    assert config.data.tokenizer == tokenizer
    assert not (tmp_path / "other-tokenizer").exists()
    assert config.precision == ("fp32" if size == "tiny" else "bf16")
    image = {"tiny": 64, "small": 196, "base": 196}[size]
    assert config.data.row_images * (image + 2) <= config.data.row_tokens


def test_what_a_recipe_lacks_is_said(tmp_path, demo_folder, capsys):
    record = b'{"texts": [null, "a"], "images": ["0.jpg", null]}'
    members = [(f"{n}.{s}", d) for n in range(8) for s, d in (("json", record), ("0.jpg", picture(n)))]
    shard = write_tar(tmp_path / "a.tar", members)
    assert main(["init", str(shard), str(tmp_path / "a.yaml"), "--tokenizer", str(demo_folder / "tokenizer")]) == 0
    out = capsys.readouterr().out
    assert "only 0 of 8 images have text before them" in out
    assert "8 images are few" in out
    assert "nothing is evaluated: build with --holdout" in out
    assert load_config(tmp_path / "a.yaml").evaluation.shards is None
    silent = [(f"{n}.json", b'{"texts": [null], "images": ["0.jpg"]}') for n in range(8)]
    silent += [(f"{n}.0.jpg", picture(n)) for n in range(8)]
    shard = write_tar(tmp_path / "b.tar", sorted(silent))
    assert main(["init", str(shard), str(tmp_path / "b.yaml")]) == 0
    assert "there is no text, so nothing trains the encoder" in capsys.readouterr().out


def test_mistakes_are_named_and_nothing_is_written_over(built, tmp_path, capsys):
    shards = str(built / "shards" / "mine" / "*.tar")

    def error_of(*arguments):
        assert main(["init", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    before = (built / "mine.yaml").read_text()
    assert "mine.yaml: exists already" in error_of(shards, built / "mine.yaml")
    assert (built / "mine.yaml").read_text() == before
    assert "a recipe's name ends in .yaml" in error_of(shards, tmp_path / "mine")
    assert "--tokenizer: no tokenizer at" in error_of(shards, tmp_path / "x.yaml", "--tokenizer", tmp_path / "none")
    assert "no such file" in error_of(tmp_path / "none.tar", tmp_path / "x.yaml")
    folder = built / "shards" / "mine"
    assert f"it is a folder; name its shards, as in '{folder}/*.tar'" in error_of(folder, tmp_path / "x.yaml")
    bad = write_tar(tmp_path / "bad.tar", [("x.json", b"{")])
    assert "no sample can be used: json that cannot be parsed (1)" in error_of(bad, tmp_path / "x.yaml")
    assert not list(tmp_path.glob("x*"))


def test_inspect_shows_rows_of_ones_own_shards_and_recipe(built, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(built)  # no demo corpus lies here
    shards = "shards/mine/*.tar"
    assert main(["inspect", shards, "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "on a sofa" in shown
    assert "64x64" in shown
    assert main(["inspect", "--recipe", str(built / "mine.yaml"), "--rows", "1", "--html", "rows.html"]) == 0
    assert "mine.yaml, as lcl sees it" in Path("rows.html").read_text()
    assert (
        main(["inspect", shards, "--recipe", str(built / "mine.yaml"), "--rows", "1", "--set", "data.row_tokens=256"])
        == 0
    )
    assert main(["inspect"]) == 2
    assert "name shards, or the recipe" in capsys.readouterr().err
