#!/usr/bin/env bash
# Check the project on a machine with one GPU. Three commands, each worth having alone:
#
#   [OUT=DIR] launch/gpu_check.sh first_light|tune|figures [--dry]
#
#   first_light  every kernel once against float64, compute-sanitizer, and as many tests as fit    4 minutes at most
#   tune         what this GPU reaches, where a call's time goes, and a sweep over tile settings   9 minutes at most
#   figures      our losses and those of other projects, and a training step at full size          9 minutes at most
#
# None needs a network: packages that the machine lacks come from wheels/ (launch/collect_wheels.sh fills it; WHEELS names
# another folder), installed into a temporary folder; so do kernels that were compiled beforehand. Each writes
# $OUT/gpu_COMMAND.json (OUT: bench_results/) after every step and every 15 seconds, and a log beside it. tune also writes
# $OUT/gpu_tuned.json, which figures uses when it is there. A failing step does not stop the others; the exit code is 1 if
# any failed. BUDGET_S: seconds for all steps. STEPS: the steps to run, if not all. --dry runs every step at tiny size on
# a machine without a GPU: it checks this script and measures nothing. PYTHON names the interpreter. Folders are relative
# to the repository.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD

case "$*" in
  first_light | tune | figures) check=$1 dry= ;;
  "first_light --dry" | "tune --dry" | "figures --dry") check=$1 dry=--dry ;;
  *) echo "usage: [OUT=DIR] launch/gpu_check.sh first_light|tune|figures [--dry]" >&2; exit 2 ;;
esac
command="launch/gpu_check.sh $check${dry:+ $dry}"
out=${OUT:-bench_results}
wheels=${WHEELS:-wheels}
python=$(command -v "${PYTHON:-python3}") || { echo "error: no ${PYTHON:-python3}" >&2; exit 1; }
# A dry run measures nothing, so it may take its time on a busy machine.
patience=$([ -n "$dry" ] && echo 5 || echo 1)
# With the last step's grace and the report, 4 and 9 minutes.
cores=$(nproc)
budget=${BUDGET_S:-$(($([ "$check" = first_light ] && echo 225 || echo 525) * patience))}

mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
work=$(mktemp -d) || exit 1
touch "$work/steps.tsv"
log=$out/gpu_$check.log
: > "$log"

site=$work/site-packages # some packages look for this name in their own path
export PATH="$site/bin:$(dirname "$python"):$PATH"
export PYTHONPATH="$site:$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 MPLBACKEND=Agg PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # what cuBLAS needs to give the same bits every time
export TRITON_CACHE_DIR=$work/triton_cache # shared by all processes of all steps
unset TRITON_INTERPRET # with it kernels would run in Python
export LOCAL_SIZE=1 # ranks that DeepSpeed starts where it finds no GPU

begin=$EPOCHREALTIME
failed=0

# since START: seconds from then to now, with a decimal point in every locale
since() { awk -v a="${1/,/.}" -v b="${EPOCHREALTIME/,/.}" 'BEGIN { printf "%.2f", b - a }'; }

# left: whole seconds of the budget
left() { echo $((budget - $(since "$begin" | cut -d . -f 1))); }

# report [--complete]: write the JSON as far as things stand, so that an interrupted check leaves a result too.
report() {
  "$python" -m launch.gpu_check.report assemble "$work" "$out/gpu_$check.json" \
    --command "$command" --seconds "$(since "$begin")" $dry "$@" || failed=1
}

# report_now_and_then: until it is told to end, which it does between two reports, so that none comes late.
report_now_and_then() {
  local nap=
  trap 'kill "$nap" 2> /dev/null; exit' TERM
  while :; do
    sleep 15 &
    nap=$!
    wait "$nap"
    report
  done
}

