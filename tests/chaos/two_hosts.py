"""Train on two "hosts" of this machine, and cut the link between them: ``python -m tests.chaos.two_hosts [FOLDER]``.

The hosts are network namespaces with names of their own, joined by one virtual cable. It needs root and ``ip``; where
they are missing it says so and ends with 0. It shows that

- the preflight tells the hosts apart,
- ``torchrun --nnodes 2`` and ``deepspeed --no_ssh`` on two hosts compute the losses of two ranks on one, bit for bit,
- after the link is cut in the middle of a run, both sides end within the set time, say why, and the run continues.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lcl_ds.training.settings import TrainSettings
from tests.support.ranks import ROOT, free_port, run_ranks, train_command
from tests.support.runs import metrics_of, without_timing
from tests.system.conftest import make_recipe

STEPS, LONG = 6, 2000
LIMIT_S = 30
"""Seconds without a step after which a run is to end, where there is such a setting."""
ENDS_WITHIN_S = LIMIT_S + 60
STARTS_WITHIN_S = 240


@dataclass(frozen=True)
class Host:
    """A network namespace with a name and one network card."""

    name: str
    address: str
    card: str

    def start(self, command: list[str], log: Path) -> subprocess.Popen:
        """Start a program that takes this for its machine."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name, *command]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": self.card}
        environment |= {"NCCL_SOCKET_IFNAME": self.card}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *named],
            cwd=ROOT,
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


HOSTS = (Host("lclnode1", "10.77.0.1", "lcl1"), Host("lclnode2", "10.77.0.2", "lcl2"))


def missing() -> str | None:
    """Say what this machine lacks for namespaces; None where it has them."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "ip or unshare is not installed"
    tried = subprocess.run(["ip", "netns", "add", "lcltry"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "lcltry"], capture_output=True)
    return f"network namespaces are not available: {tried.stderr.strip()}" if tried.returncode else None


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Make the hosts and the cable between them; they know each other's names."""
    names = Path("/etc/netns")
    try:
        for host in HOSTS:
            run("ip", "netns", "add", host.name)
            (names / host.name).mkdir(parents=True, exist_ok=True)
            lines = [f"{other.address} {other.name}" for other in HOSTS]
            (names / host.name / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        one, other = HOSTS
        run("ip", "link", "add", one.card, "netns", one.name, "type", "veth", "peer", other.card, "netns", other.name)
        for host in HOSTS:
            run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", host.card)
            run("ip", "-n", host.name, "link", "set", "lo", "up")
        plug(True)
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)
            shutil.rmtree(names / host.name, ignore_errors=True)


def plug(connected: bool) -> None:
    for host in HOSTS:
        run("ip", "-n", host.name, "link", "set", host.card, "up" if connected else "down")


def torchrun(number: int, port: int) -> list[str]:
    places = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
    return ["torchrun", *places, "--master-addr", HOSTS[0].address, "--master-port", str(port)]


def deepspeed_without_ssh(number: int, port: int) -> list[str]:
    hostfile = Path(tempfile.gettempdir()) / "lcl_hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in HOSTS))
    places = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number)]
    return ["deepspeed", *places, "--master_addr", HOSTS[0].address, "--master_port", str(port)]


LAUNCHERS: dict[str, Callable[[int, int], list[str]]] = {"torchrun": torchrun, "deepspeed": deepspeed_without_ssh}


def start_job(launcher: str, arguments: list[str], log: Path) -> list[subprocess.Popen]:
    port = free_port()
    return [
        host.start([*LAUNCHERS[launcher](number, port), *arguments], log.with_name(f"{log.name}.{host.name}"))
        for number, host in enumerate(HOSTS)
    ]


def end(jobs: list[subprocess.Popen]) -> None:
    """Kill what is left of jobs."""
    for job in jobs:
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        job.wait()


def wait(jobs: list[subprocess.Popen], timeout: float) -> list[int | None]:
    deadline = time.monotonic() + timeout
    while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [job.poll() for job in jobs]


def logs_of(log: Path) -> dict[str, str]:
    return {host.name: log.with_name(f"{log.name}.{host.name}").read_text() for host in HOSTS}


def check(holds: bool, sentence: str, log: Path) -> None:
    print(f"{'ok' if holds else 'FAULT'}: {sentence}", flush=True)
    if not holds:
        for name, text in logs_of(log).items():
            print(f"--- {name}\n{text[-3000:]}")
        sys.exit(1)


