#!/usr/bin/env bash
# Collect what launch/gpu_check.sh needs where no package index can be reached: wheels, and compiled Triton kernels.
#
#   launch/collect_wheels.sh [DIR=wheels]
#
# Run on any machine that has an index, then carry DIR/part1, DIR/part2, ... to the other one, at once or one by one: each
# is below 60 MB. first_light and tune need part1 alone; without the others, peers that come in pieces are left out. What
# a GPU image usually ships (torch, triton, transformers, numpy, ...) is not collected. PYTHON_VERSION and TRITON_VERSION
# are those of the other machine. Kernels are compiled when a Python of that version with torch and Triton is named:
# TRITON_PYTHON=.../bin/python; Triton's cache knows its entries by its own shared library, so it has to be that version.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-wheels}
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
triton=${TRITON_VERSION:-3.6.0}

# Pinned in requirements.txt. deepspeed is not in the list: it comes as a source archive only.
ours=(webdataset hjson pydantic pydantic_core annotated-types typing-inspection braceexpand msgpack)
# Peers that only the benchmarks compare with, so requirements.txt does not have them.
peers=(liger-kernel==0.8.5 cut-cross-entropy==25.1.1 open_clip_torch==3.3.0 ftfy==6.3.1 memeff==0.3.1 inf-cl==1.2.1
  siglip-kernel==0.1.2 quack-kernels==0.6.5)
# What QuACK and Liger's SM90 backend need.
cutlass=(apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5 nvidia-cutlass-dsl==4.8.1
  nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1)

# pinned NAME: its line "NAME==VERSION" of requirements.txt.
pinned() {
  grep -m 1 -E "^$1==" requirements.txt | cut -d ' ' -f 1 || {
    echo "error: requirements.txt has no pin for $1" >&2
    return 1
  }
}

wanted=("${peers[@]}" "${cutlass[@]}")
for name in "${ours[@]}"; do
  requirement=$(pinned "$name")
  wanted+=("$requirement")
done
deepspeed=$(pinned deepspeed)

whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
# One call each: a single missing peer must be named, and must not take the others with it.
failed=()
for requirement in "${wanted[@]}"; do
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$whole" "$requirement" || failed+=("$requirement")
done
# DeepSpeed compiles its CUDA and C++ operators only when asked to; the trainer uses none of them.
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --wheel-dir "$whole" "$deepspeed" || failed+=("$deepspeed")

if [ -n "${TRITON_PYTHON:-}" ]; then
  bash launch/compile_cache.sh "$TRITON_PYTHON" "$triton" "$whole" || failed+=("compiled kernels")
fi

rm -rf "$folder"/part*  # wheels of another version would be installed beside the new ones
"$python" -m launch.gpu_check.wheels pack "$whole" "$folder"
ls -1 "$whole"
if ((${#failed[@]})); then
  echo "error: could not get ${failed[*]}" >&2
  exit 1
fi
