"""Which of the processes that were started together this one is, and where they meet; needs neither torch nor time."""

import logging
import os
import re
import socket

from lcl_ds.errors import UserError

logger = logging.getLogger(__name__)

TASK_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)
"""Number of tasks, task and task on its host, as mpirun and srun give them; mpirun may run within a Slurm job."""
DEFAULT_PORT = 29500
FIRST_JOB_PORT, JOB_PORTS = 20000, 10000
"""Ports that Slurm jobs get by their number; below what systems hand out to clients."""


def task_number() -> int:
    """Return this process's number among all that were started together."""
    names = _launcher_variables()
    return int(os.environ.get("RANK") or (os.environ[names[1]] if names else 0))


def task_count() -> int:
    """Count the processes that were started together."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE") or 1)
    names = _launcher_variables()
    return int(os.environ[names[0]]) if names else 1


def _launcher_variables() -> tuple[str, str, str] | None:
    """Find the launcher's variables, where it started several tasks; an allocation alone (``salloc``) numbers none."""
    environment = os.environ
    return next(
        (names for names in TASK_VARIABLES if int(environment.get(names[0]) or 1) > 1 and names[1] in environment), None
    )


def fill_environment() -> None:
    """Set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` where the launcher did not.

    Raises:
        UserError: one of several tasks that cannot know where to meet the others.
    """
    environment = os.environ
    if "RANK" not in environment and (names := _launcher_variables()):
        _follow_launcher(*names)
    if "RANK" not in environment:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    environment.setdefault("LOCAL_RANK", "0")
    if "MASTER_ADDR" not in environment:
        raise UserError("RANK is set, MASTER_ADDR is not: export MASTER_ADDR=<host of rank 0>, or unset RANK")
    environment.setdefault("MASTER_PORT", str(slurm_port()))


def _follow_launcher(size: str, rank: str, local_rank: str) -> None:
    """Set the variables from those of ``srun`` or ``mpirun``."""
    environment = os.environ
    tasks = environment[size]
    address = environment.get("MASTER_ADDR") or slurm_address()
    if address is None:
        raise UserError(
            f"this is one of {tasks} tasks ({size}), and neither MASTER_ADDR nor SLURM_JOB_NODELIST says where they "
            "meet: export MASTER_ADDR=<host of the first task>"
        )
    environment.update(
        RANK=environment[rank],
        WORLD_SIZE=tasks,
        LOCAL_RANK=environment.get(local_rank, "0"),
        MASTER_ADDR=address,
        MASTER_PORT=environment.get("MASTER_PORT") or str(slurm_port()),
    )
    if environment[rank] == "0":
        logger.info("%s tasks meet at %s:%s", tasks, address, environment["MASTER_PORT"])


def slurm_address() -> str | None:
    """Say where the first task runs: the first host of the step or job, else the host that ran ``srun``.

    In a batch job these are the same; from a login node only the first is right.
    """
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not hosts:
        return launcher
    first = first_host(hosts)
    try:
        socket.getaddrinfo(first, None)
    except OSError:
        return launcher or first
    return first


def first_host(hosts: str) -> str:
    """``node[003-010,12],other`` -> ``node003``."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def slurm_port() -> int:
    """Choose a port of this job's own, the same for all its tasks."""
    job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if not job.isdigit():
        return DEFAULT_PORT
    return FIRST_JOB_PORT + (int(job) + (int(step) if step.isdigit() else 0)) % JOB_PORTS
