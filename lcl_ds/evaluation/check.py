"""Try before the first training step how much of the final evaluation is possible."""

from collections import Counter
from contextlib import suppress
from itertools import groupby

from lcl_ds.config import Config
from lcl_ds.data.documents import BadSampleError
from lcl_ds.errors import UserError
from lcl_ds.evaluation.documents import UNUSABLE_LABELS, HeldOut, HeldOutReader
from lcl_ds.evaluation.probe import ProbeImages, class_of
from lcl_ds.evaluation.probes import left_out
from lcl_ds.evaluation.retrieval import LEAST_PAIRS, too_few_pairs
from lcl_ds.settings import suggest
from lcl_ds.tokens import TextTokenizer


def check_held_out(config: Config, tokenizer: TextTokenizer) -> list[str]:
    """Read samples of every held-out shard as the evaluation will, and look for the labels and pairs of all.

    Returns:
        A sentence about each figure that will be missing.

    Raises:
        UserError: a shard cannot be read or nothing in it can be evaluated, or a probe's label is misspelt; names
            shard, key and setting.
    """
    reader = HeldOutReader(config, tokenizer, with_sequences=config.evaluation.every is not None)
    problems = _check_shards(reader)
    shortages, misspelt, unusable = _check_labels(reader)
    problems += misspelt
    sentences = [left_out(name, reason) for name, reason in shortages.items()]
    no_retrieval = _check_pairs(reader)
    if reader.has_pairs and no_retrieval:
        sentences.append(no_retrieval)
    has_losses = config.evaluation.every is not None
    if not problems and not has_losses and no_retrieval and len(shortages) == len(config.evaluation.probe_labels):
        reasons = dict.fromkeys([*sentences, no_retrieval])
        problems = [f"evaluation.shards: nothing can be evaluated: {'; '.join(reasons)}"]
    if problems:
        raise UserError(problems)
    if unusable:
        sentences.append(f"left out: {UNUSABLE_LABELS} ({unusable})")
    return sentences


def _check_shards(reader: HeldOutReader) -> list[str]:
    """Read samples of each shard until one gives something to evaluate; a problem for each shard without any."""
    problems = []
    for shard, group in groupby(reader.numbers, lambda number: reader.source.shard_of(number).path):
        numbers = list(group)
        tried = HeldOut()
        for number in numbers:
            reader.read(number, False, tried)
            if _gives_something(reader, tried):
                break
        else:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in tried.left_out.most_common(3))
            left_out = f"; left out: {reasons}" if reasons else ""
            problems.append(
                f"evaluation.shards: {shard}: nothing can be evaluated in its "
                f"{len(numbers)} samples from {reader.source.sample(numbers[0]).key} on: "
                f"{_what_lacks(reader, tried)}{left_out}; name other shards or set evaluation.shards=null"
            )
    return problems


def _gives_something(reader: HeldOutReader, held_out: HeldOut) -> bool:
    names = reader.config.evaluation.probe_labels
    labelled = any(class_of(labels, name) is not None for labels in held_out.labels for name in names)
    has_losses = reader.config.evaluation.every is not None and len(held_out.sequences) > 0
    return labelled or has_losses or reader.pair_count(sequence.tokens for sequence in held_out.sequences) > 0


def _what_lacks(reader: HeldOutReader, held_out: HeldOut) -> str:
    if not held_out.pixels:
        return "no image can be read"
    retrieval = "no image has text that announces it" if reader.has_pairs else _no_retrieval(reader)
    return f"{retrieval}, and no image has a label of evaluation.probe_labels {reader.config.evaluation.probe_labels}"


def _no_retrieval(reader: HeldOutReader) -> str:
    return f"objective.name={reader.config.objective.name} trains no image-to-context retrieval"


def _check_pairs(reader: HeldOutReader) -> str | None:
    """Say why there will be no retrieval; None if there will. No image is read."""
    if not reader.has_pairs:
        return _no_retrieval(reader)
    count = 0
    for number, _ in reader.samples():
        with suppress(BadSampleError, OSError):  # it was counted, or will be
            document, _ = reader.document(number)
            count += reader.pair_count(reader.pieces(number, document))
        if count >= LEAST_PAIRS:
            return None
    return too_few_pairs(count)


def _check_labels(reader: HeldOutReader) -> tuple[dict[str, str], list[str], int]:
    """Say why probes will be left out, by label; name labels that no image has; count documents with unusable labels.

    Reads no image, and no more documents than it takes to see that every probe is possible.
    """
    probes = {name: ProbeImages() for name in reader.config.evaluation.probe_labels}
    known: Counter[str] = Counter()
    unusable = 0
    for number, is_test in reader.samples():
        try:
            document, labels = reader.document(number)
        except (BadSampleError, OSError):
            continue
        unusable += labels is None
        for of_image in labels or []:
            if not document.is_pair:  # whose labels are whatever its .json holds
                known.update(of_image.keys())
            for name, probe in probes.items():
                probe.add(class_of(of_image, name), is_test)
        if all(probe.shortage() is None for probe in probes.values()):
            return {}, [], unusable
    reasons = {name: probe.shortage() for name, probe in probes.items()}
    shortages = {name: reason for name, reason in reasons.items() if reason is not None}
    names = ", ".join(repr(name) for name, _ in known.most_common(20))
    misspelt = [
        f"evaluation.probe_labels: no held-out image has the label {name!r}{suggest(name, known)}; they have {names}"
        for name in probes
        if known and name not in known and not probes[name].total()
    ]
    return shortages, misspelt, unusable
