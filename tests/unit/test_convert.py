"""A release: what is in the folder, that it loads elsewhere, and that nothing keeps a trained model from it."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lcl_ds.convert import main
from lcl_ds.errors import UserError
from lcl_ds.models.vision import family_inputs, released_patch_tokens
from lcl_ds.release.origin import WeightOrigin, _damage_named, _pixels_of
from lcl_ds.release.vision import release_vision
from tests.support.corpora import picture
from tests.support.disks import no_file_larger_than
from tests.support.golden import GOLDEN, Golden
from tests.support.small import IMAGE_SIZE, VISION_TOWERS, shake, small_config, small_model
from tests.support.tars import write_tar

TRANSFORMERS_4_57 = json.loads((Path(GOLDEN["documents"]).parent / "transformers_4_57_weights.json").read_text())
"""Names and shapes of the weights that transformers 4.57.6 builds for the towers of tests/small.py."""


def release(family: str, folder: Path, **origin):
    """A small encoder of which every weight was moved, released."""
    model = small_model(small_config(f"model.vision={VISION_TOWERS[family]}")).eval()
    shake(model.vision, model.pooling)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    release_vision(model, WeightOrigin("small", "", {}, pixels, "images of noise"), folder)
    return model, model.vision.normalize(torch.from_numpy(pixels))


@pytest.mark.parametrize("family", VISION_TOWERS)
def test_the_weights_are_named_as_transformers_4_and_5_read_them(family, tmp_path):
    model, images = release(family, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {name: list(weight.shape) for name, weight in weights.items()} == TRANSFORMERS_4_57[family]
    released, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        assert torch.equal(released_patch_tokens(released.eval(), images), model.vision(images))


READ_IN_TRANSFORMERS_4 = """
import sys, torch, transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel
folder, weights = sys.argv[1:]
assert transformers.__version__.startswith("4."), transformers.__version__
given = torch.load(weights)
of_family = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel",
             "siglip2_vision_model": "Siglip2VisionModel", "dinov2": "Dinov2Model"}
family = AutoConfig.from_pretrained(folder).model_type
for loader in (AutoModel, getattr(transformers, of_family[family])):
    model, loading = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        outputs = model.eval()(**given["inputs"])
    patches = outputs.last_hidden_state[:, -given["features"].shape[1] :]
    if family == "clip_vision_model":
        patches = getattr(model, "vision_model", model).post_layernorm(patches)
    assert (outputs.pooler_output is None) == family.startswith("siglip"), "a pooling head that was never trained"
    torch.testing.assert_close(patches, given["features"], rtol=1e-4, atol=1e-5)
model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, trust_remote_code=True)
assert not any(loading.values()), loading
with torch.no_grad():
    outputs = model(**given["inputs"])
