"""A trained run becomes a folder that transformers loads by itself."""

import json
import logging
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPVisionModel

from lcl_ds.convert import main
from lcl_ds.metrics import read_metrics
from lcl_ds.models.vision import normalize_images
from lcl_ds.training.checkpoint import load_model, resolve_checkpoint
from tests.support.pages import blocks_of
from tests.support.ranks import ROOT


@pytest.fixture(scope="module")
def released(whole_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("released") / "out"
    assert main([str(whole_run), str(out)]) == 0
    return out


def test_it_loads_without_warnings_and_computes_the_same_features(whole_run, released, caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = CLIPVisionModel.from_pretrained(released).eval()
    assert caplog.text == ""
    model = load_model(resolve_checkpoint(whole_run))
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = normalize_images(images, torch.float32)
    with torch.no_grad():
        theirs = encoder.post_layernorm(encoder(pixel_values=pixels).last_hidden_state)[:, 1:]
        ours = model.vision(pixels)
    assert (ours - theirs).abs().max() <= 1e-5


def test_its_processor_prepares_pixels_as_in_training(released):
    processor = AutoImageProcessor.from_pretrained(released)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    theirs = processor(images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")
    torch.testing.assert_close(theirs["pixel_values"], normalize_images(images, torch.float32), rtol=1e-4, atol=1e-5)


def test_the_model_card_says_what_was_checked_trained_and_measured(whole_run, released):
    card = ModelCard.load(released / "README.md")
    assert "step 30 of 30" in card.text
    assert "real images" in card.text
    assert "train:\n" in card.text
    rows = read_metrics(whole_run)
    images, tokens = (sum(row[key] for row in rows) for key in ("images", "tokens"))
    assert f"Seen: {images:,} images and {tokens:,} tokens" in card.text
    assert "on 2 processes on a CPU" in card.text
    figures = json.loads((whole_run / "evaluation.json").read_text())["figures"]
    assert [figure.metric_value for figure in card.data.eval_results] == [figure["value"] for figure in figures]
    with safe_open(released / "model.safetensors", "pt") as opened:
        assert (opened.metadata()["step"], opened.metadata()["images_seen"]) == ("30", str(images))
    assert json.loads((released / "config.json").read_text())["model_type"] == "clip_vision_model"


def test_no_file_of_it_says_where_the_run_or_its_data_lie(whole_run, recipe, released):
    argv = json.loads((whole_run / "environment.json").read_text())["argv"]
    for file in released.iterdir():
        for place in (str(recipe.parent), str(whole_run.parent), *argv, str(ROOT)):
            assert place.encode() not in file.read_bytes(), (file, place)


def test_the_parity_check_is_printed(whole_run, tmp_path, capsys):
    assert main([str(whole_run / "checkpoints" / "step_00000025"), str(tmp_path / "out")]) == 0
    assert "parity with the training model: max abs difference 0.0e+00 over 16 real images" in capsys.readouterr().out


@pytest.fixture(scope="module")
def whole(whole_run, released):
    out = released.parent / "whole"
    assert main([str(whole_run), str(out), "--part", "full"]) == 0
    return out


def test_the_code_on_the_page_about_releases_runs(released, whole, monkeypatch):
    monkeypatch.chdir(released.parent)
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks_of(ROOT / "docs" / "release.md"):
        if block.language == "python":
            exec(block.text, names)
    assert names["features"].shape == (1, 32)
    assert names["patches"].shape == (1, 16, 32)
    torch.testing.assert_close(names["tower"].post_layernorm(names["states"][:, 1:]), names["patches"])
    assert names["similarity"].shape == (2, 2)
    assert len(names["captions"]) == 2
    assert names["loss"].isfinite()
    tower = names["llava"].model.vision_tower
    assert torch.equal(tower.post_layernorm.weight, names["tower"].post_layernorm.weight)


def test_the_full_part_holds_every_weight(whole_run, whole):
    weights = load_file(whole / "model.safetensors")
    model = load_model(resolve_checkpoint(whole_run))
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("what", ["nothing", "used"])
def test_mistakes_are_sentences(whole_run, tmp_path, capsys, what):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    source = tmp_path / "nothing" if what == "nothing" else whole_run
    assert main([str(source), str(tmp_path / ("new" if what == "nothing" else "used"))]) == 2
    expected = "neither a complete checkpoint nor a run" if what == "nothing" else "is not empty"
    assert expected in capsys.readouterr().err


def test_a_model_that_the_published_format_cannot_hold_is_refused(whole_run, tmp_path, capsys):
    assert main([str(whole_run), str(tmp_path / "out"), "--format", "reference"]) == 2
    assert "the published format has a CLIP vision tower and a GPT-2 decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
