"""The harder embedded corpus: deterministic, balanced, and its text fits the pictures as often as was asked for."""

import json
import re
import tarfile

import numpy as np
import pytest

from lcl_ds.data.demo import textured
from lcl_ds.data.demo.textured_scenes import SHAPES, SIZES, TEXTURES, Look, render_look
from lcl_ds.data.documents import read_document, read_labels
from lcl_ds.data.settings import TexturedSettings
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.errors import UserError

ATTRIBUTES = {name: textured.LABELS[name] for name in ("shape", "texture", "colour", "size")}


def settings(folder="unused", **values):
    return TexturedSettings(folder=str(folder), **{"documents": 12, "heldout_documents": 6, **values})


def told(count, mismatch=0.0, **values):
    documents = [textured.make_document(settings(**values), "documents", index, mismatch) for index in range(count)]
    return [image for document in documents for image in document]


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("textured") / "corpus"
    textured.ensure_textured(settings(folder))
    textured.ensure_textured(settings(folder, pairs=True))
    textured.ensure_textured(settings(folder, mismatch=0.5))
    return folder


def test_two_builds_are_equal_to_the_byte(folder, tmp_path):
    again = textured.ensure_textured(settings(tmp_path / "again"))
    names = {path.name for path in again.rglob("*.tar")}
    assert names == {"documents-000000.tar", "heldout-documents-000000.tar", "heldout-pairs-000000.tar"}
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert (again / "tokenizer/tokenizer.json").read_bytes() == (folder / "tokenizer/tokenizer.json").read_bytes()


def test_a_sample_depends_on_neither_count_nor_order():
    few, many = settings(documents=3), settings(documents=3000)
    of = textured.ShardSet("documents")
    assert list(textured.samples_of(few, of, 2)) == list(textured.samples_of(many, of, 2))


