"""Write a first recipe for given shards: ``python -m lcl_ds.data init``, from what is measured in them."""

import json
import math
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

from lcl_ds.assembly import lane_settings
from lcl_ds.config import Config, load_config
from lcl_ds.data.contents import Contents, measure, texts_of
from lcl_ds.data.corpora.build_folder import HELD_OUT
from lcl_ds.data.own_tokenizer import train_tokenizer
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths, is_command, is_remote
from lcl_ds.data.stream.lanes import choose_lanes
from lcl_ds.errors import UserError
from lcl_ds.evaluation.check import check_held_out
from lcl_ds.files import check_writable, whole_folder, write_whole
from lcl_ds.tokens import IMAGE_OVERHEAD, TextTokenizer

EPOCHS = 32
"""How often every image is seen, as in the paper."""
LEAST_STEPS, MOST_STEPS = 200, 400_000
ROW_STEP, MOST_ROW = 256, 4096
"""Tokens of a row: a multiple of the first, and no more than the second."""
ROW_QUANTILE = 0.95
"""Fraction of the documents that a row should hold whole."""
DOCUMENTS_PER_ROW = 4
"""Documents of mean length that a row should hold at least: short ones are packed with little padding."""
VOCABULARIES = {0: 4096, 1 << 20: 16_384, 100 << 20: 32_768}
"""Tokens of a tokenizer made from the corpus, by its bytes of text."""
FEW_IMAGES = 100
LEAST_OF_A_CLASS = 2
"""Held-out images of a value of a label, for it to be a class."""


@dataclass(frozen=True)
class Size:
    """Towers of one size, and what suits them."""

    most_images: float
    """The corpora for which it is chosen have fewer images."""
    image_tokens: int
    images_per_step: int
    learning_rate: float
    weight_decay: float
    precision: str
    what: str
    model: str


TINY = """
  vision: {model_type: clip_vision_model, hidden_size: 128, intermediate_size: 512, num_hidden_layers: 4,
    num_attention_heads: 4, image_size: 64, patch_size: 8, hidden_act: gelu}
  pooling: {num_attention_heads: 4}
  decoder: {model_type: llama, hidden_size: 128, intermediate_size: 352, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 4}"""
SMALL = """
  vision: {model_type: clip_vision_model, hidden_size: 384, intermediate_size: 1536, num_hidden_layers: 12,
    num_attention_heads: 6, image_size: 224, patch_size: 16, hidden_act: gelu, activation_checkpointing: true}
  pooling: {num_attention_heads: 6}
  decoder: {model_type: llama, hidden_size: 384, intermediate_size: 1024, num_hidden_layers: 6, num_attention_heads: 6,
    num_key_value_heads: 6, activation_checkpointing: true}"""
BASE = """
  vision: {shape: vit_b16, image_size: 224, hidden_act: gelu, activation_checkpointing: true}
  pooling: {num_attention_heads: 12}
  decoder: {model_type: gpt2, n_embd: 768, n_layer: 12, n_head: 12, activation_function: gelu,
    activation_checkpointing: true}"""
SIZES = {
    "tiny": Size(50_000, 64, 64, 1e-3, 0.1, "fp32", "minutes on a CPU", TINY),
    "small": Size(2_000_000, 196, 1024, 1e-3, 0.1, "bf16", "ViT-S/16, hours on a GPU", SMALL),
    "base": Size(float("inf"), 196, 4096, 5e-4, 0.2, "bf16", "ViT-B/16, days on several GPUs", BASE),
}

RECIPE = Template("""\
# Made by `python -m lcl_ds.data init` for $samples samples with $images images in $shards shard(s)$measured.
# A document has $mean_tokens tokens in the mean and 95 % have at most $p95_tokens; a row holds $held of them whole.
# Size: $size ($what); the others are $others: --size. Every value here is a start, not a result.
name: $name
precision: $precision
data:
  shards: $paths
  tokenizer: $tokenizer
  row_tokens: $row_tokens
  row_images: $row_images     # about $images_per_row in a full row
model:$model
train:
  steps: $steps     # about $epochs epochs
  global_batch_rows: $rows     # about $images_per_step images in a step
  learning_rate: $learning_rate
  warmup_steps: $warmup
  weight_decay: $weight_decay
checkpoint:
  every: $every
log:
  every: $log_every
""")


@dataclass(frozen=True)
class Draft:
    """A recipe that was tried: its text, its settings, and sentences about it."""

    text: str
    config: Config
    notes: list[str]


