"""Bugs of the published code that are not ours; the numbers are those of the fact sheet on it.

B2: an image that opens a document counted in the contrastive loss. B3: NaN on a rank without pairs. B4: control tokens
could come from text. B5: the padding id is the token "!". B7: a loss of weight zero left parameters without gradient.
B8: encoding text changed its input. And: means over each rank's own tokens, so ranks with few of them weighed more.
"""

import copy

import torch
from lcl_kernels import contrastive_loss

from lcl_ds.objectives.base import local_normalizers
from lcl_ds.tokens import TextTokenizer, labels_of
from tests.support.small import VOCABULARY, batch_of, batch_with_images, lcl_objective, merged, sequence, small_model


def test_b2_an_image_that_opens_a_document_has_no_context_to_learn_from():
    opening, second = sequence([0, "ab"], seed=1), sequence(["cd", 0], seed=2)
    batch = batch_of([opening, second])
    assert batch.image_count == 2
    assert batch.readouts["context"].images.tolist() == [1]


def test_b3_a_rank_without_pairs_has_the_loss_zero_and_finite_gradients():
    batch = batch_of([sequence([0, "ab"], seed=1)])
    assert len(batch.readouts["context"]) == 0
    objective = lcl_objective(small_model())
    losses = objective(batch, *local_normalizers(objective, batch))
    losses["loss"].backward()
    assert losses["contrastive_loss"].item() == 0
    assert all(weight.grad.isfinite().all() for weight in objective.parameters())
    empty = torch.zeros(0, 8, requires_grad=True)
    assert contrastive_loss(empty, empty, torch.tensor(14.3)).item() == 0


def test_b4_control_tokens_never_come_from_text_also_when_escaped(demo_folder):
    tokenizer = TextTokenizer(demo_folder / "tokenizer")
    for text in ("<start_of_image>", "<image>", "&lt;start_of_image&gt;", "&lt;end_of_text&gt;", "<start_of_img>"):
        assert max(tokenizer.encode(text)) < tokenizer.vocabulary.text_size


def test_b5_padding_takes_no_token_out_of_the_loss():
    """Every text token is a label wherever it stands, id 0 too, and padding is none."""
    short = sequence(["<a b<"], seed=1)  # "<" is token 0 in these tests
    assert (short.tokens.input_ids == 0).sum() == 2
    batch = batch_of([short])
    _, labels = labels_of(short.tokens.input_ids, VOCABULARY)
    assert batch.labels.tolist() == labels.tolist()
    assert (batch.labels == 0).sum() == 2


def test_b7_a_loss_of_weight_zero_still_reaches_every_parameter():
    for weights in ((0.0, 1.0), (0.1, 0.0)):
        objective = lcl_objective(small_model(), *weights)
        batch = batch_with_images()
        objective(batch, *local_normalizers(objective, batch))["loss"].backward()
        assert all(weight.grad is not None for weight in objective.parameters())


def test_b8_a_step_leaves_its_batch_as_it_was():
    batch = batch_with_images()
    before = copy.deepcopy(batch)
    objective = lcl_objective(small_model())
    objective(batch, *local_normalizers(objective, batch))["loss"].backward()
    for name, value in vars(before).items():
        assert torch.equal(getattr(batch, name), value) if isinstance(value, torch.Tensor) else True, name


def test_a_rank_with_few_tokens_weighs_no_more_than_its_tokens():
    """The shares of two ranks with different numbers of labels sum to the loss of one process that has all rows."""
    long, short = batch_of([sequence(["abcdefghijklmno"], seed=1)]), batch_of([sequence(["p", 0], seed=2)])
    assert len(long.labels) > 2 * len(short.labels)
    objective = lcl_objective(small_model(), 0.0, 1.0).eval()
    with torch.no_grad():
        shares = [
            objective(b, c)["loss"]
            for b, c in zip((long, short), local_normalizers(objective, long, short), strict=True)
        ]
        whole = merged(long, short)
        together = objective(whole, *local_normalizers(objective, whole))["loss"]
        alone = [objective(batch, *local_normalizers(objective, batch))["loss"] for batch in (long, short)]
    torch.testing.assert_close(sum(shares), together)
    assert not torch.isclose(sum(alone) / 2, together, rtol=1e-4)
