"""Where a process stands among those that were started together, from the variables of its launcher."""

import os

import pytest

from lcl_ds.errors import UserError
from lcl_ds.tasks import TASK_VARIABLES, fill_environment, first_host, task_count, task_number

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def started(monkeypatch):
    """Fill the environment of a process that was started with these variables; returns what torch reads."""

    def started(**variables):
        foreign = [name for name in os.environ if name.startswith(("SLURM", "OMPI", "PMI"))]
        for name in {*NAMES, *foreign}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        counted = task_number(), task_count()
        fill_environment()
        actual = tuple(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
        assert counted == (int(actual[0]), int(actual[1]))
        for name in NAMES:  # set by hand, so not undone by the fixture
            monkeypatch.setenv(name, os.environ.get(name, ""))
        return actual

    return started


TASK_3 = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


def test_a_process_alone_is_the_only_rank(started):
    assert started()[:4] == ("0", "1", "0", "127.0.0.1")
    assert started(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_JOB_ID="7")[:4] == ("0", "1", "0", "127.0.0.1")


def test_a_launcher_s_own_variables_stand(started):
    given = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert started(**given, **TASK_3) == ("2", "4", "0", "a", "1")


def test_tasks_of_srun_meet_on_the_first_host_at_a_port_of_the_job(started):
    job = {**TASK_3, "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "localhost,node[2-4]"}
    assert started(**job) == ("3", "8", "1", "localhost", "24567")
    other_job = started(**job | {"SLURM_JOB_ID": "1234568"})
    assert other_job[-1] == "24568"


def test_a_host_without_a_name_here_is_reached_as_srun_says(started):
    job = {**TASK_3, "SLURM_JOB_NODELIST": "no-such-host.invalid", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    assert started(**job)[3] == "127.0.0.1"
    assert started(**TASK_3, SLURM_LAUNCH_NODE_IPADDR="10.0.0.7")[3] == "10.0.0.7"


def test_address_and_port_that_are_set_stand(started):
    job = {**TASK_3, "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "localhost"}
    assert started(**job, MASTER_ADDR="127.0.0.1")[3:] == ("127.0.0.1", "20005")
    assert started(**job, MASTER_PORT="4242")[3:] == ("localhost", "4242")
    assert started(**TASK_3, MASTER_ADDR="127.0.0.1")[3:] == ("127.0.0.1", "29500")


def test_tasks_of_mpirun_within_a_slurm_job_are_those_of_mpirun(started):
    mpi = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
    batch_step = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "localhost"}
    assert started(**mpi, **batch_step)[:3] == ("2", "4", "2")


@pytest.mark.parametrize("size, rank, _", TASK_VARIABLES)
def test_tasks_that_cannot_know_where_to_meet_are_refused(started, size, rank, _):
    with pytest.raises(UserError, match=r"one of 2 tasks .* export MASTER_ADDR"):
        started(**{size: "2", rank: "1"})


def test_a_process_within_an_allocation_is_alone(started):
    assert started(SLURM_NTASKS="4", SLURM_JOB_NODELIST="localhost")[:2] == ("0", "1")


def test_a_rank_without_an_address_is_refused(started):
    with pytest.raises(UserError, match="MASTER_ADDR is not"):
        started(RANK="1", WORLD_SIZE="2")


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node1,node2", "node1"),
        ("node[003-010,12],other", "node003"),
        ("gpu-[1,3]-[02-04].x.org", "gpu-1-02.x.org"),
    ],
)
def test_the_first_of_slurm_s_hosts(hosts, first):
    assert first_host(hosts) == first
