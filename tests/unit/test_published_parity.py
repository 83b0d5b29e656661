"""Our model, batch and loss code against what the published code computed, to the last gradient.

Golden files hold weights, one batch and results (tests/data/golden/README.md); more of them may stand in the folder
that the environment variable LCL_GOLDEN_DIR names. ``python -m tests.unit.test_published_parity`` prints the largest
differences.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lcl_ds.data.sequences import DocumentView
from lcl_ds.data.stream.packing import PackedSequence, Row, collate, pack
from lcl_ds.models.network import LCLModel
from lcl_ds.models.weights.published import load_published, read_published_config, to_published
from lcl_ds.objectives.base import local_normalizers
from tests.support.golden import GOLDEN, Golden, sequences_of
from tests.support.small import lcl_objective

LAYOUTS = ["padded", "packed"]
SHIFTS_OF_KEYS = {"pool_project.pooler.cross_attn.k_bias", "pool_project.pooler.norm1_k.bias"}
"""Adding the same to all keys changes no softmax: these gradients are 0 up to rounding."""


def run(golden: Golden, layout: str) -> tuple[dict[str, torch.Tensor], LCLModel]:
    """Every expected entry as our code computes it, with the model after its backward pass."""
    published_config = read_published_config(golden.config)
    model = load_published(golden.weights, golden.config)
    sequences = sequences_of(golden, published_config)
    length = published_config.context_length
    if layout == "padded":
        rows = [Row((sequence,)) for sequence in sequences]
    else:  # in the order of the file, because features are compared in that order
        lengths = [len(s.tokens.input_ids) for s in sequences]
        length = sum(sorted(lengths)[-2:])
        packed = pack(lengths, [len(s.tokens.slots) for s in sequences], length, 10**6)
        order = sorted(packed, key=min)
        rows = [Row(tuple(sequences[i] for i in sorted(row))) for row in order]
    size, names = published_config.model.vision.hf_keys["image_size"], DocumentView.readout_names
    batch = collate(rows, length, size, published_config.vocabulary, names)
    # The files were computed without --gather-with-grad: keys are constants, also in one process.
    objective = lcl_objective(model, *golden.weighting, gather_with_grad=False)
    losses = objective(batch, *local_normalizers(objective, batch))
    losses["loss"].backward()
    with torch.no_grad():
        hidden, pooled = model(batch)
        image, context = model.pair_features(hidden, pooled, batch)
    actual = {
        "encode_image": F.normalize(pooled, dim=-1),
        "image_features": image,
        "text_features": context,
        "contrastive_loss_weighted": golden.weighting[0] * losses["contrastive_loss"].detach(),
        "generation_loss": losses["generation_loss"].detach(),
        "total_loss": losses["loss"].detach(),
        "logit_scale_exp": model.logit_scale().detach().reshape(()),
    }
    if layout == "packed":  # packing changes the order of the images; bring them back
        where = [i for row in rows for s in row.sequences for i in image_numbers(s, sequences)]
        pairs = [where[i] for i in batch.readouts["context"].images.tolist()]
        actual["encode_image"] = actual["encode_image"][np.argsort(where)]
        for name in ("image_features", "text_features"):
            actual[name] = actual[name][np.argsort(pairs)]
    return actual, model


def image_numbers(sequence: PackedSequence, sequences: list[PackedSequence]) -> range:
    """Numbers of its images in the file."""
    before = sequences[: sequences.index(sequence)] if sequence in sequences else []
    start = sum(len(s.tokens.slots) for s in before)
    return range(start, start + len(sequence.tokens.slots))


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in Frobenius norm."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.fixture(scope="module", params=[(stem, layout) for stem in GOLDEN for layout in LAYOUTS], ids="-".join)
def case(request):
    stem, layout = request.param
    golden = Golden(GOLDEN[stem])
    return golden, *run(golden, layout)


def test_features_and_losses(case):
    golden, actual, _ = case
    assert actual.keys() == golden.expected.keys()
    for name, expected in golden.expected.items():
        assert difference(actual[name], expected) < 1e-5, name


def test_every_gradient(case):
    golden, _, model = case
    ours = to_published({name: weight.grad for name, weight in model.named_parameters()})
    assert ours.keys() == golden.grads.keys()
    for name, expected in golden.grads.items():
        if name in SHIFTS_OF_KEYS:
            assert max(ours[name].norm(), expected.norm()) < 1e-7, name
        else:
            assert difference(ours[name], expected) < 1e-4, name


@pytest.mark.parametrize("stem", GOLDEN)
def test_there_and_back_again_is_bit_exact(stem):
    golden = Golden(GOLDEN[stem])
    again = to_published(load_published(golden.weights, golden.config).state_dict())
    assert again.keys() == golden.weights.keys()
    assert all(torch.equal(again[name], weight) for name, weight in golden.weights.items())


def main() -> None:
    for stem, path in GOLDEN.items():
        for layout in LAYOUTS:
            golden = Golden(path)
            actual, model = run(golden, layout)
            ours = to_published({name: weight.grad for name, weight in model.named_parameters()})
            for name, expected in golden.expected.items():
                print(f"{stem:12} {layout:8} {name:28} {difference(actual[name], expected):.1e}")
            inspected = golden.grads.keys() - SHIFTS_OF_KEYS
            worst = max((difference(ours[name], golden.grads[name]), name) for name in inspected)
            print(f"{stem:12} {layout:8} gradients, {len(inspected):3}               {worst[0]:.1e} ({worst[1]})")


if __name__ == "__main__":
    main()
