"""``launch/train.py`` on a disk that takes long: a save can be met while it is under way."""

import os
import sys
import time

from lcl_ds.train import main

FLUSH_S = 0.3
flush = os.fsync


def slow_flush(handle: int) -> None:
    time.sleep(FLUSH_S)
    flush(handle)


if __name__ == "__main__":
    os.fsync = slow_flush
    sys.exit(main())
