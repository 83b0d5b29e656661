"""What a row of a run holds: from made-up documents seen as the objective sees them, or from a finished run."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcl_ds.assembly import slot_tokens
from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.data.documents import Document
from lcl_ds.data.sequences import Sequencer
from lcl_ds.data.stream.packing import PackedSequence, Row, collate
from lcl_ds.errors import UserError
from lcl_ds.flops import StepWork
from lcl_ds.metrics import read_metrics
from lcl_ds.models.build import native_resolution
from lcl_ds.objectives import view_of
from lcl_ds.phases import with_image_size
from lcl_ds.tokens import TextTokenizer, Vocabulary

TEXT_TOKENS = 24
"""Text that goes with an image of a made-up document: a caption of some eighteen words."""
KNOWN_TOKENIZERS = {
    "openai/clip-vit": 49_408,
    "openai-community/gpt2": 50_257,
    "gpt2": 50_257,
    "facebook/opt": 50_265,
    "meta-llama/Llama-3": 128_256,
    "meta-llama/Meta-Llama-3": 128_256,
    "Qwen/Qwen2.5": 151_665,
    "Qwen/Qwen3": 151_669,
    "mistralai/Mistral-7B": 32_000,
}
"""Text tokens by how the name of a tokenizer begins, for those that are not on this machine."""


@dataclass(frozen=True)
class RowContents:
    """What one row holds on average."""

    tokens: float
    """With padding."""
    images: float
    labels: float
    pairs: float
    squares: float
    """Sum over documents and paddings of the square of their length."""
    known_from: str
    """A sentence about where these figures come from."""

    def step(self, rows: int, micro_steps: int = 1) -> StepWork:
        """Return what a step of so many rows reads, over all ranks."""
        pairs = self.pairs * rows
        return StepWork(
            images=self.images * rows,
            tokens=self.tokens * rows,
            squares=self.squares * rows,
            labels=self.labels * rows,
            pairs=pairs,
            pair_products=pairs**2 / micro_steps,
        )


def with_largest_squares(config: Config) -> Config:
    """Count every image that keeps its aspect ratio as the smallest square of ``max_image_tokens`` patches or more.

    So no row holds more than what is planned for.
    """
    native = native_resolution(config.model)
    if native is None:
        return config
    budget = config.data.row_image_tokens
    rows = {"row_images": config.data.row_images if budget is None else max(1, budget // native.most_tokens)}
    config = with_image_size(config, math.ceil(native.most**0.5) * native.patch_size)
    square = {"resolution": "square", "max_image_tokens": None, "min_image_tokens": None}
    vision = config.model.vision.model_copy(update=square)
    data = config.data.model_copy(update={"row_image_tokens": None, **rows})
    return config.model_copy(update={"data": data, "model": config.model.model_copy(update={"vision": vision})})


def vocabulary_of(config: Config, text_tokens: int | None = None) -> tuple[Vocabulary, str]:
    """Find the vocabulary without the network: of the tokenizer's folder, or by its name; returns how as well.

    Raises:
        UserError: the folder holds no tokenizer.
    """
    name = config.data.tokenizer
    if text_tokens is not None:
        return Vocabulary(text_tokens), f"{text_tokens:,} text tokens as --text_vocabulary says"
    if Path(name).exists():
        try:
            vocabulary = TextTokenizer(name).vocabulary
        except ValueError as error:
            raise UserError(f"data.tokenizer: {error}") from error
        return vocabulary, f"{vocabulary.text_size:,} text tokens of the tokenizer {name}"
    size = config.model.decoder.hf_keys.get("vocab_size")
    if size is not None:
        return Vocabulary(size - (Vocabulary(0).size)), f"{size:,} tokens as model.decoder.vocab_size says"
    for beginning, known in KNOWN_TOKENIZERS.items():
        if name.startswith(beginning):
            return Vocabulary(known), f"{known:,} text tokens, those of {name}"
    assumed = KNOWN_TOKENIZERS["openai/clip-vit"]
    return Vocabulary(assumed), f"assumed {assumed:,} text tokens, since {name} is not here; see --text_vocabulary"


def made_up_row(
    config: Config, vocabulary: Vocabulary, text_tokens: int = TEXT_TOKENS, images_per_document: int | None = None
) -> Batch:
    """Fill one row with documents of images and text, as the view of the objective makes sequences of them.

    Args:
        text_tokens: before each image.
        images_per_document: None: as many as the longest document holds.
    """
    data, image_tokens = config.data, slot_tokens(config)
    view = view_of(config.objective, 0.0)
    sequencer = Sequencer(
        lambda text: [0] * len(text), vocabulary, image_tokens, data.longest_document, data.row_images
    )
    fitting = max(1, (data.longest_document - 2) // (image_tokens + 2 + text_tokens))
    images = min(images_per_document or fitting, fitting, data.row_images)
    segments = [segment for image in range(images) for segment in ("a" * text_tokens, image)]
    document = Document("made-up", tuple(segments), tuple(f"{image}.jpg" for image in range(images)))
    rng = np.random.default_rng(0)
    sequences: list[PackedSequence] = []
    free, free_images = data.row_tokens, data.row_images
    made = view.encode(document, sequencer, rng)
    number = 0
    while len(made[number % len(made)].input_ids) <= free and len(made[number % len(made)].images) <= free_images:
        tokens = made[number % len(made)]
        pixels = np.zeros((len(tokens.images), 3, 1, 1), dtype=np.uint8)
        sequences.append(PackedSequence("made-up", tokens, pixels))
        free, free_images = free - len(tokens.input_ids), free_images - len(tokens.images)
        number += 1
    return collate([Row(tuple(sequences))], data.row_tokens, 1, vocabulary, view.readout_names)


def contents_of(row: Batch, config: Config, text_tokens: int = TEXT_TOKENS) -> RowContents:
    """Say what a made-up row holds."""
    longest = row.max_seqlen
    return RowContents(
        tokens=row.input_ids.numel(),
        images=row.image_count,
        labels=len(row.labels),
        pairs=len(row.readouts["context"]),
        squares=row.token_squares,
        known_from=f"made-up documents of {longest:,} tokens at most, {text_tokens} text tokens for each image "
        f"(data.row_tokens, data.document_tokens and data.row_images of {config.name}; --text_per_image, "
        "--images_per_document, or --like RUN for those of a finished run)",
    )


def contents_of_run(run_dir: Path, config: Config, pairs_per_image: float) -> RowContents:
    """Read what the rows of a finished run held on average.

    Args:
        pairs_per_image: which the metrics do not tell.

    Raises:
        UserError: there is no run, or an older version wrote its metrics.
    """
    rows = read_metrics(run_dir)
    keys = ("images", "text_tokens", "token_squares")
    if lacking := [key for key in keys if not rows or key not in rows[-1]]:
        raise UserError(f"{run_dir}: its metrics.jsonl lacks {', '.join(lacking)}; name a run of this version")
    per_row = 1 / (len(rows) * config.train.global_batch_rows)
    images, labels, squares = (per_row * math.fsum(row[key] for row in rows) for key in keys)
    return RowContents(
        tokens=config.data.row_tokens,
        images=images,
        labels=labels,
        pairs=images * pairs_per_image,
        squares=squares,
        known_from=f"the {len(rows):,} steps of {run_dir}",
    )