def write_recipe(
    out: Path, shards: list[str], tokenizer: str | None = None, size: str | None = None, held_out: str | None = None
) -> list[str]:
    """Write a recipe, and beside it a tokenizer where none is named.

    Args:
        shards: as in ``data.shards``.
        tokenizer: name or folder; None: one is made from the text of the shards.
        size: of the towers, by name; None: what suits the number of images.
        held_out: shards to evaluate on; None: those that ``build --holdout`` left beside the others.

    Returns:
        Sentences about what it lacks and what else is worth to know.

    Raises:
        UserError: the recipe or the tokenizer's folder exists, or the shards cannot be trained on.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out}: a recipe's name ends in .yaml; name one, as in {out.with_suffix('.yaml')}")
    folder = out.with_name(f"{out.stem}-tokenizer")
    for path in (out, *([] if tokenizer else [folder])):
        if path.exists():
            raise UserError(f"{path}: exists already; name another recipe, or remove it")
    check_writable(out.parent)
    with tempfile.TemporaryDirectory() as temporary:
        draft = draft_recipe(Path(temporary), out.stem, shards, tokenizer, size, held_out)
        if tokenizer is None:
            with whole_folder(folder) as partial:
                shutil.copytree(draft.config.data.tokenizer, partial, dirs_exist_ok=True)
    tokenizer_line = f"tokenizer: {as_yaml(draft.config.data.tokenizer)}\n"
    write_whole(out, draft.text.replace(tokenizer_line, f"tokenizer: {as_yaml(tokenizer or str(folder))}\n"))
    return draft.notes


def draft_recipe(
    folder: Path,
    name: str,
    shards: list[str],
    tokenizer: str | None,
    size: str | None = None,
    held_out: str | None = None,
) -> Draft:
    """Measure shards and compose a recipe for them, and try it as far as that needs no training.

    Args:
        folder: an empty one, for the tokenizer where one is made, and for the trial.

    Raises:
        UserError: the shards cannot be trained on, or the held-out ones cannot be read.
    """
    source = _open(shards)
    if tokenizer is None:
        tokenizer = str(folder / "tokenizer")
        _make_tokenizer(source, Path(tokenizer))
    try:
        opened = TextTokenizer(tokenizer)
    except ValueError as error:
        raise UserError(f"--tokenizer: {error}") from error
    contents = measure(source, opened)
    if not contents.text_tokens:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in contents.left_out.most_common(3))
        raise UserError(f"{', '.join(shards)}: no sample can be used: {reasons}")
    notes = _what_lacks(contents)
    trial = folder / "recipe.yaml"
    text = _compose(name, shards, tokenizer, contents, _size_for(contents, size))
    trial.write_text(text, encoding="utf-8")
    config = load_config(trial)
    lanes = choose_lanes([source], lane_settings(config), opened)
    text = text.replace("  row_images:", f"  lanes: {lanes}\n  row_images:")
    text += _evaluation(trial, held_out or _beside(shards), opened, notes)
    trial.write_text(text, encoding="utf-8")
    return Draft(text, load_config(trial), notes)


def _open(shards: list[str]) -> Source:
    return Source("data", [index_shard(path) for path in expand_paths(shards)])


def _make_tokenizer(source: Source, folder: Path) -> None:
    texts = list(texts_of(source))
    size = sum(len(text.encode()) for text in texts) * len(source) / max(1, len(texts))
    vocabulary = max(tokens for least, tokens in VOCABULARIES.items() if size >= least)
    train_tokenizer(texts, folder, vocabulary, least=2)


def _what_lacks(contents: Contents) -> list[str]:
    """Say what a run on these shards will suffer from."""
    images = sum(contents.images)
    if not images or not contents.text_bytes:
        there = "there is no text" if images else "there are no images"
        return [f"{there}, so nothing trains the encoder; captions of classes can be made with build --caption"]
    notes = []
    if contents.announced < images / 2:
        share = f"only {contents.announced} of {images} images have text before them"
        notes.append(f"{share}: the others take no part in the contrastive loss")
    if images * contents.scale < FEW_IMAGES:
        notes.append(f"{images} images are few: a step may hold one twice, which the contrastive loss takes for two")
    return notes


def _size_for(contents: Contents, name: str | None) -> str:
    images = sum(contents.images) * contents.scale
    return name or next(name for name, size in SIZES.items() if images < size.most_images)


def _compose(name: str, shards: list[str], tokenizer: str, contents: Contents, size_name: str) -> str:
    """Write the recipe's text, without lanes and evaluation, which need its settings."""
    size = SIZES[size_name]
    lengths = contents.lengths(size.image_tokens)
    per_document = float(np.mean(contents.images))
    wanted = max(np.quantile(lengths, ROW_QUANTILE), DOCUMENTS_PER_ROW * lengths.mean(), 2 * size.image_tokens)
    row_tokens = min(math.ceil(wanted / ROW_STEP) * ROW_STEP, MOST_ROW)
    in_full_row = row_tokens * per_document / lengths.mean()
    of_whole = np.array(contents.images)[lengths <= row_tokens]
    most = max(math.ceil(1.25 * in_full_row), math.ceil(np.quantile(of_whole, ROW_QUANTILE)) if len(of_whole) else 1)
    row_images = max(1, min(most, row_tokens // (size.image_tokens + IMAGE_OVERHEAD)))
    per_row = min(in_full_row, row_images)
    images = per_document * contents.samples
    wanted_images = min(size.images_per_step, max(16, images / 8))
    rows = _whole_rows(wanted_images / per_row if per_row else 8)
    steps_of_epoch = max(1e-9, lengths.mean() * contents.samples / (rows * row_tokens))
    steps = int(np.clip(math.ceil(EPOCHS * steps_of_epoch), LEAST_STEPS, MOST_STEPS))
    values = {
        "name": as_yaml(name),
        "samples": f"{contents.samples:,}",
        "images": f"{images:,.0f}",
        "shards": contents.shards,
        "measured": "" if contents.scale <= 1 else f", of which {contents.measured:,} samples were read",
        "mean_tokens": f"{lengths.mean():.0f}",
        "p95_tokens": f"{np.quantile(lengths, 0.95):.0f}",
        "held": f"{contents.held_by(row_tokens, size.image_tokens):.0%}",
        "size": size_name,
        "what": size.what,
        "others": " and ".join(other for other in SIZES if other != size_name),
        "precision": size.precision,
        "paths": as_yaml(shards[0] if len(shards) == 1 else shards),
        "tokenizer": as_yaml(tokenizer),
        "row_tokens": row_tokens,
        "row_images": row_images,
        "images_per_row": f"{per_row:.1f}",
        "model": size.model,
        "steps": steps,
        "epochs": f"{steps / steps_of_epoch:.0f}",
        "rows": rows,
        "images_per_step": f"{rows * per_row:.0f}",
        "learning_rate": f"{size.learning_rate:.1e}",
        "warmup": min(2000, steps // 10),
        "weight_decay": size.weight_decay,
        "every": min(1000, max(50, steps // 5)),
        "log_every": 10 if steps > 100 else 1,
    }
    return RECIPE.substitute(values)


def _whole_rows(wanted: float) -> int:
    """Round to a number of rows that 1, 2, 4 and, if there are as many, 8 ranks can share."""
    return round(wanted / 8) * 8 if wanted >= 6 else max(1, 1 << round(math.log2(max(1.0, wanted))))


def _beside(shards: list[str]) -> str | None:
    """Find the held-out shards that a build left beside these."""
    for path in shards:
        folder = Path(path).parent / HELD_OUT
        if not is_remote(path) and not is_command(path) and any(folder.glob("*.tar")):
            return str(folder / "*.tar")
    return None


def _evaluation(trial: Path, held_out: str | None, tokenizer: TextTokenizer, notes: list[str]) -> str:
    """Write the part about evaluation, empty where nothing can be evaluated; adds the reason to ``notes``."""
    if held_out is None:
        notes.append("no held-out shards lie beside them, so nothing is evaluated: build with --holdout 0.01")
        return ""
    classes = [name for name, values in measure(_open([held_out]), tokenizer).labels.items() if _are_classes(values)]
    shown = f"  shards: {as_yaml(held_out)}\n  probe_labels: {as_yaml(sorted(classes))}\n"
    try:
        config = load_config(
            trial, [f"evaluation.shards={as_yaml(held_out)}", f"evaluation.probe_labels={as_yaml(classes)}"]
        )
        notes += check_held_out(config, tokenizer)
    except UserError as error:
        notes.append(f"nothing is evaluated: {error}")
        return ""
    return f"evaluation:\n{shown}"


def _are_classes(values: Counter[str]) -> bool:
    """Say whether a label's values are classes that a probe can learn, not numbers or names of single images."""
    often = [count for count in values.values() if count >= LEAST_OF_A_CLASS]
    return len(often) > 1 and sum(often) > values.total() / 2


def as_yaml(value: object) -> str:
    """Write a value on one line."""
    return json.dumps(value, ensure_ascii=False)
