"""What ranks do together before a model is built: three of them, each as if on a host of its own."""

import socket
from pathlib import Path

import pytest

from tests.support.ranks import all_on_ranks

SHARDS = [f"{n}.tar" for n in range(7)]
KEYS = [f"{n}{i}" for n in range(7) for i in range(n + 1)]
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def ranks(folder, demo_folder):
    (folder / "tokenizer").symlink_to(demo_folder / "tokenizer")
    return all_on_ranks(3, ["shared_data", "checks_at_the_start"], folder)


def shards_of(ranks, case, call):
    return sorted(name for rank in ranks["shared_data"] for name in rank[case]["calls"][call])


@pytest.mark.parametrize("case", ["first start", "nothing can be written", "own caches"])
def test_each_shard_is_scanned_by_one_rank_and_known_to_all(ranks, case):
    assert shards_of(ranks, case, "scans") == SHARDS
    assert [rank[case]["scans at the start"] for rank in ranks["shared_data"]] == [3, 2, 2]
    assert [rank[case]["keys"] for rank in ranks["shared_data"]] == [KEYS] * 3
    assert len({str(rank[case]["fingerprint"]) for rank in ranks["shared_data"]}) == 1


def test_where_there_are_indices_each_is_checked_by_one_rank(ranks):
    assert shards_of(ranks, "second start", "scans") == []
    assert shards_of(ranks, "second start", "checks") == SHARDS
    assert [rank["second start"]["keys"] for rank in ranks["shared_data"]] == [KEYS] * 3


def heard(ranks, case):
    """The sentences about a case, which all ranks hear."""
    told = [rank[case] for rank in ranks["checks_at_the_start"]]
    assert told == [told[0]] * 3
    return told[0]


def test_a_run_folder_that_not_all_ranks_see_is_refused_and_those_ranks_are_named(ranks, folder):
    assert heard(ranks, "folder of all") == []
    problems = heard(ranks, "own folders")
    assert len(problems) == 2
    for rank, problem in enumerate(problems, start=1):
        assert problem.startswith(
            f"rank {rank} on {HOST}: --run_dir {folder}/checks_at_the_start/disk{rank}: what rank 0"
        )
        assert problem.endswith("name a folder on a disk that all hosts share, by the same path everywhere")
    assert heard(ranks, "left") == []


def test_settings_that_differ_between_ranks_are_named(ranks):
    assert heard(ranks, "same settings") == []
    assert heard(ranks, "other settings") == [
        f"ranks 1, 2 on {HOST}: recipe: train.seed; ds_config: a.c: the value here is not rank 0's; start all ranks "
        "with the same recipe, ds_config and arguments"
    ]


def test_a_host_that_lacks_shards_is_named(ranks):
    problems = heard(ranks, "shards that one host lacks")
    assert [problem for problem in problems if problem.startswith(f"ranks 1, 2 on {HOST}: data.shards: shard a")]
    assert all("shard" in problem for problem in problems)


def test_what_is_wrong_with_a_shard_or_a_path_is_said_once(ranks, folder):
    (broken,) = heard(ranks, "a broken shard")
    assert broken.startswith(f"data.shards: data: shard {folder}/checks_at_the_start/common/broken.tar: cannot be read")
    assert heard(ranks, "no shards") == ["data.shards: data: data path none-*.tar: no such file"]


def test_a_command_runs_once_on_each_host_and_must_write_the_same_everywhere(ranks, folder):
    assert heard(ranks, "a command on each host") == []
    runs = [(folder / f"checks_at_the_start/disk{rank}/runs").read_text() for rank in range(3)]
    assert runs == ["\n"] * 3
    (problem,) = heard(ranks, "a command that fails on some hosts")
    assert problem.startswith(f"ranks 1, 2 on {HOST}: data.shards: data path pipe:cat $PWD/a.tar: the command ended")
    (problem,) = heard(ranks, "a command that writes something else on each host")
    assert problem.startswith(f"ranks 1, 2 on {HOST}: data.shards: shard pipe:")
    assert problem.endswith("the command writes something else on this host than on others")


def test_values_of_all_ranks_come_in_their_order(ranks):
    gathered = [rank["gathered"] for rank in ranks["checks_at_the_start"]]
    assert [to_first for to_first, _ in gathered] == [[0, 1, 2], None, None]
    assert [to_all for _, to_all in gathered] == [[[0, 7], [1, 7], [2, 7]]] * 3
