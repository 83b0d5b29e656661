#!/usr/bin/env bash
# Install the wheels of a folder into another one, without a network: launch/install_wheels.sh FOLDER SITE
#
# A wheel that launch/collect_wheels.sh had to split is joined first; one of which a piece is missing is left out.
set -euo pipefail
folder=$1 site=$2
joined=$(mktemp -d)
trap 'rm -rf "$joined"' EXIT
for first in "$folder"/*.whl.00-of-*; do
  [ -e "$first" ] || continue
  wheel=${first%.00-of-*}
  pieces=("$wheel".[0-9][0-9]-of-*)
  if ((${#pieces[@]} == 10#${first##*-of-})); then
    cat "${pieces[@]}" > "$joined/${wheel##*/}"
  else
    echo "left out: ${wheel##*/}, of which ${#pieces[@]} of $((10#${first##*-of-})) pieces are here"
  fi
done
shopt -s nullglob
wheels=("$folder"/*.whl "$joined"/*.whl)
"${PYTHON:-python3}" -m pip install -q --no-index --no-deps --no-compile --target "$site" "${wheels[@]}"