def same_losses(recipe: Path, folder: Path) -> None:
    """Compare two hosts with two ranks of one host."""
    overrides = [f"train.steps={STEPS}", "evaluation.shards=null"]
    run_ranks(2, train_command(recipe, folder / "one", *overrides), folder / "one.log")
    expected = without_timing(metrics_of(folder / "one"))
    for launcher in LAUNCHERS:
        run_dir, log = folder / launcher, folder / f"{launcher}.log"
        jobs = start_job(launcher, train_command(recipe, run_dir, *overrides)[1:], log)
        try:
            codes = wait(jobs, STARTS_WITHIN_S)
        finally:
            end(jobs)
        check(codes == [0, 0], f"{launcher} on two hosts ends with {codes}", log)
        actual = without_timing(metrics_of(run_dir))
        check(actual == expected, f"{launcher}: {len(actual)} steps equal those of two ranks on one host", log)


def preflight(recipe: Path, folder: Path) -> None:
    """Print the preflight's table of the two hosts, and of two whose run folders are not on one disk."""
    for name, run_dirs in {"preflight": ["run", "run"], "own_disks": ["disk0", "disk1"]}.items():
        log, port = folder / f"{name}.log", free_port()
        jobs = [
            host.start(
                [
                    *torchrun(number, port),
                    *train_command(recipe, folder / run_dirs[number], "--preflight")[1:],
                ],
                log.with_name(f"{log.name}.{host.name}"),
            )
            for number, host in enumerate(HOSTS)
        ]
        try:
            codes = wait(jobs, STARTS_WITHIN_S)
        finally:
            end(jobs)
        text = logs_of(log)[HOSTS[0].name]
        print("\n".join(line for line in text.splitlines() if line.startswith(("┏", "┃", "┡", "│", "└", "error:"))))
        good = codes == [0, 0] if name == "preflight" else 0 not in codes and f"on {HOSTS[1].name}: --run_dir" in text
        check(good, f"{name} ends with {codes}", log)


def cut_link(launcher: str, recipe: Path, folder: Path) -> None:
    """Cut the link in the middle of a run, and let the run continue when it is mended."""
    run_dir, log = folder / f"cut_{launcher}", folder / f"cut_{launcher}.log"
    overrides = [f"train.steps={LONG}", "evaluation.shards=null", "checkpoint.every=2"]
    if "hang_seconds" in TrainSettings.model_fields:
        overrides.append(f"train.hang_seconds={LIMIT_S}")
    jobs = start_job(launcher, train_command(recipe, run_dir, *overrides)[1:], log)
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while len(metrics_of(run_dir)) < 5 and time.monotonic() < deadline:
            time.sleep(0.2)
        check(len(metrics_of(run_dir)) >= 5, f"{launcher}: the run steps", log)
        plug(False)
        cut = time.monotonic()
        codes = wait(jobs, ENDS_WITHIN_S)
        took = time.monotonic() - cut
    finally:
        end(jobs)
        plug(True)
    ended = None not in codes and 0 not in codes
    check(ended, f"{launcher}: both sides end with {codes}, {took:.0f} s after the link was cut", log)
    for name, text in logs_of(log).items():
        causes = [line for line in text.splitlines() if line.startswith("error:") or "no step for" in line]
        check(bool(causes), f"{launcher}: {name} says: {causes[0] if causes else 'nothing'}", log)
    done = len(metrics_of(run_dir))
    jobs = start_job(launcher, train_command(recipe, run_dir, *overrides, f"train.steps={done + 2}")[1:], log)
    try:
        codes = wait(jobs, STARTS_WITHIN_S)
    finally:
        end(jobs)
    steps = [row["step"] for row in metrics_of(run_dir)]
    check(codes == [0, 0] and steps == [*range(1, done + 3)], f"{launcher}: the run goes on to step {done + 2}", log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="for the runs and their logs; default: a temporary one")
    parser.add_argument("--only", choices=("preflight", "losses", "cut"), help="one of the parts")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"skipped: {reason}")
        return 0
    folder = arguments.folder or Path(tempfile.mkdtemp())
    (folder / "recipe").mkdir(parents=True)
    make_recipe(folder / "recipe")
    recipe = folder / "recipe" / "small.yaml"
    with two_hosts():
        if arguments.only in (None, "preflight"):
            preflight(recipe, folder)
        if arguments.only in (None, "losses"):
            same_losses(recipe, folder)
        if arguments.only in (None, "cut"):
            for launcher in LAUNCHERS:
                cut_link(launcher, recipe, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
