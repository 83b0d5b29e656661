"""As many of the suite's GPU tests as fit: ``python -m launch.gpu_check.suite --out FILE --seconds N``.

Tests run side by side, because most of their time goes into compiling kernels. Each result is one JSON line, written as
it comes; the last line counts them. Running out of time is no failure.

pytest loads this module as a plugin too: that is what writes the lines.
"""

import argparse
import collections
import json
import os
import queue
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.gpu_check.pool import context_is_lost

LINES = "GPU_CHECK_TEST_RESULTS"
"""Environment variable: the file that the plugin appends to."""
FIRST = ("test_gpu.py", "test_tiles.py", "test_transforms.py", "test_contrastive.py")
"""What only a GPU can show comes first; the long files and gloo ranks come last."""
LAST = ("test_compile_check.py", "test_exchange.py", "test_sigmoid_ranks.py", "test_contrastive_ranks.py")
DRY = ("tests/kernels/test_tiles.py",)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--seconds", type=float, default=100.0, help="for all tests (default: 100)")
    parser.add_argument("--processes", type=int, default=8, help="side by side (default: 8)")
    parser.add_argument("--dry", action="store_true", help="a small sample")
    options = parser.parse_args(argv)
    options.out.write_text("")
    os.environ[LINES] = str(options.out.resolve())
    found = [file for folder in ("tests/kernels", "tests/gpu") for file in Path(folder).glob("test_*.py")]
    files = list(DRY) if options.dry else ordered(found)
    sample = ["-k", "tuned"] if options.dry else []
    until = time.monotonic() + options.seconds
    if find_spec("xdist") and not options.dry:
        groups = [[*files, "-n", str(options.processes), "--dist", "loadgroup"]]
    else:
        groups = [[file] for file in files]
    codes = run_side_by_side([[*group, *sample] for group in groups], options.processes, until)
    summary = summarize(options.out, codes)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(summary) + "\n")
    print(json.dumps(summary))
    return 1 if summary["failed"] or summary["broken"] else 0


def ordered(files: list[Path]) -> list[str]:
    """The most telling files first."""

    def place(file: Path) -> tuple[int, str]:
        if file.name in FIRST:
            return FIRST.index(file.name), file.name
        return len(FIRST) + (file.name in LAST and 1 + LAST.index(file.name)), file.name

    return [str(file) for file in sorted(files, key=place)]


def run_side_by_side(groups: list[list[str]], processes: int, until: float) -> list[int | None]:
    """Exit code of each pytest run; None where the time ran out."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(groups)):
        waiting.put(index)
    codes: list[int | None] = [None] * len(groups)

    def work() -> None:
        while time.monotonic() < until:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            codes[index] = run_pytest(groups[index], until)

    threads = [threading.Thread(target=work) for _ in range(min(processes, len(groups)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codes


def run_pytest(arguments: list[str], until: float) -> int | None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", __spec__.name, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        return process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()  # what it started is in the process group of the step, which ends with it
        process.wait()


def summarize(path: Path, codes: list[int | None]) -> dict[str, Any]:
    """How many tests had which outcome, whether all were run, and runs that pytest itself could not do."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = collections.Counter(line["outcome"] for line in lines)
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "complete": None not in codes,
        "broken": [code for code in codes if code not in (None, 0, 1, 5)],  # 5: no test was chosen
    }


class Lines:
    """The plugin: one line per test, and the first line of what went wrong."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else str(report.longrepr)
            line["message"] = (text.strip().splitlines() or [""])[0][:300]
        self._write(line)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            message = (str(report.longrepr).strip().splitlines() or [""])[-1][:300]
            self._write({"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "message": message})

    def _write(self, line: dict[str, Any]) -> None:
        with open(os.environ[LINES], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class LeaveWhenLost:
    """The plugin in a worker of xdist: after a test that broke the GPU's context, a fresh worker takes over."""

    failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = self.failed or report.failed

    def pytest_runtest_logfinish(self) -> None:
        if self.failed and context_is_lost():
            time.sleep(0.5)  # for the report of the test to be sent
            os._exit(3)
        self.failed = False


def pytest_configure(config: Any) -> None:
    """Called by pytest. Workers of xdist report to its first process, which alone writes."""
    if LINES in os.environ:
        plugin = LeaveWhenLost() if hasattr(config, "workerinput") else Lines()
        config.pluginmanager.register(plugin, "gpu_check_results")


if __name__ == "__main__":
    sys.exit(main())
