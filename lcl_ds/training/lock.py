"""One run, one folder: whoever trains into a run's folder holds its lock."""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from lcl_ds.errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".lock"
BEAT_S = 5.0
"""How often the owner touches the file, for starts on other hosts that cannot see the lock itself."""
STALE_S = 2.5 * BEAT_S
"""How long a newcomer waits for the owner's next touch where the lock itself says nothing."""
SETTLED_S = 1.0
"""How long several newcomers to a file system without locks write over each other at most."""
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems answer that have no locks."""


@dataclass(frozen=True)
class Owner:
    """What the file says about who holds it."""

    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


class RunLock:
    """The lock of a run's folder, held from :meth:`take` to :meth:`release` or the end of the process.

    POSIX locks, since these hold over NFS and are not inherited by the loaders' processes. They end with their process,
    so a file that a killed run leaves behind is not in the way. Some file systems lock for one host alone or not at
    all: there the owner's regular touch decides.
    """

    def __init__(self, folder: Path, file: int, made_folder: bool):
        self._folder, self._file, self._made_folder = folder, file, made_folder
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()

    @classmethod
    def take(cls, folder: Path) -> "RunLock | None":
        """Take the lock of a folder, which is made where there is none.

        Returns:
            None where nothing can be written, so nobody trains.

        Raises:
            UserError: another start holds it; names that.
        """
        path = folder / LOCK
        made_folder = not folder.exists()
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                logger.debug("%s: %s", path, error)  # what has to write there says so
                return None
            try:
                _own(file, path)
                if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file)):
                    return cls(folder, file, made_folder)
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # its owner has just removed the file

    def release(self) -> None:
        """Give the lock back and remove the file, and a folder that was made for it where nothing else came into it."""
        self._released.set()
        self._thread.join()
        (self._folder / LOCK).unlink(missing_ok=True)
        os.close(self._file)
        if self._made_folder and self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _beat(self) -> None:
        """Touch the file by a thread of its own: a file system that hangs must hold up nothing else."""
        while not self._released.wait(BEAT_S):
            try:
                os.utime(self._file)
            except OSError as error:
                logger.debug("%s: %s", self._folder / LOCK, error)


def _own(file: int, path: Path) -> None:
    """Lock an open file and write this process into it. Raises: UserError when it is held."""
    has_locks = _lock(file, path)
    owner = _read(file)
    if owner is not None:
        if not has_locks or owner.host != socket.gethostname():
            if _is_touched(path):
                raise _in_use(owner, path)
            _lock(file, path)  # looking gave it up
        logger.info("%s: %s, is gone without giving the folder back; this start takes it over", path.parent, owner)
    me = Owner(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(asdict(me)).encode(), 0)
    if not has_locks:  # of several that come at one moment, the last to write stays
        time.sleep(SETTLED_S)
        if (winner := _read(file)) != me:
            raise _in_use(winner, path)


def _lock(file: int, path: Path) -> bool:
    """Lock an open file; False where the file system has no locks. Raises: UserError when another process holds it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise _in_use(_read(file), path) from None
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _in_use(owner: Owner | None, path: Path) -> UserError:
    who = str(owner) if owner else "another process"
    return UserError(
        f"--run_dir {path.parent}: is in use by {who}; stop that run or wait for its end, or name another --run_dir"
    )


def _read(file: int) -> Owner | None:
    """Read who wrote the file; None where nobody did, or not to its end."""
    try:
        return Owner(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _is_touched(path: Path) -> bool:
    """Wait to see whether somebody touches the file."""
    logger.info("%s: looking for %.0f s whether its owner on another host is alive", path, STALE_S)
    before = _touched(path)
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(min(0.5, STALE_S / 10))
        if _touched(path) != before:
            return True
    return False


def _touched(path: Path) -> int | None:
    """Read when the file was last touched; opening it makes a network file system ask its server.

    Must not be called by the owner: closing any handle of a file gives up the locks that the process has on it.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(file).st_mtime_ns
    finally:
        os.close(file)
