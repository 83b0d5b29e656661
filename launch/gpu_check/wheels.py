"""Wheels in parts that a machine without a network can be given one by one, and their installation there.

    python -m launch.gpu_check.wheels pack FOLDER OUT      the wheels of FOLDER -> OUT/part1, OUT/part2, ...
    python -m launch.gpu_check.wheels install PARTS SITE   as far as the parts are there

A wheel that does not fit into what is left of a part is cut into pieces, NAME.whl.1of3 and so on. Compiled kernels come
as triton_cache-VERSION-PYTHON.tar.xz and are unpacked where the versions agree.
"""

import argparse
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

PART_BYTES = 58_600_000
"""Of one part at most. The repository travels beside it, which has 7 million, and 64 MiB may travel at a time."""
SMALLEST_PIECE = 1_000_000
PIECE = re.compile(r"(?P<wheel>.+\.whl)\.(?P<number>\d+)of(?P<count>\d+)")


def pack(folder: Path, out: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Copy the files of a folder into parts, small files first; the parts."""
    files = sorted((file for file in folder.iterdir() if file.is_file()), key=lambda file: (file.stat().st_size, file))
    part, left = 1, part_bytes
    for file in files:
        content = file.read_bytes()
        pieces = []
        while content:
            if left < min(len(content), SMALLEST_PIECE):
                part, left = part + 1, part_bytes
            pieces.append((part, content[:left]))
            content = content[left:]
            left -= len(pieces[-1][1])
        for number, (where, piece) in enumerate(pieces, 1):
            name = file.name if len(pieces) == 1 else f"{file.name}.{number}of{len(pieces)}"
            target = out / f"part{where}"
            target.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(piece)
    return sorted(out.glob("part*"))


def install(parts: Path, site: Path) -> None:
    """Install every wheel that is whole, cut or not, below `parts`; name those of which a piece is missing."""
    wheels = sorted(parts.rglob("*.whl"))
    pieces: dict[str, dict[int, Path]] = defaultdict(dict)
    counts: dict[str, int] = {}
    for path in parts.rglob("*.whl.*"):
        if match := PIECE.fullmatch(path.name):
            pieces[match["wheel"]][int(match["number"])] = path
            counts[match["wheel"]] = int(match["count"])
    with tempfile.TemporaryDirectory() as folder:
        for name, found in pieces.items():
            if len(found) < counts[name]:
                print(f"left out: {name}, of which {len(found)} of {counts[name]} pieces are here")
                continue
            joined = Path(folder) / name
            with joined.open("wb") as file:
                for number in sorted(found):
                    file.write(found[number].read_bytes())
            wheels.append(joined)
        if not wheels:
            print("no wheels")
            return
        options = ["-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, wheels)], check=True)
    for name in sorted(path.name for path in wheels):
        print(name)


def unpack_cache(parts: Path, folder: Path) -> None:
    """Unpack the compiled kernels that were made with this Triton and this Python.

    Triton's keys cover its shared library, which differs between versions of Python too.
    """
    name = f"triton_cache-{version('triton')}-cp{sysconfig.get_config_var('py_version_nodot')}"
    for path in parts.rglob(f"{name}.tar.*"):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        print(f"{path.name}: {sum(1 for _ in folder.iterdir())} entries")
        return
    others = sorted(path.name for path in parts.rglob("triton_cache-*"))
    print(f"no {name}; there are {', '.join(others) or 'none'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    for job in ("pack", "install", "cache"):
        sub = jobs.add_parser(job)
        sub.add_argument("source", type=Path)
        sub.add_argument("target", type=Path)
    options = parser.parse_args(argv)
    if options.job == "pack":
        for part in pack(options.source, options.target):
            files = sorted(part.iterdir())
            print(f"{part}: {sum(file.stat().st_size for file in files):,} bytes, {len(files)} files")
    elif options.job == "install":
        install(options.source, options.target)
    else:
        unpack_cache(options.source, options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
