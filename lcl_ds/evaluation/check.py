"""What of the closing evaluation is possible, tried before the first training step."""

from collections import Counter
from itertools import groupby

from lcl_ds.config import Config
from lcl_ds.data.documents import BadSampleError
from lcl_ds.errors import UserError
from lcl_ds.evaluation.documents import UNUSABLE_LABELS, HeldOut, HeldOutReader
from lcl_ds.evaluation.probe import ProbeImages, class_of
from lcl_ds.settings import suggest
from lcl_ds.tokens import TextTokenizer


def check_held_out(config: Config, tokenizer: TextTokenizer) -> list[str]:
    """Read samples of every held-out shard as the evaluation will, and look for the labels of all.

    Returns:
        A sentence about each linear probe that will be left out.

    Raises:
        UserError: a shard cannot be read or nothing in it can be evaluated, or a probe's label is misspelt; names
            shard, key and setting.
    """
    reader = HeldOutReader(config, tokenizer)
    problems = _check_shards(reader)
    sentences = []
    if config.evaluation.probe_labels:
        shortages, misspelt = _check_labels(reader)
        problems += misspelt
        sentences = [f"linear probe {name!r} is left out: {reason}" for name, reason in shortages.items()]
        if not reader.has_pairs and len(shortages) == len(config.evaluation.probe_labels) and not problems:
            problems = [f"evaluation.probe_labels: {sentence}" for sentence in sentences]
            problems.append(
                f"evaluation.shards: nothing can be evaluated: {_no_retrieval(reader)}, and no probe is left"
            )
    if problems:
        raise UserError(problems)
    return sentences


def _check_shards(reader: HeldOutReader) -> list[str]:
    """Read samples of each shard until one gives something to evaluate; a problem for each shard without any."""
    problems = []
    for shard, group in groupby(reader.numbers, reader.shard_of):
        numbers = list(group)
        tried = HeldOut()
        for number in numbers:
            reader.read(number, False, tried)
            if _gives_something(reader, tried):
                break
        else:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in tried.left_out.most_common(3))
            problems.append(
                f"evaluation.shards: {shard}: nothing can be evaluated in its "
                f"{len(numbers)} samples from {reader.source.sample(numbers[0]).key} on: "
                f"{_what_lacks(reader, tried)}{f'; left out: {reasons}' if reasons else ''}; name other shards or set "
                "evaluation.shards=null"
            )
    return problems


def _gives_something(reader: HeldOutReader, held_out: HeldOut) -> bool:
    names = reader.config.evaluation.probe_labels
    labelled = any(class_of(labels, name) is not None for labels in held_out.labels for name in names)
    return labelled or any(reader.view.readings(sequence.tokens)["pairs"] for sequence in held_out.sequences)


def _what_lacks(reader: HeldOutReader, held_out: HeldOut) -> str:
    if not held_out.pixels:
        return "no image can be read"
    retrieval = "no image has text that announces it" if reader.has_pairs else _no_retrieval(reader)
    return f"{retrieval}, and no image has a label of evaluation.probe_labels {reader.config.evaluation.probe_labels}"


def _no_retrieval(reader: HeldOutReader) -> str:
    return f"objective.name={reader.config.objective.name} trains no image-to-context retrieval"


def _check_labels(reader: HeldOutReader) -> tuple[dict[str, str], list[str]]:
    """Why probes will be left out, by label, and problems with labels that nobody has though others are there.

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
            return {}, []
    reasons = {name: probe.shortage() for name, probe in probes.items()}
    hint = f"; {unusable} x {UNUSABLE_LABELS}" if unusable else ""
    shortages = {name: reason + hint for name, reason in reasons.items() if reason is not None}
    names = ", ".join(repr(name) for name, _ in known.most_common(20))
    misspelt = [
        f"evaluation.probe_labels: no held-out image has the label {name!r}{suggest(name, known)}; they have {names}"
        for name in probes
        if known and name not in known and not probes[name].total()
    ]
    return shortages, misspelt