torch.testing.assert_close(outputs.last_hidden_state, given["features"], rtol=1e-4, atol=1e-5)
torch.testing.assert_close(outputs.pooler_output, given["pooled"], rtol=1e-4, atol=1e-5)
AutoImageProcessor.from_pretrained(folder)
"""


@pytest.mark.parametrize("family", VISION_TOWERS)
def test_with_the_code_beside_it_the_release_gives_tokens_and_pooling_as_they_were_trained(family, tmp_path):
    model, images = release(family, tmp_path)
    released, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True, trust_remote_code=True)
    assert not any(loading.values()), loading
    assert type(released).__name__ == "LclVisionModel"
    with torch.no_grad():
        outputs, patches = released(**family_inputs(released, images)), model.vision(images)
        assert torch.equal(outputs.last_hidden_state, patches)
        torch.testing.assert_close(outputs.pooler_output, model.pooling(patches)[0], rtol=1e-5, atol=1e-5)
    half = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    released.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**family_inputs(again, images)).pooler_output, outputs.pooler_output)


@pytest.mark.skipif("TRANSFORMERS_4" not in os.environ, reason="TRANSFORMERS_4 names no folder with transformers 4.57")
@pytest.mark.parametrize("family", VISION_TOWERS)
def test_the_release_loads_in_transformers_4_itself(family, tmp_path):
    """``pip install --target FOLDER 'transformers==4.57.*'``, then ``TRANSFORMERS_4=FOLDER``."""
    model, images = release(family, tmp_path)
    with torch.no_grad():
        features = model.vision(images)
        pooled, _ = model.pooling(features)
    inputs = {"pixel_values": images}
    if family == "siglip2_vision_model":
        patches = images.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes, mask = torch.tensor([[2, 2]]).expand(3, -1), torch.ones(3, 4, dtype=torch.int64)
        inputs = {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}
    torch.save({"inputs": inputs, "features": features, "pooled": pooled}, tmp_path / "given.pt")
    command = [sys.executable, "-c", READ_IN_TRANSFORMERS_4, str(tmp_path), str(tmp_path / "given.pt")]
    environment = {**os.environ, "PYTHONPATH": os.environ["TRANSFORMERS_4"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


def test_the_card_shows_code_that_gives_the_features(tmp_path):
    model, images = release("clip_vision_model", tmp_path)
    code = (tmp_path / "README.md").read_text().split("patches = ")[2].split("  #")[0]
    released = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        patches = eval(code, {"model": released, "outputs": released(pixel_values=images)})
        torch.testing.assert_close(patches, model.vision(images), rtol=1e-4, atol=1e-5)


def test_an_encoder_whose_features_are_not_finite_is_refused(tmp_path):
    model = small_model().eval()
    next(model.vision.parameters()).data.fill_(float("nan"))
    pixels = np.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    with pytest.raises(UserError, match="not finite"):
        release_vision(model, WeightOrigin("small", "", {}, pixels, "noise"), tmp_path)


def document(key, *images):
    """An interleaved document; an image is its bytes."""
    names = [f"{number}.jpg" for number in range(len(images))]
    record = {"texts": ["a text", *[None] * len(images)], "images": [None, *names]}
    members = [(f"{key}.{name}", data) for name, data in zip(names, images, strict=True)]
    return [(f"{key}.json", json.dumps(record).encode()), *members]


def pictures_of(*overrides):
    pixels, kind = _pixels_of(small_config(*overrides), IMAGE_SIZE)
    assert pixels.shape[1:] == (3, IMAGE_SIZE, IMAGE_SIZE)
    return len(pixels), kind


def test_parity_pictures_pass_over_what_cannot_be_read_and_look_into_further_shards_and_sources(tmp_path):
    damaged = write_tar(tmp_path / "a.tar", [*document("0", picture(0)[:40]), ("1.json", b"{"), *document("2")])
    good = write_tar(tmp_path / "b.tar", [*document("0", picture(1)[:40], picture(2)), *document("1", picture(3))])
    pairs = write_tar(tmp_path / "c.tar", [("0.jpg", picture(4)), ("0.txt", b"a caption"), ("1.jpg", b"no image")])
    (tmp_path / "d.tar").write_bytes(b"no tar")
    shards = f"[{{name: a, paths: [{damaged}, {tmp_path}/d.tar, {good}]}}, {{name: b, paths: {pairs}}}]"
    # A document is read up to its first damaged image.
    assert pictures_of(f"evaluation.shards={damaged}", f"data.shards={shards}") == (2, "real images")


def test_without_a_picture_noise_is_compared(tmp_path):
    text_only = write_tar(tmp_path / "a.tar", document("0"))
    count, kind = pictures_of(f"evaluation.shards={tmp_path}/gone.tar", f"data.shards={text_only}")
    assert (count, kind.split(" (")[0]) == (16, "images of noise")


@pytest.mark.parametrize(
    "paths", ["pipe:{command}", "'{{pipe:{command},{folder}/none.tar}}'", "[{folder}/list.txt, 'pipe:{command}']"]
)
def test_commands_in_the_settings_of_a_run_are_not_executed(tmp_path, paths):
    ran = tmp_path / "ran"
    (tmp_path / "list.txt").write_text(f"pipe:touch {ran}\n")
    paths = paths.format(command=f"touch {ran}", folder=tmp_path)
    _, kind = pictures_of(f"evaluation.shards={paths}", f"data.shards=[{{name: a, paths: {paths}}}]")
    assert "noise" in kind
    assert not ran.exists()


def test_addresses_in_the_settings_of_a_run_are_not_asked(monkeypatch):
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda *_, **__: pytest.fail("something was fetched"))
    paths = "[http://localhost:9/a.tar, 's3://bucket/*.tar', 'http://localhost:9/list.txt']"
    assert "noise" in pictures_of(f"evaluation.shards={paths}", f"data.shards=[{{name: a, paths: {paths}}}]")[1]


@pytest.fixture
def published(tmp_path):
    """Arguments that convert a small checkpoint of the published code."""
    golden = Golden(GOLDEN["documents"])
    save_file(golden.weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(golden.config))
    return ["--from", "reference", str(tmp_path / "model.safetensors"), "--config", str(tmp_path / "config.json")]


LAYOUTS = pytest.mark.parametrize("layout", [[], ["--part", "full"], ["--format", "reference"]], ids=str)


@LAYOUTS
@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_may_be_read_by_whom_the_umask_lets(published, tmp_path, layout, umask):
    before = os.umask(umask)
    try:
        assert main([*published, str(tmp_path / "out"), *layout]) == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("layout", [[], ["--part", "full"], ["--format", "reference"], ["--format", "torch"]], ids=str)
def test_a_disk_without_room_is_a_sentence_and_leaves_nothing_behind(published, tmp_path, layout, capsys):
    with no_file_larger_than(20_000):
        assert main([*published, str(tmp_path / "new" / "deep" / "out"), *layout]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the file would be larger than the system allows" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_an_out_that_is_a_file_or_in_use_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "something").touch()
    for name, problem in (("file", "is a file"), ("used", "is not empty"), ("file/out", "is a file and no folder")):
        assert main([str(tmp_path / "no run"), str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert problem in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "something", "used"]


@LAYOUTS
@pytest.mark.parametrize("name", [b"caf\xe9", b"[1] {2} *?", b"new\nline"], ids=str)
def test_a_release_may_be_called_anything(published, tmp_path, layout, name):
    out = tmp_path / os.fsdecode(name)
    assert main([*published, str(out), *layout]) == 0
    assert (out / "model.safetensors").is_file()
    assert out.is_dir()
    assert not out.is_symlink()


def test_an_empty_folder_becomes_the_release_even_as_a_dot(published, tmp_path, monkeypatch):
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path / "encoder")
    assert main([*published, "."]) == 0
    assert 'from_pretrained("encoder")' in (tmp_path / "encoder" / "README.md").read_text()


@pytest.mark.parametrize("error", [KeyError("progress"), RuntimeError("file in archive\nis cut"), ValueError("yaml")])
def test_whatever_a_damaged_checkpoint_makes_its_readers_say_is_one_sentence(tmp_path, error):
    with pytest.raises(UserError) as raised, _damage_named(tmp_path / "step_1"):
        raise error
    (sentence,) = raised.value.problems
    assert sentence.startswith(f"{tmp_path / 'step_1'}: is damaged and cannot be read ({type(error).__name__}: ")
    assert "\n" not in sentence


def test_full_disks_and_mistakes_of_ours_are_not_taken_for_damage(tmp_path):
    with pytest.raises(OSError), _damage_named(tmp_path):  # noqa: PT011
        raise OSError(errno.ENOSPC, "no space")
    with pytest.raises(MemoryError), _damage_named(tmp_path):
        raise MemoryError
