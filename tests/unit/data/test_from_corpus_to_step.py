"""Every published format, from its files to three training steps."""

import pytest
import torch

from lcl_ds.assembly import lane_settings
from lcl_ds.data.__main__ import main
from lcl_ds.data.corpus import open_data
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.models.build import build_model
from lcl_ds.objectives import build_objective
from lcl_ds.objectives.base import local_normalizers
from tests.support.corpora import MAKERS, PARQUET
from tests.support.small import small_config


@pytest.mark.parametrize("name", MAKERS)
def test_built_checked_and_trained_on(name, tmp_path, demo_folder):
    if name in PARQUET:
        pytest.importorskip("pyarrow")
    corpus = MAKERS[name](tmp_path / "corpus", 12)
    images = ["--images", *map(str, corpus.images)] if corpus.images else []
    out = tmp_path / "shards"
    assert main(["build", *map(str, corpus.sources), str(out), "--format", name, *images, "--workers", "1"]) == 0
    assert main(["check", str(out / "shards.txt"), "--workers", "1"]) == 0
    config = small_config(
        f"data.shards={out / 'shards.txt'}",
        f"data.tokenizer={demo_folder / 'tokenizer'}",
        *("data.row_tokens=160", "data.lanes=1", "data.pack_window=8", "train.global_batch_rows=2"),
    )
    data = open_data(config.data)
    loader = BatchLoader(data.sources, lane_settings(config), data.tokenizer, rows_per_batch=2)
    model = build_model(config.model, data.tokenizer.vocabulary.size, config.data.row_tokens, seed=0)
    objective = build_objective(model, config.objective, seed=0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        batch = next(loader)
        assert batch.image_count > 0
        assert batch.skipped_samples == 0
        loss = objective(batch, *local_normalizers(objective, batch))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