def test_another_seed_is_another_corpus():
    of = textured.ShardSet("documents")
    one, other = (list(textured.samples_of(settings(seed=seed), of, 0)) for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_as_many_images_are_described_as_another_picture_as_was_asked_for(share):
    images = told(600, share)
    wrong = np.mean([image.described is not image.look for image in images])
    assert abs(wrong - share) < 4 * (share * (1 - share) / len(images)) ** 0.5


def test_mismatched_text_changes_nothing_else():
    right, some, more = (told(100, share) for share in (0.0, 0.2, 0.5))
    assert [image.look for image in right] == [image.look for image in some] == [image.look for image in more]
    wrong = [{n for n, image in enumerate(images) if image.described is not image.look} for images in (some, more)]
    assert wrong[0] < wrong[1]
    same = [n for n in range(len(right)) if n not in wrong[0]]
    assert all(right[n] == some[n] for n in same)


def agreement(images):
    """Fraction of the attributes that are named about an image and are the image's own."""
    named = [
        word == getattr(image.look, name)
        for image in images
        for sentence in image.before + image.after
        for name, words in ATTRIBUTES.items()
        for word in re.findall(r"\w+", sentence)
        if word in words
    ]
    assert len(named) > len(images)
    return np.mean(named)


def test_sentences_tell_what_is_in_the_picture_unless_they_are_mismatched():
    assert agreement(told(100)) == 1
    # By chance one in sixteen, ten, eight and three agrees.
    assert agreement(told(150, 1.0)) < 0.2


def test_the_sentence_that_describes_an_image_names_two_things_at_least():
    for image in told(200):
        named = [w for w in re.findall(r"\w+", image.sentence) if any(w in words for words in ATTRIBUTES.values())]
        assert len(named) >= 2


@pytest.mark.parametrize("silent", [0.0, 0.4])
def test_as_many_contexts_say_nothing_as_was_asked_for(silent):
    images = told(350, silent=silent, bare=0)
    words = {word for words in ATTRIBUTES.values() for word in words}
    quiet = [not words & set(re.findall(r"\w+", " ".join(image.before))) for image in images]
    assert abs(np.mean(quiet) - silent) < 0.05


@pytest.mark.parametrize("bare", [0.0, 0.5])
def test_as_many_documents_begin_with_an_image_as_was_asked_for(bare):
    documents = [textured.make_document(settings(bare=bare), "documents", index) for index in range(200)]
    assert abs(np.mean([not document[0].before for document in documents]) - bare) < 0.12
    assert all(image.before for document in documents for image in document[1:])


def test_labels_are_balanced_and_do_not_tell_of_each_other():
    looks = [image.look for image in told(900)]
    for name, values in {"shape": SHAPES, "texture": TEXTURES, "size": tuple(SIZES)}.items():
        counts = np.array([sum(getattr(look, name) == value for look in looks) for value in values])
        assert counts.min() > 0.7 * counts.mean(), name
    red = [look.shape for look in looks if look.colour == "red"]
    assert max(red.count(shape) for shape in SHAPES) < 0.2 * len(red)


def test_held_out_pictures_are_others(folder):
    train, held_out = (
        {data for name, data in members(folder / f"{split}-000000.tar").items() if name.endswith("jpg")}
        for split in ("documents", "heldout-documents")
    )
    assert train
    assert held_out
    assert not train & held_out


def test_pairs_are_the_images_of_the_documents_with_their_sentences(folder):
    documents, pairs = (Source("x", [index_shard(folder / f"{n}-000000.tar")]) for n in ("documents", "pairs"))
    expected = []
    for number in range(len(documents)):
        document = read_document(documents, number)
        texts = {image: text for text, image in document.image_texts()}
        labels = read_labels(documents, number, document)
        for image, suffix in enumerate(document.images):
            expected.append((documents.read(number, suffix), texts[image], labels[image]["shape"]))
    actual = []
    for number in range(len(pairs)):
        pair = read_document(pairs, number)
        assert pair.is_pair
        actual.append((pairs.read(number, "jpg"), pair.segments[0], read_labels(pairs, number, pair)[0]["shape"]))
    assert actual == expected


def test_mismatched_documents_have_the_same_pictures_and_other_text(folder):
    right, wrong = (members(folder / f"{name}documents-000000.tar") for name in ("", "mismatch50-"))
    assert right.keys() == wrong.keys()
    assert all(right[name] == wrong[name] for name in right if name.endswith("jpg"))
    records = [json.loads(data) for name, data in wrong.items() if name.endswith("json")]
    flags = [flag for record in records for flag in record["mismatched"]]
    assert 0.2 < np.mean(flags) < 0.8


def test_sets_are_added_and_other_settings_make_it_anew(tmp_path):
    folder = tmp_path / "corpus"
    textured.ensure_textured(settings(folder))
    before = (folder / "documents-000000.tar").stat().st_mtime_ns
    textured.ensure_textured(settings(folder, mismatch=0.2))
    assert (folder / "documents-000000.tar").stat().st_mtime_ns == before
    assert (folder / "mismatch20-documents-000000.tar").is_file()
    textured.ensure_textured(settings(folder, seed=5))
    assert not (folder / "mismatch20-documents-000000.tar").exists()
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 5


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not this corpus"):
        textured.ensure_textured(settings(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def difference(one, other):
    """Mean difference of pictures that differ in one attribute alone, where everything else is drawn alike."""
    pictures = [
        [render_look(look, np.random.Generator(np.random.Philox(seed)), 48).astype(float) for seed in range(8)]
        for look in (one, other)
    ]
    return np.abs(np.array(pictures[0]) - np.array(pictures[1])).mean()


@pytest.mark.parametrize(("shape", "other"), [("star", "sun"), ("ring", "frame"), ("circle", "hexagon")])
def test_like_shapes_are_different_pictures(shape, other):
    one = Look(shape, "plain", "red", "large", 0)
    assert difference(one, one) == 0
    assert difference(one, Look(other, "plain", "red", "large", 0)) > 0.5
