"""Solvers and scores against independent truths: the condition of the optimum, textbook attention, brute force."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lcl_ds.data.documents import Document
from lcl_ds.data.stream.packing import PackedSequence
from lcl_ds.errors import UserError
from lcl_ds.evaluation import caption
from lcl_ds.evaluation.attentive import AttentiveHead, AttentiveSettings, attentive_probe
from lcl_ds.evaluation.caption import Captioner, CaptionSettings, captions_of, new_captioner, train_captioner
from lcl_ds.evaluation.features import PatchTokens
from lcl_ds.evaluation.fewshot import fewshot
from lcl_ds.evaluation.intervals import bootstrap, of_mean, wilson
from lcl_ds.evaluation.neighbours import knn
from lcl_ds.evaluation.probe import fit_logistic
from lcl_ds.evaluation.retrieval import best_ranks, pair_features
from lcl_ds.evaluation.text import TextReader
from lcl_ds.models.build import build_model
from lcl_ds.tokens import TextTokenizer
from tests.support.small import small_config


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def problem():
    """Correlated features of three classes."""
    classes = torch.arange(300) % 3
    features = random(300, 20, dtype=torch.float64) @ random(20, 20, seed=1, dtype=torch.float64)
    return features + 2 * F.one_hot(classes, 20), classes


@pytest.mark.parametrize("turned", [True, False])
def test_a_linear_probe_is_at_the_one_optimum_of_its_loss(problem, turned, monkeypatch):
    """There the gradient is zero, by hand in float64; scikit-learn's LogisticRegression has the same loss."""
    monkeypatch.setattr("lcl_ds.evaluation.probe.MOST_TURNED", 2048 if turned else 0)
    features, classes = problem
    penalties = [1e-1, 1e-3]
    for penalty, classifier in zip(penalties, fit_logistic(features, classes, 3, penalties, 2000, 1e-14), strict=True):
        chances = torch.softmax(features @ classifier.weight + classifier.bias, 1).numpy()
        wrong = (chances - np.eye(3)[classes]) / len(features)
        slope = features.numpy().T @ wrong + 2 * penalty * classifier.weight.numpy()
        assert np.abs(slope).max() < 1e-5
        assert np.abs(wrong.sum(0)).max() < 1e-5


def test_the_attentive_head_is_multi_head_attention_with_one_query():
    head = AttentiveHead(24, 5, heads=4)
    torch_attention = nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        for weight in head.parameters():
            weight += 0.3 * random(*weight.shape)
        torch_attention.in_proj_weight.copy_(torch.cat([head.q.weight, head.k.weight, head.v.weight]))
        torch_attention.in_proj_bias.copy_(torch.cat([head.q.bias, torch.ones(24), head.v.bias]))
        torch_attention.out_proj.load_state_dict(head.proj.state_dict())
        patches = random(3, 7, 24, seed=2)
        tokens = head.norm(patches)
        pooled, _ = torch_attention(head.query.expand(3, 1, -1), tokens, tokens)
        torch.testing.assert_close(head(patches), head.output(pooled[:, 0]))
    assert AttentiveHead(9, 2, heads=4).heads == 3


