"""Train: ``deepspeed launch/train.py --ds_config ds_configs/zero3.json [--recipe NAME] [key.sub=value ...]``."""

import sys

from lcl_ds.train import main

if __name__ == "__main__":
    sys.exit(main())