# end_running: kill what is left of a step, so that no stray process takes the next one's GPU. A step and all that it
# starts form a process group of timeout's, which carries timeout's number.
running= reporter=
end_running() {
  [ -n "$running" ] && kill -KILL -- "-$running" 2> /dev/null
  if [ -n "$reporter" ]; then
    kill -TERM "$reporter" 2> /dev/null
    wait "$reporter"
  fi
  running= reporter=
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
# to $work/NAME.out and, at its end, to the log; its results are in $work/NAME.jsonl or $work/NAME.json.
step() {
  local name=$1 limit=$2 start=$EPOCHREALTIME code most seconds
  shift 2
  if [ -n "${STEPS:-}" ] && [[ " wheels kernels environment $STEPS " != *" $name "* ]]; then
    skip "$name" "not among STEPS"
    return 0
  fi
  ((limit *= patience))
  most=$(left)
  ((limit > most)) && limit=$most
  if ((limit < 5)); then
    code=124 # as if it had run into its limit at once
    echo "not started: the time for the whole check is used up" > "$work/$name.out"
  else
    timeout -k 10 "$limit" "$@" > "$work/$name.out" 2> "$work/$name.err" < /dev/null &
    running=$!
    report_now_and_then > /dev/null 2>&1 < /dev/null &
    reporter=$!
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

# skip NAME REASON: a step that this machine cannot run, or need not
skip() {
  record "$1" 0 0 skipped "$2"
  echo "=== $1: skipped, $2" >> "$log"
  echo "$1: skipped, $2"
}

# module NAME LIMIT [OPTION...]: a step that is launch/gpu_check/NAME.py and writes $work/NAME.jsonl
module() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m "launch.gpu_check.$name" --out "$work/$name.jsonl" "$@" $dry
}

"$python" -m launch.gpu_check.report gpu > "$work/gpu_before.json"

# --- what is here ---------------------------------------------------------------------------------------------------
if [ "$check" = tune ]; then
  skip wheels "torch and Triton are enough"
elif compgen -G "$wheels/part*/*.whl*" > /dev/null; then
  step wheels 60 "$python" -m launch.gpu_check.wheels install "$wheels" "$site"
  # What a .pth file of the wheel does where site-packages is Python's own.
  export PYTHONPATH="$PYTHONPATH:$site/nvidia_cutlass_dsl/dsl_packages"
else
  skip wheels "no wheels in the folder: what is installed is used"
fi
mkdir "$TRITON_CACHE_DIR"
if compgen -G "$wheels/part*/triton_cache-*" > /dev/null; then
  step kernels 20 "$python" -m launch.gpu_check.wheels cache "$wheels" "$TRITON_CACHE_DIR"
fi
step environment 60 "$python" -m launch.gpu_check.report environment && cp "$work/environment.out" "$work/environment.json"

first_light() {
  # Compiling takes most of the time, so several processes; the GPU itself is busy for seconds.
  module first_light 120 --seconds $((115 * patience)) --workers "$([ -n "$dry" ] && echo 2 || echo $((2 + cores / 4)))"
  module sanitizer 50 --seconds $((45 * patience))
  module suite 200 --seconds "$(($(left) - 8))" --processes "$([ -n "$dry" ] && echo 1 || echo 8)"
}

tune() {
  rm -f "$out/gpu_tuned.json" # an older run's must not pass for this one's
  module ceilings 45
  module profiles 75
  module tune 500 --seconds "$(($(left) - 15))" --workers "$([ -n "$dry" ] && echo 1 || echo $((2 + 2 * cores / 3)))" \
    --tuned "$out/gpu_tuned.json"
}

# bench JOB LIMIT all|none|PEERS [OPTION...]: a step that adds to $OUT/gpu_JOB.json what it does not have yet. A method that breaks
# the GPU's context ends the process, so another goes on behind it.
bench() {
  local job=$1 limit=$2 chosen=$3 peers attempt code
  shift 3
  case "$chosen" in
    all) peers=() ;;
    none) peers=(--peers "") ;;
    *) peers=(--peers "$chosen") ;;
  esac
  for attempt in "" _again _once_more; do
    step "$job$attempt" "$limit" "$python" -m lcl_ds.bench "$job" --json "$out/gpu_$job.json" --resume \
      "${peers[@]}" "$@"
    code=$?
    ((code == 1)) || break
  done
}

figures() {
  local ours="lcl_kernels counted" others=all losses=() pairs=() train size=() port
  rm -f "$out"/gpu_{losses,contrastive,sigmoid}.json "$out/gpu_train_metrics.jsonl" # an older run's
  if [ -f "$out/gpu_tuned.json" ]; then
    export LCL_KERNELS_TUNED=$out/gpu_tuned.json
  fi
  if [ -n "$dry" ]; then
    others=eager
    losses=(--shape 64,32,131 --valid 0.5 --repeats 1 --no_memory)
    pairs=(--shape 32,16 --repeats 1 --no_memory)
  fi
  # Ours on all cases, then the others, the most important ones first.
  bench losses 70 "$ours" "${losses[@]}"
  if [ -z "$dry" ]; then
    bench contrastive 50 none
    bench sigmoid 30 none
    bench losses 130 all
  fi

  step data 60 "$python" -m launch.gpu_check.data "$work/data" ${dry:+--documents 12 --image_size 32}
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  train=(deepspeed --master_port "$port" launch/train.py --ds_config ds_configs/zero3.json
    --recipe launch/recipes/gpu_check.yaml --run_dir "$work/run"
    "data.shards=$work/data/documents.tar" "data.tokenizer=$work/data/tokenizer")
  if [ -n "$dry" ]; then
    train+=(train.steps=2 train.global_batch_rows=2 data.row_tokens=256 data.row_images=4 data.workers=0 data.lanes=2
      model.vision.{hidden_size=64,intermediate_size=128,num_hidden_layers=1,num_attention_heads=4,image_size=28}
      model.decoder.{hidden_size=64,intermediate_size=128,num_hidden_layers=1,num_attention_heads=4}
      model.decoder.num_key_value_heads=4 model.pooling.num_attention_heads=4)
  fi
  if ! step train 120 "${train[@]}" && grep -qi "out of memory" "$work/train.out" "$work/train.err"; then
    # Too large for this card: the figures are then those of a run that recomputes activations, and the command says so.
    rm -rf "$work/run"
    step train_checkpointed 100 "${train[@]}" model.{vision,decoder}.activation_checkpointing=true
  fi
  [ -f "$work/run/metrics.jsonl" ] && cp "$work/run/metrics.jsonl" "$out/gpu_train_metrics.jsonl"

  bench contrastive 80 "$others" "${pairs[@]}"
  bench sigmoid 50 "$others" "${pairs[@]}"
}

"$check"
report --complete
echo "results: $out/gpu_$check.json"
exit "$failed"
