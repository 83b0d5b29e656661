#!/usr/bin/env bash
# Check the project on a machine with one GPU: kernel tests, benchmarks, and a training run at full size.
#
#   [OUT=DIR] launch/gpu_check.sh [--dry]
#
# Needs no network: packages that the machine lacks come from wheels/ (launch/collect_wheels.sh fills it; WHEELS names
# another folder), installed into a temporary folder. Writes at most 7 files into $OUT (default bench_results/), the
# summary gpu_check.json after every step. A failing step does not stop the others; the exit code is 1 if any failed.
# It is over within 9 minutes (BUDGET_S: seconds for the steps). --dry runs every step at tiny size on a machine without
# a GPU: it checks this script and measures nothing. PYTHON names the interpreter. Folders are relative to the
# repository.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD

dry=
case "$*" in
  "") ;;
  --dry) dry=--dry ;;
  *) echo "usage: [OUT=DIR] launch/gpu_check.sh [--dry]" >&2; exit 2 ;;
esac
command="launch/gpu_check.sh${dry:+ $dry}"
out=${OUT:-bench_results}
wheels=${WHEELS:-wheels}
python=$(command -v "${PYTHON:-python3}") || { echo "error: no ${PYTHON:-python3}" >&2; exit 1; }
budget=${BUDGET_S:-525} # with the last step's grace and the report, 9 minutes

mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
work=$(mktemp -d) || exit 1
touch "$work/steps.tsv"
log=$out/gpu_check.log
: > "$log"

export PATH="$work/site/bin:$(dirname "$python"):$PATH"
export PYTHONPATH="$work/site:$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 MPLBACKEND=Agg PYTHONUNBUFFERED=1
unset TRITON_INTERPRET # with it kernels would run in Python
export LOCAL_SIZE=1 # ranks that DeepSpeed starts where it finds no GPU

begin=$EPOCHREALTIME
failed=0

# since START: seconds from then to now, with a decimal point in every locale
since() { awk -v a="${1/,/.}" -v b="${EPOCHREALTIME/,/.}" 'BEGIN { printf "%.2f", b - a }'; }

# report [--complete]: write gpu_check.json as far as things stand, so that an interrupted check leaves a result too.
report() {
  "$python" launch/gpu_check_report.py assemble "$work" "$out/gpu_check.json" \
    --command "$command" --seconds "$(since "$begin")" $dry "$@" || failed=1
}

# end_running: kill what is left of a step, so that no stray process takes the next one's GPU. A step and all that it
# starts form a process group of timeout's, which carries timeout's number.
running=
end_running() {
  [ -n "$running" ] && kill -KILL -- "-$running" 2> /dev/null
  running=
}

interrupted() {
  end_running
  record "interrupted" 0 0 130 "by a signal"
  report
  exit 130
}
trap 'end_running; rm -rf "$work"' EXIT
trap interrupted INT TERM

# neutral: standard input without this machine's paths, which nobody else can use
neutral() {
  sed -e "s|$work|\$TMP|g" -e "s|$root|.|g" -e "s|$out|\$OUT|g" -e "s|$wheels/|\$WHEELS/|g" -e "s|${python%/*}/||g"
}

# record NAME LIMIT SECONDS CODE WORDS...: one line of steps.tsv
record() {
  local words
  words=$(printf '%s' "${*:5}" | tr '\n\t' '  ' | neutral)
  printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$words" >> "$work/steps.tsv"
}

# step NAME LIMIT COMMAND...: run it for at most LIMIT seconds, and no longer than the budget lasts. What it prints goes
# to $work/NAME.out and, at its end, to the log.
step() {
  local name=$1 limit=$2 start=$EPOCHREALTIME code left seconds
  shift 2
  left=$((budget - $(since "$begin" | cut -d . -f 1)))
  ((limit > left)) && limit=$left
  if ((limit < 5)); then
    code=124 # as if it had run into its limit at once
    echo "not started: the time for the whole check is used up" > "$work/$name.out"
  else
    timeout -k 10 "$limit" "$@" > "$work/$name.out" 2> "$work/$name.err" < /dev/null &
    running=$!
    wait "$running"
    code=$?
    end_running
  fi
  seconds=$(since "$start")
  ((code)) && failed=1
  record "$name" "$limit" "$seconds" "$code" "$@"
  {
    echo "=== $name: exit code $code after $seconds s (limit $limit s)"
    # The end of each: enough for a summary and a traceback, and the log stays small.
    tail -c 20000 "$work/$name.out"
    tail -c 10000 "$work/$name.err" 2> /dev/null
  } | neutral >> "$log"
  echo "$name: exit code $code, $seconds s"
  report
  return "$code"
}

