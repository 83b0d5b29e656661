"""Captioning: a frozen encoder, an MLP into the width of a small decoder, and that decoder (the paper's protocol)."""

import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from lcl_ds.errors import UserError
from lcl_ds.evaluation.intervals import Interval, bootstrap
from lcl_ds.evaluation.sharing import gather, own_part, sum_gradients
from lcl_ds.tokens import TextTokenizer

EXTRA = "BLEU and CIDEr are computed by pycocoevalcap, which is not installed: pip install 'lcl_ds[caption]'"


@dataclass(frozen=True)
class CaptionSettings:
    """How MLP and decoder are trained, and how captions are made."""

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises; then it falls as a cosine."""
    longest: int = 40
    """Tokens of a caption."""
    beams: int = 3
    width: int = 256
    """Of the decoder from scratch."""
    layers: int = 4
    seed: int = 0


class Captioner(nn.Module):
    """Patch tokens through an MLP, then a caption from the decoder.

    Args:
        width: of the patch tokens.
        patches: of an image.
        decoder: any causal language model of transformers, whose vocabulary has ``tokenizer``'s control tokens.
    """

    def __init__(self, width: int, decoder: Any, tokenizer: TextTokenizer, longest: int):
        super().__init__()
        self.decoder, self.tokenizer, self.longest = decoder, tokenizer, longest
        inner = decoder.get_input_embeddings().weight.shape[1]
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner))

    def loss(self, patches: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the summed cross-entropy of the captions' tokens, divided by their mean number, fp32."""
        vocabulary = self.tokenizer.vocabulary
        ids = [self.tokenizer.encode(caption)[: self.longest - 1] for caption in captions]
        rows = [torch.tensor([vocabulary.sot, *tokens, vocabulary.eot]) for tokens in ids]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=vocabulary.eot).to(patches.device)
        counts = torch.tensor([len(row) for row in rows], device=patches.device)
        embedded = self.decoder.get_input_embeddings()(padded[:, :-1])
        states = torch.cat([self.mlp(patches.float()), embedded], dim=1)
        logits = self.decoder(inputs_embeds=states, use_cache=False).logits[:, patches.shape[1] :].float()
        carries = torch.arange(padded.shape[1] - 1, device=patches.device) < counts[:, None] - 1
        losses = F.cross_entropy(logits.transpose(1, 2), padded[:, 1:], reduction="none")
        return (losses * carries).sum() / (counts - 1).float().mean()

    @torch.no_grad()
    def captions(self, patches: Tensor, beams: int) -> list[str]:
        """Write a caption about each image."""
        vocabulary = self.tokenizer.vocabulary
        begin = torch.full((len(patches), 1), vocabulary.sot, device=patches.device)
        states = torch.cat([self.mlp(patches.float()), self.decoder.get_input_embeddings()(begin)], dim=1)
        made = self.decoder.generate(
            inputs_embeds=states,
            attention_mask=torch.ones(states.shape[:2], dtype=torch.int64, device=patches.device),
            max_new_tokens=self.longest,
            num_beams=beams,
            do_sample=False,
            eos_token_id=vocabulary.eot,
            pad_token_id=vocabulary.eot,
            bos_token_id=vocabulary.sot,
        )
        texts = []
        for row in made.tolist():
            ids = row[: row.index(vocabulary.eot)] if vocabulary.eot in row else row
            texts.append(self.tokenizer.decode([token for token in ids if token < vocabulary.text_size]))
        return texts


def new_captioner(
    width: int, patches: int, tokenizer: TextTokenizer, settings: CaptionSettings, folder: str | None
) -> Captioner:
    """Make a captioner around the decoder in ``folder``, or around a small one from scratch.

    Raises:
        UserError: the decoder cannot be loaded, or is too short.
    """
    size, longest = tokenizer.vocabulary.size, patches + settings.longest + 2
    if folder is None:
        config = GPT2Config(
            vocab_size=size,
            n_positions=longest,
            n_embd=settings.width,
            n_layer=settings.layers,
            n_head=settings.width // 64,
            bos_token_id=None,
            eos_token_id=None,
        )
        return Captioner(width, GPT2LMHeadModel(config), tokenizer, settings.longest)
    try:
        decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--decoder {folder}: {' '.join(str(error).split())[:160]}") from error
    positions = getattr(decoder.config, "max_position_embeddings", longest)
    if positions < longest:
        raise UserError(f"--decoder {folder}: reads {positions} tokens, an image and its caption take {longest}")
    decoder.resize_token_embeddings(size)
    return Captioner(width, decoder, tokenizer, settings.longest)


