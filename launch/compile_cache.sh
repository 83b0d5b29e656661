#!/usr/bin/env bash
# Compile the Triton kernels for sm_90 on a machine without a GPU, into an archive that launch/gpu_check.sh unpacks.
#
#   launch/compile_cache.sh PYTHON TRITON_VERSION DIR     writes DIR/triton_cache-VERSION-cpNN.tar.xz
#
# PYTHON has torch and that Triton, and is of the version that the other machine has. A second process then compiles
# everything again and must find every kernel in the cache.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 version=$2 out=$3
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}

[ "$("$python" -c 'from importlib.metadata import version; print(version("triton"))')" = "$version" ] || {
  echo "error: $python has another Triton than $version" >&2
  exit 1
}
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export TRITON_CACHE_DIR=$cache/kernels
unset TRITON_INTERPRET
# What first_light and figures need, and the candidates of tune.
compile() {
  "$python" -m lcl_kernels.compile_check --here --target sm_90 > /dev/null
  "$python" -m launch.gpu_check.precompile > /dev/null
}
compile
made=$(find "$cache/kernels" -name '*.cubin' | wc -l)
compile
again=$(($(find "$cache/kernels" -name '*.cubin' | wc -l) - made))
echo "$made kernels compiled; a second process compiled $again of them again"
((made > 0 && again == 0))
python_tag=cp$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("py_version_nodot"))')
tar -cJf "$out/triton_cache-$version-$python_tag.tar.xz" -C "$cache/kernels" .
