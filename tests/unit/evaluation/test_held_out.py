"""Held-out shards of any shape: what the check before training lets pass is evaluated, and the rest is named."""

import json
import zlib
from pathlib import Path

import pytest
import torch

from lcl_ds.data.corpora.build import build
from lcl_ds.data.corpora.record import ReadOptions
from lcl_ds.data.documents import read_document, read_labels
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.errors import UserError
from lcl_ds.evaluation import final
from lcl_ds.evaluation.check import check_held_out
from lcl_ds.evaluation.final import evaluate_model, final_table
from lcl_ds.evaluation.tasks import Trained, document_retrieval
from lcl_ds.models.build import build_model
from lcl_ds.objectives import NAMES
from lcl_ds.report.evaluation import probe_kinds, shown_evaluation
from lcl_ds.report.examples import Examples
from lcl_ds.report.run import read_runs
from lcl_ds.tokens import TextTokenizer
from tests.support.corpora import picture
from tests.support.runs import make_run
from tests.support.small import small_config
from tests.support.tars import write_tar

CONTRASTIVE = ("blip2", "clip", "coca", "lcl", "siglip")
COLOURS = ("red", "blue")


def document(key, texts=("a text", None), images=(None, "0.jpg"), data=None, **lists):
    """Members of one document; ``data`` gives its images' bytes, by default sound ones."""
    names = [name for name in images if name]
    data = data if data is not None else [picture(zlib.crc32(f"{key}{name}".encode())) for name in names]
    record = json.dumps({"texts": texts, "images": images, **lists}).encode()
    return [(f"{key}.json", record), *((f"{key}.{n}", d) for n, d in zip(names, data, strict=False))]


