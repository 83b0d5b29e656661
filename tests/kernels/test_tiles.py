"""Which tile a kernel runs with, and how many programs of it."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lcl_kernels import tiles
from lcl_kernels.tiles import TUNED_FILE, Tile, TunedTile, nearest_tuned, read_tuned


def record(kernel="logits", width=768, columns=49_411, device="GPU", rows=128):
    return TunedTile(device, kernel, width, columns, Tile(rows, 128, 64, 8, 3))


def test_the_file_of_the_package_can_be_read_and_names_kernels_that_exist():
    assert all(found.kernel in tiles.TILES for found in read_tuned(TUNED_FILE))


def test_the_nearest_shape_of_the_same_device_and_kernel_is_taken():
    records = (record(), record(width=4096), record(columns=128_256), record("statistics"), record(device="other"))
    nearest = lambda *shape: nearest_tuned(records, "GPU", "logits", *shape)  # noqa: E731
    assert nearest(768, 49_411) is records[0]
    assert nearest(800, 200_000) is records[2]
    assert nearest(4000, 49_411) is records[1]
    assert nearest_tuned(records, "GPU", "gradient", 768, 49_411) is None
    assert nearest_tuned(records, "GPU 2", "logits", 768, 49_411) is None


def test_a_later_record_of_the_same_shape_replaces_an_earlier_one():
    records = (record(), record(rows=64))
    assert nearest_tuned(records, "GPU", "logits", 768, 49_411) is records[1]


def test_a_file_of_winners_is_laid_over_that_of_the_package(tmp_path, monkeypatch):
    path = tmp_path / "winners.json"
    won = {"device": "GPU", "kernel": "logits", "width": 512, "columns": 1000, "time_ms": 1.0}
    path.write_text(json.dumps([won | {"tile": Tile(64, 64, 32, 4, 2, 2, 16)._asdict()}]))
    monkeypatch.setenv("LCL_KERNELS_TUNED", str(path))
    tiles.tuned_tiles.cache_clear()
    try:
        assert tiles.tuned_tiles()[-1] == TunedTile("GPU", "logits", 512, 1000, Tile(64, 64, 32, 4, 2, 2, 16))
    finally:
        tiles.tuned_tiles.cache_clear()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"device": "GPU"}]', '[{"tile": {"rows": 1}}]'])
def test_another_file_is_named(tmp_path, text):
    path = tmp_path / "winners.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"winners\.json is not a list of tuned tiles"):
        read_tuned(path)


def test_aligned_operands_take_the_tuned_tile_and_others_do_not(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "target_of", lambda like: tiles.HOPPER)
    monkeypatch.setattr(tiles, "tuned_tiles", lambda: (record(rows=64),))
    monkeypatch.setattr(tiles, "device_name", lambda like: "GPU")
    a, b = torch.zeros(8, 768, dtype=torch.bfloat16), torch.zeros(16, 768, dtype=torch.bfloat16)
    assert tiles.tile_on("logits", a, b).rows == 64
    assert tiles.tile_on("statistics", a, b) == tiles.TILES["statistics"][tiles.HOPPER]
    assert tiles.tile_on("logits", a[:, :767], b[:, :767]).rows == 64
    assert tiles.tile_on("logits", a.view(-1, 3)[:, :2], b) == tiles.TILES[tiles.POINTERS][tiles.HOPPER]
    assert tiles.tile_on("logits", a.float(), b.float()) == tiles.FLOAT32_TILE


def test_multiprocessors_are_left_free_when_there_are_other_ranks(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles.torch.cuda, "get_device_properties", lambda d: SimpleNamespace(multi_processor_count=132))
    like, tile = torch.zeros(1), Tile(128, 128, 64, 8, 3, programs=2)
    assert tiles.programs_on(like, tile) == 264
    for ranks, programs in ((1, 264), (2, 2 * (132 - tiles.SPARE_MULTIPROCESSORS))):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda ranks=ranks: ranks)
        assert tiles.programs_on(like, tile) == programs


def test_a_slice_of_a_gpu_runs_a_program_also_when_there_are_other_ranks(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "multiprocessors", lambda like: tiles.SPARE_MULTIPROCESSORS)
    monkeypatch.setattr(tiles, "_other_ranks", lambda: True)
    assert tiles.programs_on(torch.zeros(1), Tile(128, 128, 64, 8, 3, programs=2)) == 2