def needle(count=240, tokens=6, width=8):
    """Images of which one patch, anywhere, says the class and the others say another one at random."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 2, count)
    patches = 0.1 * rng.standard_normal((count, tokens, width))
    patches[..., 0] += rng.choice([-1, 1], (count, tokens))
    where = rng.integers(0, tokens, count)
    patches[np.arange(count), where, 0] = 2 * classes - 1
    patches[np.arange(count), where, 1] = 3
    return torch.from_numpy(patches).float(), torch.from_numpy(classes)


def test_an_attentive_probe_finds_the_patch_that_tells_and_leaves_no_trace():
    patches, classes = needle()
    before = torch.random.get_rng_state()
    settings = AttentiveSettings(epochs=15, batch_size=32, learning_rate=1e-2)
    hits = attentive_probe(lambda rows: patches[rows], classes, torch.arange(160), torch.arange(160, 240), settings)
    assert hits.float().mean() > 0.9
    assert torch.equal(torch.random.get_rng_state(), before)
    again = attentive_probe(lambda rows: patches[rows], classes, torch.arange(160), torch.arange(160, 240), settings)
    assert torch.equal(hits, again)


@pytest.mark.parametrize(("budget", "calls"), [(1 << 20, [1, 4]), (0, [1, 2, 2])])
def test_patch_tokens_are_kept_where_they_fit_and_else_made_anew(budget, calls):
    patches, asked = random(4, 3, 2), []

    def encoded(rows):
        asked.append(len(rows))
        yield from patches[list(rows)].split(2)

    kept = PatchTokens(encoded, 4, budget)
    for _ in range(2):
        assert torch.equal(kept.of(torch.tensor([3, 1])), patches[[3, 1]])
    assert asked == calls


def test_neighbours_vote_by_the_formula():
    features, classes = random(90, 6), torch.arange(90) % 4
    train, test = torch.arange(60), torch.arange(60, 90)
    x = features.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    expected = []
    for number in test.tolist():
        cosine = x[:60] @ x[number]
        nearest = np.argsort(-cosine)[:7]
        votes = [np.exp(cosine[nearest] / 0.07)[classes.numpy()[nearest] == c].sum() for c in range(4)]
        expected.append(int(np.argmax(votes)) == int(classes[number]))
    assert knn(features, classes, train, test, neighbours=7).tolist() == expected


def test_ranks_are_those_of_a_loop_over_images_with_several_captions():
    images, texts, owner = random(12, 5), random(30, 5, seed=1), torch.arange(30) % 12
    texts[20] = texts[3]  # two images with the same text
    own = torch.arange(12)

    def rank(query, targets, mine):
        scores = [float(query.double() @ target.double()) for target in targets]
        best = max(score for score, is_mine in zip(scores, mine, strict=True) if is_mine)
        return 1 + sum(score >= best for score, is_mine in zip(scores, mine, strict=True) if not is_mine)

    assert best_ranks(images, texts, own, owner).tolist() == [rank(images[i], texts, owner == i) for i in range(12)]
    assert best_ranks(texts, images, owner, own).tolist() == [
        rank(texts[i], images, own == owner[i]) for i in range(30)
    ]


def test_few_shots_need_as_many_images_of_each_class():
    classes = torch.arange(40) % 2
    features = random(40, 4) + 3 * F.one_hot(classes, 4)
    assert fewshot(features, classes, torch.arange(20), torch.arange(20, 40), 11) is None
    accuracies = fewshot(features, classes, torch.arange(20), torch.arange(20, 40), 5)
    assert len(accuracies) == 10
    assert accuracies.mean() > 0.8


def test_intervals_are_those_of_the_textbook():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
    assert of_mean(np.array([1.0, 3.0])) == pytest.approx((2 - 1.96, 2 + 1.96), abs=1e-3)
    values = np.random.default_rng(1).standard_normal(400)
    low, high = bootstrap(lambda rows: float(values[rows].mean()), 400)
    assert (low, high) == pytest.approx((values.mean() - 1.96 / 20, values.mean() + 1.96 / 20), abs=0.02)


@pytest.mark.parametrize("objective", ["lcl", "clip"])
def test_a_text_alone_has_the_feature_that_it_has_before_an_image(demo_folder, objective):
    config = small_config(f"data.tokenizer={demo_folder}/tokenizer", f"objective.name={objective}")
    tokenizer = TextTokenizer(config.data.tokenizer)
    model = build_model(config.model, tokenizer.vocabulary.size, config.data.row_tokens, seed=0).eval()
    reader = TextReader(model, config)
    texts = ["a red circle", "a blue square and a small green star", "a"]
    sequences = []
    for text in texts:
        (tokens,) = reader._view.encode(
            Document("d", (text, 0), ("jpg",), is_pair=True), reader._sequencer, np.random.default_rng(0)
        )
        sequences.append(PackedSequence("d", tokens, np.zeros((1, 3, 16, 16), np.uint8)))
    contexts = []
    for sequence in sequences:  # one by one, for packing has its own order
        contexts.append(pair_features(model, [sequence], tokenizer.vocabulary, config.data.row_tokens, 9).context)
    torch.testing.assert_close(reader.features(texts), torch.cat(contexts), rtol=1e-4, atol=1e-5)
    assert reader.features(["word " * 200]).isfinite().all()  # longer than a row
    with pytest.raises(UserError, match="nothing that the tokenizer knows"):
        reader.features([""])


def test_a_captioner_learns_what_two_pictures_show(demo_folder):
    tokenizer = TextTokenizer(demo_folder / "tokenizer")
    patches = F.one_hot(torch.arange(16) % 2, 2).float()[:, None].expand(-1, 3, -1) * 4 - 2
    captions = [["a red circle"] if i % 2 else ["a blue square"] for i in range(16)]
    settings = CaptionSettings(epochs=30, batch_size=8, learning_rate=3e-3, width=64, layers=1, longest=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        captioner = new_captioner(2, 3, tokenizer, settings, None)
        train_captioner(captioner, lambda rows: patches[rows], captions, torch.arange(16), settings)
    assert isinstance(captioner, Captioner)
    made = captions_of(captioner, lambda rows: patches[rows], torch.arange(4), beams=2)
    assert made == [text for (text,) in captions[:4]]


def test_bleu_of_counts_is_the_formula_of_papineni():
    counts = np.array([10, 9, 8, 7, 5, 3, 2, 1, 10, 12], dtype=float)
    expected = np.exp(1 - 12 / 10) * (5 / 10 * 3 / 9 * 2 / 8 * 1 / 7) ** 0.25
    assert caption._bleu_of(counts) == pytest.approx(expected, rel=1e-6)


def test_without_the_package_that_scores_captions_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match=r"pip install 'lcl_ds\[caption\]'"):
        caption.require_scorer()