def labelled(count=48, **lists):
    """Documents with one image each, whose colours and kinds take turns."""
    return [
        document(f"{i:03}", labels=[None, {"colour": COLOURS[i // 3 % 2], "kind": i // 3 % 2, "rare": None}], **lists)
        for i in range(count)
    ]


def pairs(count=30, **json_keys):
    members = [[(f"p{i:03}.jpg", picture(i)), (f"p{i:03}.txt", b"a caption")] for i in range(count)]
    if json_keys:
        for i, sample in enumerate(members):
            record = {
                "caption": "a caption",
                "width": 32,
                "status": "success",
                **json_keys,
                "class": COLOURS[i // 3 % 2],
            }
            sample.append((f"p{i:03}.json", json.dumps(record).encode()))
    return members


def built(folder):
    """What ``lcl_ds.data build`` makes of documents with labels."""
    source = write(folder / "source.tar", labelled(20))
    build([source], folder / "out", "shards", ReadOptions())
    return folder / "out" / "*.tar"


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, [member for sample in samples for member in sample])


TRUNCATED = picture(1)[:60]
SHAPES = {
    "labelled": lambda: labelled(),
    "no labels": lambda: [document(str(i)) for i in range(5)],
    "one document": lambda: labelled(1),
    "pairs without json": lambda: pairs(),
    "pairs with json": lambda: pairs(url="https://example.org/1.jpg"),
    "text after the image": lambda: [document(str(i), (None, "after"), ("0.jpg", None)) for i in range(4)],
    "no text": lambda: [document(str(i), (None,), ("0.jpg",)) for i in range(4)],
    "no images": lambda: [document(str(i), ("some", "text"), (None, None)) for i in range(4)],
    "damaged samples among good ones": lambda: [
        [("0.json", b"{")],
        document("1", data=[TRUNCATED]),
        document("2", data=[]),
        document("3", ("some", "text"), (None, None)),
        document("4", ("a", None, None), (None, "0.jpg", "1.jpg"), [picture(3), TRUNCATED], labels=[None, {}, {}]),
        *labelled()[5:],
    ],
    "all samples damaged": lambda: [document(str(i), data=[TRUNCATED]) for i in range(4)],
    "labels that are no list": lambda: labelled()[:5] + [document(f"x{i}", labels="red") for i in range(5)],
    "labels of any kind": lambda: [
        document(str(i), labels=[None, {"colour": value, "kind": value}])
        for i, value in enumerate([1e400, [], {}, "", "\ud800", True, 10**300, -0.5, None, "x" * 10_000] * 6)
    ],
    "mixed": lambda: labelled(30) + pairs(30) + [document(f"t{i}", ("text",), (None,)) for i in range(5)],
}
NOTHING = {"no images", "all samples damaged"}
NO_PAIRS = {"text after the image": {"lcl"}, "no text": set(CONTRASTIVE), "one document": set(CONTRASTIVE)}
"""Shapes without two contrastive pairs for some objectives."""


def configured(tokenizer, shards, *overrides):
    return small_config(
        f"data.tokenizer={tokenizer}",
        "data.row_tokens=96",
        f"evaluation.shards={shards}",
        "evaluation.probe_labels=[colour]",
        *overrides,
    )


@pytest.fixture(autouse=True)
def small_picture(monkeypatch):
    monkeypatch.setattr(final, "EXAMPLES", 1)


@pytest.fixture(scope="module")
def tokenizer(demo_folder) -> Path:
    return demo_folder / "tokenizer"


def model_of(config):
    size = TextTokenizer(config.data.tokenizer).vocabulary.size
    return build_model(config.model, size, config.data.row_tokens, seed=0).eval()


def check(config):
    return check_held_out(config, TextTokenizer(config.data.tokenizer))


def shapes_and_objectives():
    """One objective with pairs and one without for every shape, all for one, clip where it has pairs and lcl none."""
    for shape in SHAPES:
        others = {"mixed": NAMES, "text after the image": ("clip",)}.get(shape, ())
        yield from ((shape, name) for name in dict.fromkeys(("lcl", "generation", *others)))


@pytest.mark.parametrize(("shape", "objective"), shapes_and_objectives())
def test_what_passes_the_check_before_training_is_evaluated_after_it(tmp_path, tokenizer, shape, objective):
    shard = write(tmp_path / "held.tar", SHAPES[shape]())
    config = configured(tokenizer, shard, f"objective.name={objective}")
    has_probe = shape in ("labelled", "damaged samples among good ones", "mixed", "labels of any kind")
    has_pairs = objective in CONTRASTIVE and objective not in NO_PAIRS.get(shape, ())
    if shape in NOTHING or not (has_probe or has_pairs):
        with pytest.raises(UserError) as error:
            check(config)
        assert any(str(shard) in problem or "evaluation.shards" in problem for problem in error.value.problems)
        return
    sentences = check(config)
    examples = Examples()
    results = evaluate_model(model_of(config), config, examples)
    assert ("retrieval" in results) == bool(examples.retrieval) == has_pairs
    assert bool(examples.gazes) == (objective in CONTRASTIVE)
    assert bool(results["probe"]) == has_probe
    assert results["notes"] == [sentence for sentence in sentences if not sentence.startswith("left out: ")]
    assert any("labels" in sentence for sentence in sentences) == (shape == "labels that are no list")
    for scores in results["probe"].values():
        assert all(0 <= score <= 1 for score in scores.values())


def test_documents_without_labels_give_losses_to_a_run_that_is_evaluated_while_it_trains(tmp_path, tokenizer):
    shard = write(tmp_path / "held.tar", [document(f"{i:03}") for i in range(12)])
    config = configured(tokenizer, shard, "objective.name=generation", "evaluation.every=2")
    assert any("'colour'" in sentence for sentence in check(config))
    results = evaluate_model(model_of(config), config)
    assert (results["documents"], results["figures"], results["probe"]) == (12, [], {})
    assert final_table(results).row_count == 0
    with pytest.raises(UserError, match="trains no image-to-context retrieval"):
        check(configured(tokenizer, shard, "objective.name=generation"))


def test_what_build_writes_can_be_held_out(tmp_path, tokenizer):
    config = configured(tokenizer, built(tmp_path))
    (sentence,) = check(config)
    assert "of the labelled images 13 would train and 7 test it, with 2 classes in both" in sentence  # labels are kept
    results = evaluate_model(model_of(config), config)
    assert (results["documents"], results["images"], results["retrieval"]["pairs"]) == (20, 20, 20)


def test_retrieval_says_how_many_of_the_documents_it_read(tmp_path, tokenizer):
    shard = str(write(tmp_path / "held.tar", labelled(30)))
    config = configured(tokenizer, shard, "evaluation.max_documents=20")
    trained = Trained(model_of(config), config)
    assert document_retrieval(trained, [shard], None)[1] == ["20 of 30 documents were used; --limit asks for more"]
    figures, notes = document_retrieval(trained, [shard], 30)
    assert (notes, {figure.count for figure in figures}) == ([], {30})


def test_every_bad_sample_is_counted_by_its_reason_and_labels_stay_with_their_images(tmp_path, tokenizer):
    shard = write(tmp_path / "held.tar", SHAPES["damaged samples among good ones"]())
    config = configured(tokenizer, shard)
    results = evaluate_model(model_of(config), config)
    assert (results["documents"], results["images"]) == (44, 44)
    assert results["left_out"] == {
        "a damaged image": 2,
        "json that cannot be parsed": 1,
        "an image that is not there": 1,
        "a document without images": 1,
    }


def test_labels_belong_to_all_images_also_to_those_that_the_shard_lacks(tmp_path):
    labels = [{"colour": "red"}, None, {"colour": "green"}, {"colour": "blue"}]
    members = document(
        "0", [None, "text", None, None], ["0.jpg", None, "1.jpg", "2.jpg"], [picture(1), picture(2), picture(3)],
        labels=labels,
    )  # fmt: skip
    source = Source("s", [index_shard(str(write(tmp_path / "a.tar", [[m for m in members if m[0] != "0.1.jpg"]])))])
    document_read = read_document(source, 0)
    assert document_read.images == ("0.jpg", "2.jpg")
    assert read_labels(source, 0, document_read) == [labels[0], labels[3]]


def test_columns_that_img2dataset_keeps_can_be_probed(tmp_path, tokenizer):
    shard = write(tmp_path / "held.tar", pairs(60, url="u"))
    config = configured(tokenizer, shard, "evaluation.probe_labels=[class]")
    assert check(config) == []
    assert set(evaluate_model(model_of(config), config)["probe"]) == {"class"}


def test_a_misspelt_label_is_refused_and_the_right_one_named(tmp_path, tokenizer):
    config = configured(tokenizer, write(tmp_path / "held.tar", labelled()), "evaluation.probe_labels=[colour, knid]")
    with pytest.raises(UserError) as error:
        check(config)
    (problem,) = error.value.problems
    assert problem.startswith("evaluation.probe_labels: no held-out image has the label 'knid' (did you mean 'kind'?)")


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (labelled(12), "8 would train and 4 test it, with 2 classes in both"),
        ([document(f"{i:03}", labels=[None, {"colour": "red"}]) for i in range(60)], "with 1 classes in both"),
        ([document(f"{i:03}", labels=[None, {"colour": i}]) for i in range(60)], "with 0 classes in both"),
        ([document(f"{i:03}", labels=[None, {"colour": i % 3 == 0}]) for i in range(60)], "with 0 classes in both"),
    ],
    ids=["few images", "one class", "a class for every image", "other classes in the test"],
)
def test_a_probe_that_could_not_be_wrong_or_right_is_left_out_with_a_sentence(tmp_path, tokenizer, samples, reason):
    config = configured(tokenizer, write(tmp_path / "held.tar", samples), "evaluation.probe_labels=[colour]")
    (sentence,) = check(config)
    assert sentence.startswith("probes of 'colour' are left out: ")
    assert reason in sentence
    results = evaluate_model(model_of(config), config)
    assert (results["probe"], results["notes"]) == ({}, [sentence])


def test_one_shard_without_anything_is_named_among_good_ones(tmp_path, tokenizer):
    write(tmp_path / "a.tar", labelled(9))
    write(tmp_path / "b.tar", [document("text-0", ("some", "text"), (None, None))])
    write(tmp_path / "c.tar", labelled(9))
    with pytest.raises(UserError) as error:
        check(configured(tokenizer, f"{tmp_path}/*.tar"))
    (problem,) = error.value.problems
    assert problem.startswith(
        f"evaluation.shards: {tmp_path}/b.tar: nothing can be evaluated in its 1 samples from text-0"
    )
    assert "a document without images (1)" in problem


def test_every_shard_has_its_share_of_the_documents(tmp_path, tokenizer):
    for name in "abc":
        write(tmp_path / f"{name}.tar", [document(f"{name}{i}") for i in range(10)])
    config = configured(tokenizer, f"{tmp_path}/*.tar", "evaluation.max_documents=6")
    assert evaluate_model(model_of(config), config)["documents"] == 6
    (tmp_path / "b.tar").unlink()
    write(tmp_path / "b.tar", [document(f"b{i}", data=[TRUNCATED]) for i in range(10)])
    with pytest.raises(UserError, match="b.tar: nothing can be evaluated in its 2 samples"):
        check(config)


@pytest.mark.parametrize("objective", ["lcl", "blip2"])
def test_rows_too_small_for_whole_images_are_refused_before_training(tmp_path, tokenizer, objective):
    """Patch dropout halves the images of training, not those of the evaluation."""
    shard = write(tmp_path / "held.tar", [document("first")])
    rows = {"lcl": 9, "blip2": 20}[objective]
    overrides = [f"data.row_tokens={rows}", "model.vision.patch_dropout=0.75", "model.vision.image_size=24"]
    with pytest.raises(UserError) as error:
        check(configured(tokenizer, shard, f"objective.name={objective}", *overrides))
    (problem,) = error.value.problems
    assert problem.startswith(f"evaluation.shards: {shard}: first: ")
    for words in ("data.row_tokens", "model.vision.patch_dropout", "evaluation.shards=null"):
        assert words in problem


def test_probes_alone_need_no_rows(tmp_path, tokenizer):
    shard = write(tmp_path / "held.tar", labelled())
    overrides = ["data.row_tokens=9", "model.vision.patch_dropout=0.75", "model.vision.image_size=24"]
    config = configured(tokenizer, shard, "objective.name=generation", *overrides)
    assert check(config) == []
    assert set(evaluate_model(model_of(config), config)["probe"]) == {"colour"}


def test_an_encoder_that_gives_no_numbers_has_no_accuracy(tmp_path, tokenizer):
    config = configured(tokenizer, write(tmp_path / "held.tar", labelled()))
    model = model_of(config)
    next(model.vision.parameters()).data.fill_(float("nan"))
    results = evaluate_model(model, config)
    assert results["probe"] == {}
    assert "not finite" in results["notes"][0]
    assert results["retrieval"]["recall_at_1"] == 0
    assert torch.isfinite(torch.tensor(results["retrieval"]["median_rank"]))


def test_a_document_loses_its_damaged_image_and_no_other(tmp_path, tokenizer):
    sample = document("0", ["one", None, "two", None], [None, "0.jpg", None, "1.jpg"], [TRUNCATED, picture(2)])
    config = configured(tokenizer, write(tmp_path / "held.tar", [sample, document("1")]))
    results = evaluate_model(model_of(config), config)
    assert (results["images"], results["retrieval"]["pairs"]) == (2, 2)


def test_the_moving_average_of_the_encoder_is_probed_and_shown_beside_it(tmp_path, tokenizer):
    config = configured(tokenizer, write(tmp_path / "held.tar", labelled()), "objective.name=generation")
    model = model_of(config)
    assert "EMA" not in probe_kinds(evaluate_model(model, config)).values()
    average = model_of(config)
    average.vision.model.post_layernorm.bias.data.fill_(torch.inf)
    results = evaluate_model(model, config, average=average)
    assert results["notes"] == ["the moving average is left out: its features are not finite"]
    results = evaluate_model(model, config, average=model_of(config))
    (scores,) = results["probe"].values()
    assert scores["ema"] == scores["trained"]
    assert [column.header for column in final_table(results).columns][1:5] == [
        *("trained", "pooled", "attentive", "EMA")
    ]
    run = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(results))
    (bars,) = shown_evaluation(read_runs([run])[0]).bars
    assert "moving average (EMA)" in [bar.name for bar in bars.bars]
