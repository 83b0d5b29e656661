"""What one rank finds wrong is printed once, with rank and host, and ends the others as well."""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.ranks import ROOT, Ranks, free_port, rank_environment, train_command

HOST = socket.gethostname()


@pytest.fixture
def command(recipe, tmp_path):
    return train_command(recipe, tmp_path / "run", "train.steps=2", "evaluation.shards=null")


class RanksOfTwoHosts(Ranks):
    """Two ranks that are the first of their hosts; a relative path of the second leads to nothing: it lacks a mount."""

    def __init__(self, command: list[str], folders: list[Path], log: Path):
        port = free_port()
        command = [command[0], str(ROOT / command[1]), *command[2:]]
        self.logs = [log.with_name(f"{log.name}.rank{rank}") for rank in (0, 1)]
        self.processes = [
            subprocess.Popen(
                command,
                env=rank_environment(rank, 2, port) | {"LOCAL_RANK": "0"},
                cwd=folders[rank],
                stdout=self.logs[rank].open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank in (0, 1)
        ]


def test_a_problem_of_one_rank_is_printed_by_the_first_and_ends_both(recipe, command, tmp_path):
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    for host in hosts:
        (host / "mounted").mkdir(parents=True)
    for shard in recipe.parent.glob("corpus/train-pairs-*.tar"):
        shutil.copy(shard, hosts[0] / "mounted")
    ds_config = ROOT / command[command.index("--ds_config") + 1]
    command[command.index("--ds_config") + 1] = str(ds_config)
    ranks = RanksOfTwoHosts([*command, "data.shards=mounted/*.tar"], hosts, tmp_path / "log")
    assert ranks.wait(300) == [2, 2], ranks.output()
    message = f"error: rank 1 on {HOST}: data.shards: shard mounted/train-pairs-"
    assert ranks.output().count("is not on this host") == 1
    assert message in ranks.logs[0].read_text()


def test_a_rank_that_reaches_nobody_speaks_for_itself(command):
    environment = rank_environment(1, 2, free_port())
    impatient = "import sys; from lcl_ds.training import distributed; distributed.PATIENCE_S = 5; "
    impatient += "from launch.train import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*command[2:], "train.steps=many"]
    done = subprocess.run(
        [command[0], "-c", impatient, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert f"error: rank 1 on {HOST}: command line: train.steps: " in done.stderr


def test_a_run_without_finite_gradients_ends_with_a_sentence(recipe, tmp_path):
    """The learning rate is such that weights overflow after the first step; all ranks have the same problem."""
    overrides = ["train.learning_rate=1.0e+20", "train.weight_decay=0", "train.warmup_steps=0"]
    overrides += ["train.max_skipped_steps=2", "evaluation.shards=null"]
    ranks = Ranks(2, train_command(recipe, tmp_path / "run", *overrides), tmp_path / "log")
    assert ranks.wait(300) == [2, 2], ranks.output()
    output = ranks.output()
    assert output.count("2 steps in a row were skipped") == 1
    assert "Traceback" not in output
    step = int(output.split("error: step ")[1].split(":")[0])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == step
