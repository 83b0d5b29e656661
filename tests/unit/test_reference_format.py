"""Checkpoints of the published code, in and out: ``python -m lcl_ds.convert --from reference``."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from lcl_ds.convert import main
from lcl_ds.errors import UserError
from lcl_ds.models.reference import load_reference, read_reference_config
from lcl_ds.models.vision import released_patch_tokens
from tests.unit.test_reference_parity import GOLDEN, Golden


@pytest.fixture
def golden():
    return Golden(GOLDEN["documents"])


@pytest.fixture
def config_file(golden, tmp_path):
    path = tmp_path / "LCL_tiny.json"
    path.write_text(json.dumps(golden.config))
    return path


def convert(*arguments) -> int:
    return main(["--from", "reference", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["plain", "module", "nested", "safetensors"])
def test_every_kind_of_file_becomes_the_same_encoder(golden, config_file, tmp_path, kind, capsys):
    source = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    match kind:
        case "safetensors":
            save_file(golden.weights, source)
        case "plain":
            torch.save(golden.weights, source)
        case "module":
            torch.save({f"module.{name}": weight for name, weight in golden.weights.items()}, source)
        case "nested":
            torch.save({"epoch": 3, "state_dict": golden.weights}, source)
    assert convert(source, "--config", config_file, tmp_path / "out") == 0
    assert "max abs difference 0.0e+00 over 16 images of noise" in capsys.readouterr().out
    encoder = CLIPVisionModel.from_pretrained(tmp_path / "out").eval()
    model = load_reference(golden.weights, golden.config)
    with torch.no_grad():
        pixels = golden.batch["images"]
        assert torch.equal(released_patch_tokens(encoder, pixels), model.vision(pixels))


def test_the_published_layout_comes_out_as_it_went_in(golden, config_file, tmp_path):
    save_file(golden.weights, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    assert convert(tmp_path / "model.safetensors", out, "--config", config_file, "--format", "reference") == 0
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == golden.weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in golden.weights.items())
    written = read_reference_config(json.loads((out / "config.json").read_text()))
    assert written == read_reference_config(golden.config)


def test_names_and_shapes_that_do_not_fit_are_all_listed(golden):
    weights = dict(golden.weights)
    weights["visual.proj"] = weights.pop("visual.conv1.weight")
    weights["text.text_projection"] = torch.zeros(3, 3)
    with pytest.raises(UserError) as error:
        load_reference(weights, golden.config)
    assert error.value.problems == [
        "state dict: text.text_projection is [3, 3], the configuration says [48, 48]",
        "state dict: visual.conv1.weight is missing",
        "state dict: visual.proj is not part of the model",
    ]


class Payload:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [Payload(), {"state_dict": [1, 2]}, 5])
def test_nothing_but_tensors_is_read(content, config_file, tmp_path, capsys):
    torch.save(content, tmp_path / "model.pt")
    assert convert(tmp_path / "model.pt", tmp_path / "out", "--config", config_file) == 2
    printed = capsys.readouterr()
    assert "model.pt" in printed.err
    assert "executed" not in printed.out
    assert not (tmp_path / "out").exists()


def test_mistakes_are_sentences(golden, config_file, tmp_path, capsys):
    save_file(golden.weights, tmp_path / "model.safetensors")
    source, out = tmp_path / "model.safetensors", tmp_path / "out"
    assert convert(source, out) == 2
    assert "--from reference needs --config" in capsys.readouterr().err
    assert convert(source, out, "--config", source) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"vision_cfg": {}}')
    assert convert(source, out, "--config", tmp_path / "other.json") == 2
    assert "other.json: not a configuration of the published LCL: 'text_cfg' is missing" in capsys.readouterr().err
    assert convert(source, out, "--config", config_file, "--format", "reference", "--part", "vision") == 2
    assert "leave out --part vision" in capsys.readouterr().err