def train_captioner(
    captioner: Captioner,
    patches_of: Callable[[Tensor], Tensor],
    captions: Sequence[Sequence[str]],
    train: Tensor,
    settings: CaptionSettings,
) -> None:
    """Train MLP and decoder; every epoch shows each image with one of its captions.

    Args:
        captions: of every image.
        train: int64 numbers of images.
    """
    weights = [weight for weight in captioner.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    total = settings.epochs * math.ceil(len(train) / settings.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(settings.warmup * total), total)
    draw = np.random.default_rng(settings.seed)
    captioner.train()
    for _ in range(settings.epochs):
        order = train[torch.randperm(len(train))]
        chosen = [own[int(draw.integers(len(own)))] if own else "" for own in captions]
        for rows in order.split(settings.batch_size):
            own = own_part(rows)
            optimizer.zero_grad()
            if len(own):
                loss = captioner.loss(patches_of(own), [chosen[row] for row in own.tolist()])
                (loss / len(rows)).backward()
            sum_gradients(weights)
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    captioner.eval()


def captions_of(
    captioner: Captioner, patches_of: Callable[[Tensor], Tensor], rows: Tensor, beams: int, batch_size: int = 64
) -> list[str]:
    """Write captions about images; processes share them."""
    own = own_part(torch.arange(len(rows)))
    made: list[tuple[int, str]] = []
    for places in own.split(batch_size) if len(own) else ():
        made += zip(places.tolist(), captioner.captions(patches_of(rows[places]), beams), strict=True)
    return [text for _, text in sorted(gather(made))]


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores of captions against references."""

    bleu_4: float
    bleu_interval: Interval
    cider: float
    cider_interval: Interval
    tokenizer: str
    """``ptb``: the Penn Treebank tokenizer of COCO's own evaluation; ``words``: where there is no Java to run it."""


def require_scorer() -> None:
    """Look for the package that scores, before the work. Raises: UserError when it is not installed."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        raise UserError(EXTRA) from None


def score(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Compute BLEU-4 and CIDEr with pycocoevalcap.

    Args:
        captions: one an image.
        references: at least one an image.

    Raises:
        UserError: the package is not installed.
    """
    require_scorer()
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider

    made = {str(n): [text] for n, text in enumerate(captions)}
    wanted = {str(n): list(texts) for n, texts in enumerate(references)}
    made, wanted, name = _tokenized(made, wanted)
    bleu = BleuScorer(n=4)
    for key, (text,) in made.items():
        bleu += (text, wanted[key])
    totals, _ = bleu.compute_score(option="closest", verbose=0)
    counts = np.array(
        [[*entry["guess"], *entry["correct"], entry["testlen"], _closest(entry)] for entry in bleu.ctest], dtype=float
    )
    cider, each = Cider().compute_score(wanted, made)
    each = np.asarray(each)
    return CaptionScores(
        float(totals[3]),
        bootstrap(lambda rows: _bleu_of(counts[rows].sum(0)), len(counts)),
        float(cider),
        bootstrap(lambda rows: float(each[rows].mean()), len(each)),
        name,
    )


def _closest(entry: dict[str, Any]) -> float:
    """Return the length of the reference that is nearest to the caption's, as the scorer takes it."""
    lengths, own = entry["reflen"], entry["testlen"]
    return min((abs(length - own), length) for length in lengths)[1]


def _bleu_of(sums: np.ndarray) -> float:
    """Compute the corpus score from sums of the scorer's own counts, by its own formula."""
    guess, correct, length, reference = sums[:4], sums[4:8], sums[8], sums[9]
    tiny, small = 1e-15, 1e-9
    precision = float(np.exp(np.log((correct + tiny) / (guess + small)).mean()))
    ratio = (length + tiny) / (reference + small)
    return precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def _tokenized(made: dict[str, list[str]], wanted: dict[str, list[str]]) -> tuple[Any, Any, str]:
    """Split texts into words as COCO's evaluation does, or without Java into runs of letters and digits."""
    sides = made, wanted
    if shutil.which("java"):
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        records = [{key: [{"caption": text} for text in texts] for key, texts in side.items()} for side in sides]
        return PTBTokenizer().tokenize(records[0]), PTBTokenizer().tokenize(records[1]), "ptb"
    split = [{key: [_words(text) for text in texts] for key, texts in side.items()} for side in sides]
    return split[0], split[1], "words"


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:'\w+)?", text.lower()))
