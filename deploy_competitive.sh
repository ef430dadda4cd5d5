#!/usr/bin/env bash
# From a fresh machine to a running miner: makes the environment, starts the generation service and the miner (and,
# without a wallet, a rehearsal network for it) in the background, and waits until they are healthy.
set -euo pipefail

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

LOOPBACK_VALIDATORS=4
REHEARSAL_TIME_SCALE=20
START_S=180 # for the miner and the rehearsal network: importing bittensor is slow

usage() {
    cat <<'USAGE'
usage: ./deploy_competitive.sh [flags]

  --profile auto|full|tiny     models: full needs a CUDA GPU and the weights, tiny comes with the repository (auto:
                               full where it can be; on any network but the rehearsal, full or not at all)
  --config PATH                optimisation config, a YAML with DreamGaussian's keys (the profile's)
  --models PATH                models file: which checkpoint each stage loads (the profile's)
  --flux-steps N               steps of text to image (the profile's)
  --max-gaussians N            most Gaussians that a splat may grow to (the config's)
  --validation-threshold X     lowest final score worth submitting, 0..1 (0.6)
  --memory-class NAME          what runs at once and in how many bits, a class of the models file (by the GPU's memory)
  --gpus all|N,N               GPUs that the generation service uses (all)
  --host ADDRESS               where the generation service listens (127.0.0.1)
  --port N                     its port (10006)
  --allowed-hosts NAME,NAME    names by which requests may call it, beside those of loopback and --host where that is one
                               address
  --generation.endpoint URL .. services on other machines, used beside this one; may be repeated
  --workers N                  tasks that the miner works on at once (as many as the services do, at least 4)
  --retries N                  other seeds tried, in time, for a rejected result, 0..10 (2)
  --min-reward X               skip validators expected to accept fewer results per GPU second, 0..1 (0: skips none)
  --metrics-port N             the miner's Prometheus metrics on 127.0.0.1; 0: none (10007)
  --network NAME               auto, rehearsal, finney, test or ws://ADDRESS (auto: finney when a wallet is named,
                               else rehearsal, which submits nothing to the Bittensor network)
  --wallet.name NAME           coldkey name
  --wallet.hotkey NAME         hotkey name
  --wallet.path PATH           folder of the wallets
  --netuid N                   subnet (17)
  --blacklist UID|HOTKEY ...   validators to leave out (180)
  --blacklist-file PATH        more of them, one a line; read again when it changes
  --help

Running it again is quick and changes nothing. Stop with ./stop_competitive.sh.
USAGE
}

misuse() {
    printf '%s: %s (--help shows all flags)\n' "$PROGRAM" "$*" >&2
    exit 2
}

# ---- flags ----

profile=auto config="" flux_steps="" threshold=0.6 host=127.0.0.1 port=10006
workers="" network=auto wallet_name="" wallet_hotkey="" wallet_path="" netuid=17 blacklist=(180) blacklist_file=""
models="" max_gaussians="" memory_class="" gpus="" allowed_hosts="" endpoints=() retries="" min_reward="" metrics_port=""

whole() { # FLAG VALUE LOWEST HIGHEST
    if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
        misuse "$1 $2: must be a whole number in $3..$4"
    fi
}

fraction() { # FLAG VALUE
    [[ $2 =~ ^(0(\.[0-9]+)?|\.[0-9]+|1(\.0+)?)$ ]] || misuse "$1 $2: must be a number in 0..1"
}

arguments=()
for argument in "$@"; do # --flag=value is --flag value
    if [[ $argument == --*=* ]]; then
        arguments+=("${argument%%=*}" "${argument#*=}")
    else
        arguments+=("$argument")
    fi
done
set -- "${arguments[@]+"${arguments[@]}"}"
while (($# > 0)); do
    flag=$1
    shift
    case $flag in
        --help | -h)
            usage
            exit 0
            ;;
        --blacklist)
            blacklist=()
            while (($# > 0)) && [[ $1 != --* ]]; do
                [[ $1 =~ ^[1-9A-HJ-NP-Za-km-z]{46,49}$ ]] || whole --blacklist "$1" 0 65535
                blacklist+=("$1")
                shift
            done
            ((${#blacklist[@]} > 0)) || misuse "--blacklist needs at least one UID or hotkey"
            continue
            ;;
        --generation.endpoint)
            (($# > 0)) && [[ $1 != --* ]] || misuse "--generation.endpoint needs at least one URL"
            while (($# > 0)) && [[ $1 != --* ]]; do
                [[ $1 =~ ^https?://[^[:space:]]+$ ]] || misuse "--generation.endpoint $1: must be http://... or https://..."
                endpoints+=("$1")
                shift
            done
            continue
            ;;
        --profile | --config | --models | --flux-steps | --max-gaussians | --memory-class | --gpus | --allowed-hosts | \
            --validation-threshold | --host | --port | --workers | --retries | --min-reward | --metrics-port | \
            --network | --wallet.name | --wallet.hotkey | --wallet.path | --netuid | --blacklist-file) ;;
        *) misuse "unknown flag $flag" ;;
    esac
    value=${1-}
    [[ -n $value ]] || misuse "$flag needs a value"
    shift
    case $flag in
        --profile)
            [[ $value =~ ^(auto|full|tiny)$ ]] || misuse "--profile $value: must be auto, full or tiny"
            profile=$value
            ;;
        --config)
            [[ $value == /* ]] || value=$caller/$value
            [[ -r $value ]] || misuse "--config $value: no such file"
            config=$value
            ;;
        --models)
            [[ $value == /* ]] || value=$caller/$value
            [[ -r $value ]] || misuse "--models $value: no such file"
            models=$value
            ;;
        --flux-steps)
            whole "$flag" "$value" 1 50
            flux_steps=$value
            ;;
        --max-gaussians)
            whole "$flag" "$value" 7000 2000000
            max_gaussians=$value
            ;;
        --memory-class) memory_class=$value ;;
        --gpus)
            [[ $value =~ ^(all|[0-9]{1,3}(,[0-9]{1,3})*)$ ]] || misuse "--gpus $value: must be all, or numbers as 0,1"
            gpus=$value
            ;;
        --validation-threshold)
            fraction "$flag" "$value"
            threshold=$value
            ;;
        --host) host=$value ;;
        --allowed-hosts)
            [[ $value =~ ^[][A-Za-z0-9._:,-]+$ ]] || misuse "--allowed-hosts $value: must be names, separated by commas"
            allowed_hosts=$value
            ;;
        --port)
            whole "$flag" "$value" 1 65535
            port=$value
            ;;
        --workers)
            whole "$flag" "$value" 1 64
            workers=$value
            ;;
        --retries)
            whole "$flag" "$value" 0 10
            retries=$value
            ;;
        --min-reward)
            fraction "$flag" "$value"
            min_reward=$value
            ;;
        --metrics-port)
            whole "$flag" "$value" 0 65535
            metrics_port=$value
            ;;
        --network)
            [[ $value =~ ^(auto|rehearsal|finney|test|wss?://.+)$ ]] ||
                misuse "--network $value: must be auto, rehearsal, finney, test or ws://ADDRESS"
            network=$value
            ;;
        --wallet.name) wallet_name=$value ;;
        --wallet.hotkey) wallet_hotkey=$value ;;
        --wallet.path)
            [[ $value == [/~]* ]] || value=$caller/$value
            wallet_path=$value
            ;;
        --netuid)
            whole "$flag" "$value" 0 65535
            netuid=$value
            ;;
        --blacklist-file)
            [[ $value == /* ]] || value=$caller/$value
            [[ -r $value ]] || misuse "--blacklist-file $value: no such file"
            blacklist_file=$value
            ;;
    esac
done
if [[ $network == auto ]]; then
    if [[ -n $wallet_name ]]; then network=finney; else network=rehearsal; fi
fi
[[ $network == rehearsal || -n $wallet_name ]] || misuse "--network $network needs --wallet.name"
# What the tiny models make earns nothing there but penalties: only who asks for them gets them.
[[ $network == rehearsal || $profile != auto ]] || profile=full

case $host in # where to reach a service that listens there
    0.0.0.0) reach=127.0.0.1 ;;
    ::) reach='[::1]' ;;
    *:*) reach="[$host]" ;;
    *) reach=$host ;;
esac
url=http://$reach:$port
processes=(generation_service miner)
[[ $network != rehearsal ]] || processes=(generation_service rehearsal miner)
flags=$(printf '%q ' "$profile" "$config" "$flux_steps" "$threshold" "$host" "$port" "$workers" "$network" \
    "$wallet_name" "$wallet_hotkey" "$wallet_path" "$netuid" "$blacklist_file" "$models" "$max_gaussians" "$memory_class" "$gpus" \
    "$allowed_hosts" \
    "$retries" "$min_reward" "$metrics_port" "${blacklist[@]}" "${endpoints[@]+"${endpoints[@]}"}")

# ---- what is already there ----

summary() {
    echo "Running:"
    echo "  generation service  $url (PID $(cat run/generation_service.pid)), log: logs/generation_service.log"
    if [[ $network == rehearsal ]]; then
        echo "  rehearsal network   $LOOPBACK_VALIDATORS validators on loopback (PID $(cat run/rehearsal.pid))," \
            "log: logs/rehearsal.log"
    fi
    echo "  miner               $(cat run/workers) workers on network $network (PID $(cat run/miner.pid)), log: logs/miner.log"
    [[ $network != rehearsal ]] ||
        echo "*** REHEARSAL: nothing is submitted to the Bittensor network. To mine for real: --wallet.name NAME ***"
    echo "Next:"
    echo "  tail -F logs/miner.log       tasks, scores and feedback as they come"
    echo "  curl -F 'prompt=a red cube' $url/generate/ -o cube.ply"
    echo "  ./test_competitive.py        check everything"
    echo "  ./stop_competitive.sh        stop everything"
}

mkdir -p logs data
lock_deploy

alive=0
dead=""
for name in "${processes[@]}"; do
    if running "$name" >/dev/null; then
        alive=$((alive + 1))
    elif [[ -e run/$name.pid ]]; then
        dead=$name
    fi
done
if [[ -n $dead ]]; then
    die "$dead is dead behind a stale PID file (PID $(cat "run/$dead.pid")). Clear up: ./stop_competitive.sh"
fi
if ((alive > 0)); then
    [[ -e run/flags && $(<run/flags) == "$flags" ]] ||
        die "already running with other flags. Stop it first: ./stop_competitive.sh"
    ((alive == ${#processes[@]})) || die "only a part of it is running. Stop it first: ./stop_competitive.sh"
    for name in "${processes[@]}"; do
        ! crashed "$name" || die "$name crashed and waits to be started again: see logs/$name.log and run/$name.out"
    done
    echo "Already running; nothing to do."
    summary
    exit 0
fi

# ---- environment ----

python=.venv/bin/python
[[ -x $python ]] || python=$(find_python)
problem=$("$python" scripts/ops/probe.py port "$host" "$port") || die "$problem"
extras=""
[[ $profile == tiny ]] || extras=$(hardware_extras)
# shellcheck disable=SC2086  # one word for each extra
ensure_environment $extras
[[ -z $extras ]] || .venv/bin/python -m scripts.ops.build_gsplat ||
    die "gsplat, which a GPU needs, is not built: the reason is above. Without one: --profile tiny"

# ---- start ----

# start NAME ARGUMENT...: with a keeper that runs it again when it crashes later. What a process prints beside its log (a
# crash of the interpreter, say) goes to run/NAME.out.
start() {
    local name=$1 detach=()
    shift
    rm -f "run/$name.up"
    command -v setsid >/dev/null && detach=(setsid)
    PYTHONUNBUFFERED=1 "${detach[@]}" nohup .venv/bin/python scripts/ops/keep_running.py "run/$name.up" "logs/$name.log" \
        .venv/bin/python -m "$(module_of "$name")" "$@" \
        </dev/null >"run/$name.out" 2>&1 9>&- &
    printf '%s\n' $! >"run/$name.pid"
}

# started NAME LOG COMMAND...: a command that waits for it; its failure ends the deployment with the log's last lines.
started() {
    local name=$1 log=$2
    shift 2
    if "$@"; then
        touch "run/$name.up"
        return
    fi
    echo "--- the last lines of $log and run/$name.out:" >&2
    tail -n 12 "$log" "run/$name.out" >&2 2>/dev/null || true
    die "$name did not start: see above"
}

abort() {
    local code=$?
    trap - EXIT
    exec 9>&- # for the stop script
    ((code == 0)) || ./stop_competitive.sh >/dev/null 2>&1 || true
    exit "$code"
}
trap abort EXIT
trap 'exit 130' INT TERM HUP

printf '%s\n' "$flags" >run/flags
printf '%s\n' "$url" >run/url

echo "Starting the generation service on $url ..."
service=(--profile "$profile" --host "$host" --port "$port" --validation-threshold "$threshold")
[[ -z $config ]] || service+=(--config "$config")
[[ -z $flux_steps ]] || service+=(--flux-steps "$flux_steps")
[[ -z $models ]] || service+=(--models "$models")
[[ -z $max_gaussians ]] || service+=(--max-gaussians "$max_gaussians")
[[ -z $memory_class ]] || service+=(--memory-class "$memory_class")
[[ -z $gpus ]] || service+=(--gpus "$gpus")
[[ -z $allowed_hosts ]] || service+=(--allowed-hosts "$allowed_hosts")
start generation_service "${service[@]}"
started generation_service logs/generation_service.log \
    .venv/bin/python scripts/ops/probe.py service "$url" "$(cat run/generation_service.pid)"

if [[ $network == rehearsal ]]; then
    echo "Starting the rehearsal network ..."
    rm -f data/rehearsal/network.json
    start rehearsal --validators "$LOOPBACK_VALIDATORS" --time-scale "$REHEARSAL_TIME_SCALE" --endpoint "$url" \
        --state data/rehearsal
    started rehearsal logs/rehearsal.log \
        .venv/bin/python scripts/ops/probe.py file data/rehearsal/network.json "$(cat run/rehearsal.pid)" "$START_S"
fi

echo "Starting the miner ..."
rm -f run/miner.status
[[ -n $workers ]] || workers=$(.venv/bin/python scripts/ops/probe.py workers "$url" "${endpoints[@]+"${endpoints[@]}"}")
printf '%s\n' "$workers" >run/workers
miner=(--network "$network" --netuid "$netuid" --workers "$workers"
    --generation.endpoint "$url" "${endpoints[@]+"${endpoints[@]}"}"
    --validation-threshold "$threshold" --status-file run/miner.status --blacklist "${blacklist[@]}")
[[ -z $wallet_name ]] || miner+=(--wallet.name "$wallet_name")
[[ -z $wallet_hotkey ]] || miner+=(--wallet.hotkey "$wallet_hotkey")
[[ -z $wallet_path ]] || miner+=(--wallet.path "$wallet_path")
[[ -z $blacklist_file ]] || miner+=(--blacklist-file "$blacklist_file")
[[ -z $retries ]] || miner+=(--retries "$retries")
[[ -z $min_reward ]] || miner+=(--min-reward "$min_reward")
[[ -z $metrics_port ]] || miner+=(--metrics-port "$metrics_port")
start miner "${miner[@]}"
started miner logs/miner.log .venv/bin/python scripts/ops/probe.py status run/miner.status "$(cat run/miner.pid)" "$START_S"

summary
