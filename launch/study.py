"""Run studies: ``python launch/study.py STUDY ...``. The same as ``lcl study``."""

import sys

from lcl_ds.study.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
