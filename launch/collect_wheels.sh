#!/usr/bin/env bash
# Collect the wheels that launch/gpu_check.sh installs where no package index can be reached.
#
#   launch/collect_wheels.sh [DIR=wheels]
#
# Run on any machine that has an index, then carry DIR to the other one. What a GPU image usually ships (torch, triton,
# transformers, numpy, ...) is left out, so the whole is about 10 MB. PYTHON_VERSION names the other machine's Python.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-wheels}
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}

# Pinned in requirements.txt. deepspeed is not in the list: it comes as a source archive only.
ours=(webdataset hjson pydantic pydantic_core annotated-types typing-inspection braceexpand msgpack)
# Peers that only the benchmarks compare with, so requirements.txt does not have them.
peers=(liger-kernel==0.8.5 cut-cross-entropy==25.1.1 open_clip_torch==3.3.0 ftfy==6.3.1 memeff==0.3.1 inf-cl==1.2.1)

# pinned NAME: its line "NAME==VERSION" of requirements.txt.
pinned() {
  grep -m 1 -E "^$1==" requirements.txt | cut -d ' ' -f 1 || {
    echo "error: requirements.txt has no pin for $1" >&2
    return 1
  }
}

wanted=("${peers[@]}")
for name in "${ours[@]}"; do
  requirement=$(pinned "$name")
  wanted+=("$requirement")
done
deepspeed=$(pinned deepspeed)

mkdir -p "$folder"
rm -f "$folder"/*.whl  # wheels of another version would be installed beside the new ones
# One call each: a single missing peer must be named, and must not take the others with it.
failed=()
for requirement in "${wanted[@]}"; do
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$folder" "$requirement" || failed+=("$requirement")
done
# DeepSpeed compiles its CUDA and C++ operators only when asked to; the trainer uses none of them.
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --wheel-dir "$folder" "$deepspeed" || failed+=("$deepspeed")

ls -1 "$folder"
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sk --apparent-size "$folder" | cut -f 1) KiB in $folder"
if ((${#failed[@]})); then
  echo "error: could not get ${failed[*]}" >&2
  exit 1
fi
