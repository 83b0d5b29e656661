"""Three ranks open the shards of a run together."""

import pytest

from tests.support.ranks import on_ranks

SHARDS = [f"{n}.tar" for n in range(7)]
KEYS = [f"{n}{i}" for n in range(7) for i in range(n + 1)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(3, "shared_data", tmp_path_factory.mktemp("together") / "log")


def of_all_ranks(ranks, case, call):
    return sorted(name for rank in ranks for name in rank[case]["calls"][call])


@pytest.mark.parametrize("case", ["first start", "nothing can be written", "own caches"])
def test_each_shard_is_scanned_by_one_rank_and_known_to_all(ranks, case):
    assert of_all_ranks(ranks, case, "scans") == SHARDS
    assert [rank[case]["scans at the start"] for rank in ranks] == [3, 2, 2]
    assert [rank[case]["keys"] for rank in ranks] == [KEYS] * 3
    assert len({str(rank[case]["fingerprint"]) for rank in ranks}) == 1


def test_where_there_are_indices_each_is_checked_by_one_rank(ranks):
    assert of_all_ranks(ranks, "second start", "scans") == []
    assert of_all_ranks(ranks, "second start", "checks") == SHARDS
    assert [rank["second start"]["keys"] for rank in ranks] == [KEYS] * 3