# skip NAME REASON: a step that this machine cannot run
skip() {
  record "$1" 0 0 skipped "$2"
  echo "=== $1: skipped, $2" >> "$log"
  echo "$1: skipped, $2"
}

"$python" launch/gpu_check_report.py gpu > "$work/gpu_before.json"

# --- what is here ---------------------------------------------------------------------------------------------------
if compgen -G "$wheels/*.whl" > /dev/null; then
  step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl
else
  skip wheels "no wheels in the folder: what is installed is used"
fi
step environment 60 "$python" launch/gpu_check_report.py environment &&
  cp "$work/environment.out" "$work/environment.json"

# --- the kernels: right, then fast ----------------------------------------------------------------------------------
# SIGTERM, which ends a step at its limit, as an interrupt: pytest then still tells what failed until there.
pytest='import signal, sys, pytest; signal.signal(signal.SIGTERM, signal.default_int_handler); sys.exit(pytest.main())'
if [ -n "$dry" ]; then
  # A sample of both losses: the whole suite takes minutes without a GPU.
  step tests 120 "$python" -c "$pytest" tests/kernels -q -p no:cacheprovider -rs -k "golden or uniform"
else
  # Most of the time goes into compiling kernels for their first use, which files can do side by side.
  side_by_side=$("$python" -c "import xdist" 2> /dev/null && echo "-n 8 --dist loadfile")
  step tests 240 "$python" -c "$pytest" tests/kernels tests/gpu -q -p no:cacheprovider -rs $side_by_side
fi
step ceilings 30 "$python" launch/gpu_ceilings.py $dry && cp "$work/ceilings.out" "$work/ceilings.json"
# The benchmarks draw more; what comes back is the JSON, from which all can be drawn, and one picture each.
bench_step() {
  local job=$1 limit=$2
  shift 2
  rm -f "$out/gpu_$job.json" "$out/gpu_$job.png" # an older run's must not pass for this one's
  step "bench_$job" "$limit" "$python" -m lcl_ds.bench "$job" --json "$out/gpu_$job.json" --plots "$work/plots" "$@"
  [ -f "$work/plots/${job}_share.png" ] && cp "$work/plots/${job}_share.png" "$out/gpu_$job.png"
}
if [ -n "$dry" ]; then
  bench_step losses 90 --shape 64,32,131 --valid 0.5 --peers eager --repeats 1 --no_memory
  bench_step contrastive 60 --shape 32,16 --peers eager --repeats 1 --no_memory
else
  bench_step losses 90
  bench_step contrastive 60
fi

# --- training at full size ------------------------------------------------------------------------------------------
rm -f "$out/gpu_train_metrics.jsonl"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
train=(deepspeed --master_port "$port" launch/train.py --ds_config ds_configs/zero3.json
  --recipe launch/recipes/gpu_check.yaml --run_dir "$work/run"
  "data.shards=$work/data/documents.tar" "data.tokenizer=$work/data/tokenizer")
if [ -n "$dry" ]; then
  size=(--documents 12 --image_size 32)
  train+=(train.steps=2 train.global_batch_rows=2 data.row_tokens=256 data.row_images=4 data.workers=0 data.lanes=2
    model.vision.{hidden_size=64,intermediate_size=128,num_hidden_layers=1,num_attention_heads=4,image_size=32}
    model.decoder.{hidden_size=64,intermediate_size=128,num_hidden_layers=1,num_attention_heads=4}
    model.decoder.num_key_value_heads=4 model.pooling.num_attention_heads=4)
else
  size=()
fi
step data 60 "$python" launch/gpu_check_data.py "$work/data" "${size[@]}"
if ! step train 130 "${train[@]}" && grep -qi "out of memory" "$work/train.out" "$work/train.err"; then
  # Too large for this card: the figures are then those of a run that recomputes activations, and the command says so.
  rm -rf "$work/run"
  step train_checkpointed 100 "${train[@]}" model.{vision,decoder}.activation_checkpointing=true
fi
[ -f "$work/run/metrics.jsonl" ] && cp "$work/run/metrics.jsonl" "$out/gpu_train_metrics.jsonl"

report --complete
echo "results: $out/gpu_check.json"
exit "$failed"
