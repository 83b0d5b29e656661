"""Work that may crash or hang: tasks in worker processes, each with a limit of its own.

A worker reads one task a line, a JSON object, and answers with one line. A task that takes too long, ends its worker or
breaks the GPU's context costs that worker alone: the next task gets a fresh one.
"""

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Task = dict[str, Any]
Answer = dict[str, Any]

START_S = 90.0
"""A worker has to be ready by then: it imports torch, on a bare machine from a cold disk."""


class Worker:
    """One process that runs tasks one after the other."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **(environment or {})},
        )
        self.ready = False

    def run(self, task: Task, limit: float) -> Answer:
        """The answer; ``{"ended": why}`` when the worker gave none, after which it takes no more tasks."""
        try:
            if not self.ready:
                self._answer(START_S)
                self.ready = True
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(task) + "\n")
            answer = self._answer(limit)
        except (TimeoutError, EOFError, BrokenPipeError, json.JSONDecodeError) as error:
            self.close()
            return {"ended": str(error) or type(error).__name__}
        if answer.get("broken"):
            self.close()
        return answer

    def _answer(self, limit: float) -> Answer:
        stdout = self.process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(limit):
                raise TimeoutError(f"no answer within {limit:g} s")
        line = stdout.readline()
        if not line:
            code = self.process.wait()
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise EOFError(f"the process ended: {name}")
        answer: Answer = json.loads(line)
        return answer

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the worker, however it hangs. It stays in the process group of the step, which ends what it started."""
        self.process.kill()
        self.process.wait()


class Pool:
    """Several workers, which start with the pool and take tasks in order."""

    def __init__(self, command: Sequence[str], workers: int, environment: dict[str, str] | None = None) -> None:
        self.command, self.environment = command, environment
        self.workers = [Worker(command, environment) for _ in range(workers)]

    def run(self, tasks: Sequence[Task], *, limit: float, until: float) -> Iterator[tuple[Task, Answer]]:
        """Answers as they come, the tasks themselves in order.

        Args:
            limit: seconds that one task may take.
            until: time.monotonic() after which no task is begun and every one that runs is ended.
        """
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)
        done: queue.SimpleQueue[tuple[Task, Answer]] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._serve, args=(place, waiting, done, limit, until), daemon=True)
            for place in range(len(self.workers))
        ]
        for thread in threads:
            thread.start()
        for _ in tasks:
            yield done.get()

    def _serve(self, place: int, waiting: Any, done: Any, limit: float, until: float) -> None:
        while True:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            left = until - time.monotonic()
            if left <= 0:
                done.put((task, {"ended": "not started: the time is used up"}))
                continue
            if not self.workers[place].alive:
                self.workers[place] = Worker(self.command, self.environment)
            began = time.monotonic()
            answer = self.workers[place].run(task, min(limit, left))
            done.put((task, {"seconds": round(time.monotonic() - began, 3), **answer}))

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve(run: Callable[[Task], Answer], *, broken: Callable[[], bool]) -> None:
    """A worker's life: answer tasks from standard input until it closes, or until `broken` says that nothing works.

    An exception becomes ``{"ok": False, "message": its last line}``.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed must not look like an answer
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = run(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "message": one_line(error)}
        ended = broken()
        print(json.dumps({**answer, "broken": True} if ended else answer), file=answers, flush=True)
        if ended:
            os._exit(3)  # destructors would touch the lost context


def one_line(error: BaseException) -> str:
    """The kind of error and its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def context_is_lost() -> bool:
    """Whether the GPU refuses all further work of this process, as after an illegal memory access."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False
