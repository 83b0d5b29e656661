"""The command: every kind of pictures and models it takes, and a sentence about everything it cannot take."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

from lcl_ds.evaluate import main
from lcl_ds.evaluation import finetune as finetuning
from lcl_ds.evaluation.encoder import open_released
from lcl_ds.evaluation.features import features_of
from lcl_ds.evaluation.finetune import FinetuneSettings, finetune
from lcl_ds.evaluation.pictures import decoded, has_train_side, open_pictures
from tests.support.tars import write_tar

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
COUNT = 12
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of three classes, and tables and caption files about it."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / "folder" / name).mkdir(parents=True)
        for i in range(COUNT):
            noisy = np.clip(np.array(colour) + rng.integers(-40, 40, (20, 24, 3)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(root / "folder" / name / f"{i:02}.png")
    (root / "folder" / "red" / "99.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (root / "folder" / "notes.txt").write_text("about the folder")  # beside the classes: no picture is expected there
    files = [(f"{name}/{i:02}.png", name) for name in COLOURS for i in range(COUNT)]
    table = "".join(f"folder/{path},{name},{i % 2}\n" for i, (path, name) in enumerate(files))
    (root / "labels.csv").write_text(f"path,label,parity\n{table}folder/gone.png,red,0\n")
    captions = "".join(f"folder/{path}\ta {name} thing\nfolder/{path}\tall {name}\n" for path, name in files)
    (root / "captions.tsv").write_text(f"filename\tcaption\n{captions}")
    images = [{"id": i, "file_name": path} for i, (path, _) in enumerate(files)]
    annotations = [{"image_id": i % 36, "caption": f"caption {i}"} for i in range(180)]
    (root / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    split = [
        {"filename": path, "split": ("train", "val", "test")[i % 3], "sentences": [{"raw": "a"}, {"raw": "b"}]}
        for i, (path, _) in enumerate(files)
    ]
    (root / "flickr.json").write_text(json.dumps({"images": split}))
    members = [(f"{i:03}.png", (root / "folder" / path).read_bytes()) for i, (path, _) in enumerate(files)]
    members += [(f"{i:03}.txt", name.encode()) for i, (_, name) in enumerate(files)]
    members += [(f"{i:03}.json", json.dumps({"label": n, "url": str(i)}).encode()) for i, (_, n) in enumerate(files)]
    write_tar(root / "pairs.tar", sorted(members))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES)).save_pretrained(folder)
    return folder


def evaluate(*arguments, cache):
    return main([*map(str, arguments), "--cache", str(cache)])


@pytest.mark.parametrize(("data", "images"), [("folder", None), ("labels.csv", None), ("pairs.tar", None)])
def test_labelled_pictures_of_any_kind_are_probed(pictures, model, tmp_path, capsys, data, images):
    report = tmp_path / "report.json"
    arguments = [model, "--task", "linear", "knn", "--data", pictures / data, "--label", "label", "--json", report]
    assert evaluate(*arguments, cache=tmp_path) == 0
    tree = json.loads(report.read_text())
    assert [(f["task"], f["features"], f["count"], f["classes"]) for f in tree["figures"]] == [
        (task, kind, COUNT, 3) for task in ("linear", "knn") for kind in ("mean", "class")
    ]
    for figure in tree["figures"]:
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["value"] > 0.9  # colours are easy
    left_out = {"folder": 1, "labels.csv": 1, "pairs.tar": 0}[data]
    assert len(tree["notes"]) == left_out
    assert "95 % interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "count", "captions"),
    [("captions.tsv", 36, 72), ("coco.json", 36, 180), ("flickr.json", 12, 24), ("pairs.tar", 36, 36)],
)
def test_captioned_pictures_of_any_kind_are_read(pictures, tmp_path, data, count, captions):
    images = pictures / "folder" if data.endswith("json") else None
    found = open_pictures([str(pictures / data)], images, tmp_path)
    assert (len(found.pictures), sum(len(picture.captions) for picture in found.pictures)) == (count, captions)
    numbers, pixels = next(decoded(found.pictures, 16, 64, found.left_out))
    assert (len(numbers), pixels.shape, dict(found.left_out)) == (count, (count, 3, 16, 16), {})


def test_a_table_of_any_program_is_read(pictures, tmp_path):
    rows = [row.split(",") for row in (pictures / "labels.csv").read_text().splitlines()]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(";".join(row) for row in [*rows, ["too", "many", "cells", "here"]]), encoding="utf-16")
    expected = open_pictures([str(pictures / "labels.csv")], None, tmp_path)
    found = open_pictures([str(table)], pictures, tmp_path)
    assert [(p.name, p.labels) for p in found.pictures] == [(p.name, p.labels) for p in expected.pictures]
    assert sorted(found.left_out.values()) == [1, 1]  # the picture that is gone, and the line with too many cells


def test_a_file_that_says_so_has_a_side_for_training(pictures, tmp_path):
    def names(side):
        found = open_pictures([str(pictures / "flickr.json")], pictures / "folder", tmp_path, side=side)
        return {picture.name for picture in found.pictures}

    assert has_train_side([str(pictures / "flickr.json")])
    assert not has_train_side([str(pictures / "coco.json")])
    assert not has_train_side([str(pictures / "folder")])
    assert (len(names("train")), len(names("test")), names("train") & names("test")) == (12, 12, set())


def test_features_are_kept_until_model_or_picture_changes(pictures, model, tmp_path):
    found = open_pictures([str(pictures / "folder")], None, tmp_path)
    encoder = open_released(str(model))
    first = features_of(encoder, found, tmp_path)
    assert first.left_out == {"a damaged image": 1}
    (kept,) = (tmp_path / "features").iterdir()
    kept_at = kept.stat().st_mtime_ns
    again = features_of(encoder, found, tmp_path)
    assert all(torch.equal(again.vectors[kind], first.vectors[kind]) for kind in first.vectors)
    assert (kept.stat().st_mtime_ns, again.left_out) == (kept_at, first.left_out)
    kept.write_bytes(b"damaged")
    assert torch.equal(features_of(encoder, found, tmp_path).vectors["mean"], first.vectors["mean"])
    next(encoder.module.parameters()).data.add_(1)
    features_of(encoder, found, tmp_path)
    assert len([*(tmp_path / "features").iterdir()]) == 2


def test_the_same_weights_in_another_architecture_are_another_encoder(model, tmp_path):
    identities = {open_released(str(model)).identity()}
    config = json.loads((model / "config.json").read_text())
    for key, value in (("hidden_act", "quick_gelu"), ("num_attention_heads", 4), ("layer_norm_eps", 1e-3)):
        other = tmp_path / key
        shutil.copytree(model, other)
        (other / "config.json").write_text(json.dumps(config | {key: value}))
        identities.add(open_released(str(other)).identity())
    assert len(identities) == 4


def test_a_process_without_a_part_of_the_last_batch_takes_part_in_it_all_the_same(pictures, tmp_path, monkeypatch):
    found = open_pictures([str(pictures / "labels.csv")], None, tmp_path)
    monkeypatch.setattr(finetuning, "own_part", lambda rows: rows[1::2])  # of the second of two processes
    settings = FinetuneSettings(batch_size=8)
    batches = finetuning._batches(found.pictures, torch.arange(17), 16, settings, epoch=0)
    assert [(len(rows), len(images)) for rows, images in batches] == [(4, 4), (4, 4), (0, 0)]


def test_a_released_model_gives_the_states_of_its_own_class(tmp_path):
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**SIZES)).save_pretrained(tmp_path)
    reference = SiglipVisionModel.from_pretrained(tmp_path).eval()
    encoder = open_released(str(tmp_path))
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vectors = encoder.encode(pixels).vectors()
        outputs = reference(pixel_values=(pixels / 255 - 0.5) / 0.5)
    torch.testing.assert_close(vectors["mean"], outputs.last_hidden_state.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors["head"], outputs.pooler_output, rtol=1e-4, atol=1e-5)


def test_fine_tuning_trains_and_leaves_the_encoder_as_it_was(pictures, model, tmp_path):
    found = open_pictures([str(pictures / "labels.csv")], None, tmp_path)
    encoder = open_released(str(model))
    classes = torch.tensor([[*COLOURS].index(picture.labels["label"]) for picture in found.pictures])
    train, test = torch.arange(36)[torch.arange(36) % 3 > 0], torch.arange(0, 36, 3)
    before = encoder.identity()
    settings = FinetuneSettings(epochs=8, batch_size=8, learning_rate=3e-3)
    hits = finetune(encoder, found.pictures, classes, train, test, settings)
    assert hits.float().mean() > 0.6
    assert encoder.identity() == before
    encoder.module.to(torch.bfloat16)
    before = encoder.identity()
    finetune(encoder, found.pictures, classes, train[:8], test, FinetuneSettings(epochs=1), bf16=True)
    assert encoder.identity() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "{p}/gone"], "no such file"),
        (["--data", "{p}/coco.json", "--images", "{p}/folder"], "no picture has a label"),
        (["--data", "{p}/coco.json"], "name their folder with --images"),
        (["--data", "{p}/labels.csv", "--label", "labl"], "did you mean 'label'?"),
        (["--data", "{p}/pairs.tar", "--label", "url"], "with 0 classes in both"),
        (["--data", "{p}/folder", "--features", "head"], "has none of them; it has mean, class"),
        (["--data", "{p}/folder", "--ema"], "neither a run nor a checkpoint"),
        (["--data", "{p}/two", "--train_data", "{p}/folder"], "1 of its 2 classes of the label 'label' are not among"),
        (["--data", "{p}/broken"], "no picture can be read: a damaged image (1)"),
        (["--data", "{p}/folder", "--task", "zeroshot"], "has no decoder, which reads texts"),
        (["--data", "{p}/folder", "--task", "zeroshot", "--prompts", "a"], "lacks {{}}"),
        (["--data", "{p}/folder", "--json", "{p}"], "is a folder; name a file"),
        (["--data", "{p}/folder", "--device", "gpu"], "--device gpu: "),
        ([], "--data: is missing"),
    ],
)  # fmt: skip
def test_whatever_is_wrong_is_one_sentence(pictures, model, tmp_path, capsys, arguments, sentence):
    for name in ("red", "purple"):
        (pictures / "two" / name).mkdir(parents=True, exist_ok=True)
        for i in range(COUNT):
            (pictures / "two" / name / f"{i}.png").write_bytes((pictures / "folder/red/00.png").read_bytes())
    (pictures / "broken" / "a").mkdir(parents=True, exist_ok=True)
    (pictures / "broken" / "a" / "x.jpg").write_bytes(b"\xff\xd8\xff")
    given = [argument.format(p=pictures) for argument in arguments]
    task = [] if "--task" in given else ["--task", "linear"]
    assert evaluate(model, *task, *given, cache=tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert sentence.format() in err


def rename_weights(path):
    save_file({f"other.{name}": weight for name, weight in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "is no vision encoder"),
        (lambda folder: rename_weights(folder / "model.safetensors"), "weights are missing, as embeddings.cls_token"),
        (lambda folder: (folder / "model.safetensors").unlink(), "nor a vision model that transformers loads"),
        (lambda folder: ViTModel(ViTConfig(**{**SIZES, "image_size": 32})).config.save_pretrained(folder), "nor a"),
    ],
    ids=["text", "weights of other names", "no weights", "other sizes"],
)
def test_a_wrong_model_is_one_sentence(pictures, tmp_path, capsys, break_it, sentence):
    ViTModel(ViTConfig(**SIZES)).save_pretrained(tmp_path / "model")
    break_it(tmp_path / "model")
    assert evaluate(tmp_path / "model", "--task", "linear", "--data", pictures / "folder", cache=tmp_path) == 2
    assert sentence in capsys.readouterr().err
