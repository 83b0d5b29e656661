"""Small corpora in every published format, shaped as their owners describe them."""

import base64
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.support.tars import write_tar

SENTENCES = ("a dog on grass", "it rained", "the sea at night", "tea at four", "a red door", "the end")


def picture(seed, format="JPEG", side=24):
    """An encoded image that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side, side + 8), Image.Resampling.NEAREST).save(buffer, format)
    return buffer.getvalue()


def url_of(seed):
    return f"https://example.org/images/{seed}.jpg?size=large"


@dataclass(frozen=True)
class Corpus:
    """Source files, where their images are, and what good documents they hold."""

    format: str
    sources: list[Path]
    images: list[Path]
    documents: int
    pairs: int = 0


def mmc4_record(number):
    """Six sentences; images for the sentences 0, 2 (two of them) and 4, the last below the threshold."""
    matches = [(0, 0.31), (2, 0.25), (2, 0.29), (4, 0.2)]
    return {
        "url": f"https://example.org/{number}",
        "text_list": [f"{sentence} {number}" for sentence in SENTENCES],
        "image_info": [
            {
                "image_name": f"{number}_{i}.jpg",
                "raw_url": url_of(f"{number}_{i}"),
                "matched_text_index": index,
                "matched_sim": similarity,
                "face_detections": None,
            }
            for i, (index, similarity) in enumerate(matches)
        ],
        "similarity_matrix": [[0.1] * len(SENTENCES)] * len(matches),
        "could_have_url_duplicate": 0,
    }


def make_mmc4(folder, count=5):
    (folder / "images").mkdir(parents=True)
    records = [mmc4_record(number) for number in range(count)]
    for record in records:
        for entry in record["image_info"]:
            (folder / "images" / entry["image_name"]).write_bytes(
                picture(int(entry["image_name"].replace("_", "")[:-4]))
            )
    path = folder / "docs_shard_0_v2.jsonl.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_shard_0_v2.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return Corpus("mmc4", [path], [folder / "images"], count)


def make_mmc4_tar(folder, count=5):
    folder.mkdir(parents=True)
    members = []
    for number in range(count):
        record = mmc4_record(number)
        for i, entry in enumerate(record["image_info"]):
            text = base64.b64encode(picture(10 * number + i))
            entry["image_base64"] = str(text) if i % 2 else text.decode()  # as the script wrote it, and as meant
        del record["image_info"][0]["image_base64"]
        members.append((f"{hashlib.md5(str(number).encode()).hexdigest()}.json", json.dumps(record).encode()))
    return Corpus("mmc4-tar", [write_tar(folder / "000000000.tar", members)], [], count)


def parallel_record(number):
    images = [url_of(f"{number}_0"), None, url_of(f"{number}_1"), None]
    return {"images": images, "texts": [None, f"first {number}", None, f"second {number}"]}


def url_images(folder, count):
    """Images named by the SHA-256 of their URL."""
    folder.mkdir(parents=True)
    for number in range(count):
        for i in range(2):
            name = hashlib.sha256(url_of(f"{number}_{i}").encode()).hexdigest()
            (folder / (name + ".jpg" * (i == 0))).write_bytes(picture(10 * number + i))
    return folder


def write_parquet(path, records, schema=None):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(records, schema), path, row_group_size=3)
    return path


def make_obelics(folder, count=5):
    images = url_images(folder / "images", count)
    records = []
    for number in range(count):
        metadata = [{"src": url_of(f"{number}_0"), "alt_text": "x"}, None, {"src": url_of(f"{number}_1")}, None]
        about = {"url": f"https://example.org/{number}", "warc_filename": "w", "warc_record_offset": number}
        records.append(
            {**parallel_record(number), "metadata": json.dumps(metadata), "general_metadata": json.dumps(about)}
        )
    return Corpus("obelics", [write_parquet(folder / "train-00000-of-01335.parquet", records)], [images], count)


def make_omnicorpus(folder, count=5):
    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    for number in range(count):
        digests = [hashlib.sha1(url_of(f"{number}_{i}").encode()).hexdigest() for i in range(2)]
        for i, digest in enumerate(digests):
            (images / digest).write_bytes(picture(10 * number + i))
        metadata = [{"img_url_sha": digest, "width": 24, "height": 32, "aesthetic_prob": 0.5} for digest in digests]
        about = {"id": str(number), "url": f"https://example.org/{number}", "domain": ["org"], "porn_prob": 0.0}
        records.append({**parallel_record(number), "metadata": metadata, "general_metadata": about})
    return Corpus("omnicorpus", [write_parquet(folder / "shard_0.parquet", records)], [images], count)


def make_mint_html(folder, count=5):
    tar = folder / "images"
    tar.mkdir(parents=True)
    members = []
    for number in range(count):
        for i in range(2):
            about = {"url": url_of(f"{number}_{i}"), "status": "success"}
            members.append((f"{number:04d}{i}.jpg", picture(10 * number + i)))
            members.append((f"{number:04d}{i}.json", json.dumps(about).encode()))
    write_tar(tar / "00000.tar", members)
    records = [{**parallel_record(number), "url": f"https://example.org/{number}"} for number in range(count)]
    return Corpus("mint-html", [write_parquet(folder / "shard_0.parquet", records)], [tar], count)


def tiff_of(colours):
    pages = [Image.new("RGB", (20 + i, 30), colour) for i, colour in enumerate(colours)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


PAGES = ((250, 0, 0), (0, 250, 0), (0, 0, 250))


def make_mint_pdf(folder, count=5):
    folder.mkdir(parents=True)
    members = []
    for number in range(count):
        record = {
            "pdf_name": f"{number}.pdf",
            "url": f"https://example.org/{number}.pdf",
            "images": ["page_0_image_85", None, "page_4_image_12", None],
            "texts": [None, f"first {number}", None, f"second {number}"],
            "image_metadata": [
                {"page": 0, "xref": 85, "width": 20, "height": 30, "sha256": "a"},
                {"page": 2, "xref": 7, "width": 21, "height": 30, "sha256": "b"},
                {"page": 4, "xref": 12, "width": 22, "height": 30, "sha256": "c"},
            ],
            "language_id_whole_page_fasttext": {"en": 0.9},
        }
        key = hashlib.md5(str(number).encode()).hexdigest()
        members += [(f"{key}.json", json.dumps(record).encode()), (f"{key}.tiff", tiff_of(PAGES))]
    return Corpus("mint-pdf", [write_tar(folder / "CC-MAIN-00000.tar", members)], [], count)


def make_comm(folder, count=5):
    records = []
    for number in range(count):
        for i in range(3):
            path = folder / "images" / "wikihow" / str(number) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(10 * number + i))
        image = [
            {"type": "image", "image_path": f"wikihow/{number}/{i}.jpg", "url": url_of(f"{number}_{i}")}
            for i in range(3)
        ]
        text = [{"type": "text", "content": f"step {number} {i}"} for i in range(3)]
        records.append(
            {
                "data_id": f"wikihow_{number}",
                "dataset_type": "wikihow",
                "title": f"How to {number}",
                "summary_info": [{"type": "text", "content": f"about {number}"}, image[0]],
                "step_info": [[text[0]], [text[1], image[1]], [image[2], text[2]]],
            }
        )
    torch.save(records, folder / "train_data.pth")
    return Corpus("comm", [folder / "train_data.pth"], [folder / "images"], count)


def make_img2dataset(folder, count=5):
    folder.mkdir(parents=True)
    members = []
    for number in range(count):
        key = f"{number:09d}"
        about = {
            "url": url_of(number),
            "caption": f"caption {number}",
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 24,
            "height": 32,
            "original_width": 24,
            "original_height": 32,
            "exif": "{}",
            "sha256": hashlib.sha256(picture(number)).hexdigest(),
        }
        members += [
            (f"{key}.jpg", picture(number)),
            (f"{key}.json", json.dumps(about).encode()),
            (f"{key}.txt", about["caption"].encode()),
        ]
    return Corpus("img2dataset", [write_tar(folder / "00000.tar", members)], [], 0, pairs=count)


def make_shards(folder, count=5):
    folder.mkdir(parents=True)
    members = []
    for number in range(count):
        record = {
            "texts": [f"before {number}", None, f"after {number}"],
            "images": [None, "000.jpg", None],
            "matched_text_index": [None, 2, None],
        }
        members += [(f"{number:04d}.000.jpg", picture(number)), (f"{number:04d}.json", json.dumps(record).encode())]
    return Corpus("shards", [write_tar(folder / "a.tar", members)], [], count)


def make_csv(folder, count=5):
    images = folder / "images"
    images.mkdir(parents=True)
    lines = ["file_name,caption,kind"]
    for number in range(count):
        (images / f"{number}.jpg").write_bytes(picture(number))
        lines.append(f'{number}.jpg,"caption, {number}",{number % 2}')
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return Corpus("csv", [folder / "captions.csv"], [images], 0, pairs=count)


def make_jsonl(folder, count=5):
    images = url_images(folder / "images", count)
    records = [{**parallel_record(number), "source": "ours"} for number in range(count)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Corpus("jsonl", [folder / "documents.jsonl"], [images], count)


def make_huggingface(folder, count=5):
    folder.mkdir(parents=True)
    records = [
        {"image": {"bytes": picture(number), "path": f"{number}.jpg"}, "text": f"caption {number}", "label": number}
        for number in range(count)
    ]
    return Corpus("huggingface", [write_parquet(folder / "train-00000.parquet", records)], [], 0, pairs=count)


PARQUET = {
    "obelics": make_obelics,
    "omnicorpus": make_omnicorpus,
    "mint-html": make_mint_html,
    "huggingface": make_huggingface,
}
MAKERS = {
    "mmc4": make_mmc4,
    "mmc4-tar": make_mmc4_tar,
    "csv": make_csv,
    "jsonl": make_jsonl,
    **PARQUET,
    "mint-pdf": make_mint_pdf,
    "comm": make_comm,
    "img2dataset": make_img2dataset,
    "shards": make_shards,
}


def has_pyarrow():
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True
