"""The preflight: what it prints and how it ends, on ranks of its own."""

import re
import subprocess
from pathlib import Path

from lcl_ds.training.preflight import by_host
from tests.support.ranks import ROOT, Ranks, free_port, rank_environment, train_command

CHECKS = ["versions", "devices", "settings", "data", "run folder", "disk", "clocks", "all-reduce"]


class PreflightRanks(Ranks):
    """Two ranks with a command each."""

    def __init__(self, commands: list[list[str]], log: Path):
        port = free_port()
        self.logs = [log.with_name(f"{log.name}.rank{rank}") for rank in (0, 1)]
        self.processes = [
            subprocess.Popen(
                [*command, "--preflight"],
                env=rank_environment(rank, 2, port),
                cwd=ROOT,
                stdout=self.logs[rank].open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank, command in enumerate(commands)
        ]


def table_of(output: str) -> dict[str, str]:
    """What each check of the table ends with."""
    rows = re.findall(r"^│ (\S[^│]*?) +│.*│ (\w*) *│$", output, re.MULTILINE)
    return dict(rows)


def test_a_job_that_fits_is_told_so_and_leaves_nothing(recipe, tmp_path):
    command = train_command(recipe, tmp_path / "run")
    ranks = PreflightRanks([command, command], tmp_path / "log")
    assert ranks.wait(170) == [0, 0], ranks.output()
    output = ranks.logs[0].read_text()
    assert table_of(output) == dict.fromkeys(CHECKS, "ok")
    assert re.search(r"documents 160 samples, pairs 120 samples; 5 shards, of which each rank opened 3 at most", output)
    assert re.search(r"16 MiB in [\d.]+ ms, best of 3: [\d.]+ GB/s", output)
    assert "2 x CPU rank" in output
    assert not (tmp_path / "run").exists()
    assert "check" not in ranks.logs[1].read_text()


def test_everything_that_is_wrong_is_said_at_once_by_the_first_rank(recipe, tmp_path):
    commands = [train_command(recipe, tmp_path / f"disk{rank}", f"train.seed={rank}") for rank in (0, 1)]
    ranks = PreflightRanks(commands, tmp_path / "log")
    assert ranks.wait(170) == [2, 2], ranks.output()
    output = ranks.logs[0].read_text()
    assert table_of(output) == dict.fromkeys(CHECKS, "ok") | {"settings": "wrong", "run folder": "wrong"}
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "recipe: train.seed: the value here is not rank 0's" in errors[0]
    assert "name a folder on a disk that all hosts share" in errors[1]
    assert "error" not in ranks.logs[1].read_text()


def test_hosts_are_named_where_they_differ():
    assert by_host([("a", "H100"), ("a", "H100")]) == "2 x H100"
    assert by_host([("a", "H100"), ("b", "H100")]) == "2 hosts with 1 x H100"
    mixed = [("a", "H100"), ("a", "H100"), ("b", "H100"), ("b", "A100"), ("c", "H100"), ("c", "H100")]
    assert by_host(mixed) == "a, c: 2 x H100\nb: 1 x H100, 1 x A100"
