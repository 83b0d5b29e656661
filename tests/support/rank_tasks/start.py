"""Tasks of ranks about what they look at together before a run begins."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import distributed as dist

from lcl_ds.data.corpus import open_data
from lcl_ds.data.shards import shard as shard_module
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.team import open_together
from lcl_ds.errors import UserError
from lcl_ds.training.distributed import RankInfo, gather_to_first, on_all_ranks, team_of
from lcl_ds.training.exchange import Exchange
from lcl_ds.training.run_folder import check_same_settings, check_seen_by_all
from tests.support.small import small_config
from tests.support.tars import write_tar


def shared_data(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Which headers and indices each rank reads of shards that the ranks open together, and what they all hold then.

    By case: there are no indices, there are, none can be written anywhere, and none beside the shards while each rank
    has a cache of its own, as on hosts of their own.
    """
    tars = [folder.parent / f"shards/{n}.tar" for n in range(7)]
    if rank_info.is_first:
        tars[0].parent.mkdir()
        for n, tar in enumerate(tars):
            write_tar(tar, [(f"{n}{i}.json", b"{}") for i in range(n + 1)])
    dist.barrier()
    results = {}
    counted = {"scans": shard_module.scan_shard, "checks": shard_module.read_facts}
    caches = {
        "first start": (folder, True),
        "second start": (folder, True),
        "nothing can be written": (folder.parent / "shards/0.tar", False),
        "own caches": (folder / str(rank_info.rank), False),
    }
    for case, (cache, may_write_beside) in caches.items():
        dist.barrier()  # the others have read what they need of the case before
        if not may_write_beside and rank_info.is_first:
            for tar in tars:
                beside = Path(f"{tar}.index")
                if beside.is_file():
                    beside.unlink()
                beside.mkdir(exist_ok=True)
        dist.barrier()
        calls: dict[str, list[str]] = {name: [] for name in counted}

        def noting(name: str, calls: dict[str, list[str]] = calls) -> Any:
            def called(location: str, *rest: Any) -> Any:
                calls[name].append(location)
                return counted[name](location, *rest)

            return called

        shard_module.scan_shard, shard_module.read_facts = noting("scans"), noting("checks")
        team = team_of(replace(rank_info, local_rank=0) if case == "own caches" else rank_info)
        opened = open_together([*map(str, tars)], cache, team)
        at_start = len(calls["scans"])
        source = Source("s", [shard for shard in opened.shards if shard])
        keys = [source.sample(i).key for i in range(len(source))]  # which scans where an index is out of reach
        results[case] = {
            "scans at the start": at_start,
            "calls": {name: [Path(path).name for path in paths] for name, paths in calls.items()},
            "keys": keys,
            "fingerprint": source.fingerprint(),
        }
    shard_module.scan_shard, shard_module.read_facts = counted["scans"], counted["checks"]
    return results


def checks_at_the_start(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """What each rank hears at the start where ranks differ in what they see, as on hosts without a common disk."""
    own = folder / f"disk{rank_info.rank}"
    common = folder / "common"
    for place in (own, common):
        place.mkdir(parents=True, exist_ok=True)
    if rank_info.is_first:
        write_tar(own / "a.tar", [("0.json", b"{}")])
        write_tar(own / "b.tar", [("0.json", b"{}")])
        write_tar(common / "a.tar", [("0.json", b"{}")])
        (common / "broken.tar").write_bytes(b"no tar" * 999)
    write_tar(own / "own.tar", [(f"{rank_info.rank}.json", b"{}")])
    dist.barrier()
    # One process for each host, each in a folder of its own.
    team = team_of(replace(rank_info, local_rank=0))
    os.chdir(own)
    tokenizer = folder.parent / "tokenizer"

    def data(*paths: str) -> Any:
        overrides = [f"data.shards={[*paths]}", f"data.tokenizer={tokenizer}", f"data.cache={own}/cache"]
        return open_data(small_config(*overrides).data, team)

    actions = {
        "folder of all": lambda: check_seen_by_all(common, rank_info),
        "own folders": lambda: check_seen_by_all(own, rank_info, patience_s=0.3),
        "same settings": lambda: check_same_settings(small_config(), {"a": {"b": 1}}, rank_info),
        "other settings": lambda: check_same_settings(
            small_config(f"train.seed={rank_info.rank}"), {"a": {"b": 1, "c": rank_info.rank}}, rank_info
        ),
        "shards that one host lacks": lambda: data("a.tar", "b.tar"),
        "a broken shard": lambda: data(f"{common}/*.tar"),
        "no shards": lambda: data("none-*.tar"),
        "a command on each host": lambda: data(f"pipe:echo >> runs; cat {common}/a.tar"),
        "a command that fails on some hosts": lambda: data("pipe:cat $PWD/a.tar"),
        "a command that writes something else on each host": lambda: data("pipe:cat own.tar"),
    }
    told = {}
    for name, action in actions.items():
        try:
            with on_all_ranks(rank_info):
                action()
            told[name] = []
        except UserError as error:
            told[name] = error.problems
    told["gathered"] = [gather_to_first(rank_info.rank), Exchange(rank_info, row=[rank_info.rank, 7]).read()[1]]
    told["left"] = [path.name for path in common.iterdir() if "seen_by_all" in path.name]
    return told
