#!/usr/bin/env bash
# One run on a GPU machine: builds the CUDA kernels and the peers, checks, times, writes the results. On an H100 with 16
# cores the peers took 6 minutes to build (use their wheels again), csrc 18 s, checks and kernels under 3 minutes, the
# 9B's first tokens 3. Needs torch with CUDA, triton, nvcc, and no network where PEERS has the peers' sources.
#
#   benchmarks/gpu_run.sh RESULTS [STEP...]        steps: build check sanitize kernels cpu first; default: all
#
#   PEERS=folder   sdists or wheels of mamba-ssm 2.3.2.post1 and causal-conv1d 1.7.0, built for this GPU alone
#   (pip download --no-deps --no-binary :all: mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0); wheels go to RESULTS. Any
#   machine with nvcc and the GPU machine's Python and torch can build them: 20 minutes on two cores, no GPU needed.
#   In two calls each has time enough: RESULTS build check kernels cpu, then RESULTS first sanitize.
#   PYTHON=python3  LIMIT=480   seconds in all: what is under way at its end is cut off, what had not begun is named
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(mkdir -p "${1:?where the results go}" && cd "$1" && pwd) || exit 1
shift
all="build check sanitize kernels cpu first"
steps=${*:-$all}
for step in $steps; do
  [[ " $all " == *" $step "* ]] || { echo "gpu_run.sh: no step '$step'; there are: $all" >&2; exit 2; }
done
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
start=$SECONDS
wants() { [[ " $steps " == *" $1 "* ]]; }
say() { echo "== $((SECONDS - start)) s: $*"; }
left() { echo $((${LIMIT:-480} - SECONDS + start)); }
within() {
  if (($(left) < 20)); then say "no time left for: ${*:2}"; return 1; fi
  timeout "$(left)" "$@" || say "exit code $?: ${*:2}"
}

# the peers' setup.py builds for nine GPUs; nvcc sees only the one that is here
sm=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d .)
[[ $sm =~ ^[0-9]+$ ]] || { echo "gpu_run.sh: nvidia-smi names no GPU here, and this run needs one" >&2; exit 1; }
wrapper=$(mktemp -d)/nvcc
cat > "$wrapper" <<WRAPPER
#!/usr/bin/env python3
import os, sys
real, keep = "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)", []
arguments = iter(sys.argv[1:])
for argument in arguments:
    if argument == "-gencode":
        target = next(arguments)
        keep += [argument, target] if target.endswith("sm_$sm") else []
    else:
        keep.append(argument)
os.execv(real, [real, *keep])
WRAPPER
chmod +x "$wrapper"

install_peer() { "$python" -m pip install -q --no-index --no-deps --upgrade --target "$results/site" "$@" && say "peer: $*"; }

# Each is installed as soon as it is there: causal-conv1d took three times as long as mamba-ssm.
build_peers() {
  local folder=${PEERS:?a folder with the sources or wheels of the peers} source
  mkdir -p "$results/site" "$results/wheels"  # before a Python starts that shall look there
  if ls "$folder"/*.whl > /dev/null 2>&1; then
    install_peer "$folder"/*.whl
    return
  fi
  export PYTORCH_NVCC=$wrapper MAX_JOBS=${JOBS:-12} MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
  for source in "$folder"/*.tar.gz; do
    local own=$results/wheels/$(basename "$source" .tar.gz)
    (timeout "$(left)" "$python" -m pip wheel -q --no-index --no-build-isolation --no-deps -w "$own" "$source" \
      && install_peer "$own"/*.whl) &
  done
  wait
}

if wants build; then
  [ -z "${PEERS:-}" ] || build_peers > "$results/peers.log" 2>&1 &
  peers=$!
  LONGLLAVA_CUDA=1 LONGLLAVA_CUDA_ARCHS=$sm within "$python" csrc/build.py 2>&1 | tail -n 5
  say "built csrc"
fi
wants check && { within "$python" benchmarks/kernel_checks.py --output "$results/kernel-checks.json"; say "checked"; }
if wants sanitize; then  # op by op: all of them in one process run into the limit
  for tool in memcheck racecheck; do
    # races are looked for in our CUDA kernels alone: in Triton's scan its reports are about code that Triton makes
    only=$([ "$tool" = memcheck ] || echo "--kernel-regex kns=longllava")
    for op in selective_scan causal_conv1d int8_linear; do
      seconds=$(left)
      ((seconds >= 20)) || { say "no time left for: compute-sanitizer $tool $op"; continue; }
      # shellcheck disable=SC2086
      timeout $((seconds < 60 ? seconds : 60)) compute-sanitizer --tool "$tool" $only --error-exitcode 9 \
        "$python" benchmarks/kernel_checks.py --quick --op "$op" > "$results/sanitizer-$tool-$op.log" 2>&1
      say "compute-sanitizer $tool $op: exit code $?, $(tail -n 1 "$results/sanitizer-$tool-$op.log")"
    done
  done
fi
[ -z "${peers:-}" ] || { wait "$peers"; cat "$results/peers.log" 2> /dev/null | tail -n 3; }
export PYTHONPATH="$PYTHONPATH:$results/site"
if wants cpu; then  # two cores of the machine, beside the GPU's benchmark
  (OMP_NUM_THREADS=2 within taskset -c 0,2 "$python" benchmarks/kernels.py --device cpu \
    --output "$results/kernels-cpu.json" > "$results/kernels-cpu.log" 2>&1; tail -n 1 "$results/kernels-cpu.log"
    say "timed two cores") &
  cpu=$!
fi
wants kernels && { within "$python" benchmarks/kernels.py --device cuda --output "$results/kernels.json"; say "timed the GPU"; }
if wants first; then  # what it began before --seconds are over may take 40 more
  seconds=$(($(left) - 40))
  within "$python" benchmarks/gpu_first_token.py --seconds $((seconds < 200 ? seconds : 200)) \
    --save "$results/gpu_first_token.json"
  say "first tokens"
fi
[ -z "${cpu:-}" ] || wait "$cpu"
say "done"
