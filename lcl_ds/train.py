"""Train: ``lcl train [--recipe NAME] [--ds_config NAME] [key.sub=value ...]``, which is ``launch/train.py`` as well.

Works the same under ``deepspeed``, ``torchrun``, ``accelerate launch``, ``srun`` and by itself, as one process.
"""

import argparse
import logging
import sys
from pathlib import Path

from lcl_ds.cli import program_name, run_command
from lcl_ds.tasks import task_number
from lcl_ds.training.joint_errors import heard_from_any_task
from lcl_ds.training.signals import STOP
from lcl_ds.training.watch import WATCH


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; settings of the recipe follow as ``key.sub=value``."""
    parser = argparse.ArgumentParser(
        prog=program_name("train"), description="Pre-train a vision encoder with Latent Compression Learning."
    )
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        default="zero3",
        help="DeepSpeed JSON, or the name of one in ds_configs (default: zero3)",
    )
    parser.add_argument("--recipe", default="demo", help="YAML file, or the name of one in launch/recipes")
    parser.add_argument("--run_dir", type=Path, help="default: runs/<recipe name>")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--dry_run", action="store_true", help="check data, model and engine settings and stop")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --dry_run: whether the run fits N ranks")
    parser.add_argument(
        "--preflight", action="store_true", help="try hosts, data, disk and network on all ranks and stop"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers append it
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    with STOP.listening(), WATCH.running():
        arguments = parse_arguments(argv)
        level = logging.INFO if task_number() == 0 else logging.WARNING
        logging.basicConfig(level=level, format="[%(levelname)s] %(message)s")
        return run_command(lambda: heard_from_any_task(lambda: train(arguments)))


def train(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for; returns the exit code. Imports what takes seconds, once signals are heard."""
    import yaml

    from lcl_ds.config import ds_config_path, load_config, recipe_path
    from lcl_ds.errors import UserError

    if arguments.gpus is not None and (not arguments.dry_run or arguments.gpus < 1):
        raise UserError(f"--gpus {arguments.gpus}: goes with --dry_run, and is 1 or more; launchers start ranks")
    config = load_config(recipe_path(arguments.recipe), arguments.overrides)
    if arguments.print_config:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        return 0
    from lcl_ds.training.preparation import prepare_for_deepspeed

    prepare_for_deepspeed()
    from lcl_ds.training import run
    from lcl_ds.training.engine import load_ds_config

    ds_config = load_ds_config(ds_config_path(arguments.ds_config))
    if arguments.dry_run:
        print(run.dry_run(config, ds_config, arguments.gpus or 1), end="")
        return 0
    run_dir = arguments.run_dir or Path("runs") / config.name
    if arguments.preflight:
        from lcl_ds.training.preflight import preflight

        return preflight(config, ds_config, run_dir)
    return run.run(config, ds_config, run_dir)


if __name__ == "__main__":
    sys.exit(main())
