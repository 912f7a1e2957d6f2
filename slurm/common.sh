# shellcheck shell=bash
# What all job scripts share: where things are, one srun task a rank, and what follows from a program's exit status.
# Sourced on the first node of a job, in the folder of the project.
set -euo pipefail

# A stop signal of Slurm's may reach this shell too; it has to live until the programs have saved, to requeue the job.
trap : TERM CONT USR1 USR2

say() { printf '%(%H:%M:%S)T slurm: %s\n' -1 "$*" >&2; }

setup() {
    ROOT=$PWD
    CONTAINER=()
    local site=${UNIMO3_SITE:-slurm/site.env}
    # Exported, for the programs to see it; and not under -u, which modules' own scripts do not bear.
    set -a +u
    # shellcheck source=slurm/site.env.example
    [[ ! -f $site ]] || source "$site"
    set +a -u
    PYTHON=("${CONTAINER[@]}" "${UNIMO3_PYTHON:-$ROOT/.venv/bin/python}")
    RANKS_PER_NODE=${RANKS_PER_NODE:-${GPUS_PER_NODE:-1}}
    [[ -z ${SLURM_NTASKS:-} ]] || RANKS_PER_NODE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$RANKS_PER_NODE}
    NUM_RANKS=$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))
    NUM_RESTARTS=${SLURM_RESTART_COUNT:-0}
    # A link of an array is addressed by the array's number and its own: the plain number may mean all of them.
    export JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    JOB=${JOB:-$SLURM_JOB_ID}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((SLURM_CPUS_ON_NODE + RANKS_PER_NODE - 1) / RANKS_PER_NODE))}

    # Compiled kernels and other caches: on each node's own disk, not on the shared one that all ranks would hammer.
    export UNIMO3_LOCAL=${LOCAL_DISK:-/tmp}/unimo3-$UID
    export TRITON_CACHE_DIR=$UNIMO3_LOCAL/triton TORCHINDUCTOR_CACHE_DIR=$UNIMO3_LOCAL/inductor
    export TORCH_EXTENSIONS_DIR=$UNIMO3_LOCAL/extensions
    export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

    # The address that Slurm itself uses for the node: its name need not be known to the others.
    MASTER_ADDR=$(patiently scontrol show node "$SLURMD_NODENAME" --oneliner | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    MASTER_PORT=$(free_port)
    export MASTER_ADDR MASTER_PORT
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $NUM_RANKS ranks, restart $NUM_RESTARTS, meeting at $MASTER_ADDR:$MASTER_PORT"
}

# Slurm's controller may be away for minutes, as when it fails over.
patiently() {
    local try
    for try in {1..20}; do
        ! "$@" || return 0
        say "$1 $2 failed ($try of 20)"
        sleep 15
    done
    return 1
}

# As `patiently`, while Slurm ends all processes of the job for what the command itself asks.
unhurt() { (trap '' TERM && patiently "$@"); }

# A port below those the kernel hands out by itself. Jobs that start together have consecutive numbers, and so do the
# ports they try first; one that something else holds is passed over.
free_port() {
    local port try
    for try in {0..49}; do
        port=$((10000 + (SLURM_JOB_ID + try * 997) % 20000))
        if ! (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    say "no free port found from 10000 to 30000"
    return 1
}

# Runs a module of the project once, on this node.
tool() { "${PYTHON[@]}" -m "$@"; }

# Runs a command once a rank, with the variables that torch's programs look for.
ranks() {
    # The inner shell sees the task's own variables; this one must not expand them.
    # shellcheck disable=SC2016
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$NUM_RANKS" --ntasks-per-node="$RANKS_PER_NODE" --export=ALL \
        --overcommit --cpu-bind=quiet,none --kill-on-bad-exit="${KILL_ON_BAD_EXIT:-1}" --wait="${WAIT_S:-60}" --input=none \
        bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
            LOCAL_WORLD_SIZE='"$RANKS_PER_NODE"'; exec "$@"' rank "$@"
}

# Trains: MODULE ARGUMENTS...
train() {
    local program=$1 status=0
    setup
    take "$@"
    preflight "$@"
    export UNIMO3_STATUS_DIR=$RUN/slurm/statuses
    rm -rf "$UNIMO3_STATUS_DIR" && mkdir -p "$UNIMO3_STATUS_DIR"
    before_the_wall &
    local guard=$!
    ranks "${PYTHON[@]}" -m "$@" || status=$?
    kill "$guard" 2>/dev/null || true
    say "$program: srun ended with status $status"
    settle_by tool slurm.outcome end --run "$RUN" --status "$status" --statuses "$UNIMO3_STATUS_DIR"
}

# Does what needs no ranks of srun's: FUNCTION MODULE ARGUMENTS...; the function starts the module.
work() {
    local start=$1 program=$2 status=0
    shift
    setup
    take "$@"
    before_the_wall &
    local guard=$!
    "$start" "$@" || status=$?
    kill "$guard" 2>/dev/null || true
    say "$program ended with status $status"
    settle_by tool slurm.outcome end --run "$RUN" --status "$status"
}

# Finds the folder that a program works on, for this job alone: MODULE ARGUMENTS...
take() {
    RUN=$(tool slurm.runs "$@") || settle $?
    HOSTS=$(patiently scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
    settle_by tool slurm.outcome begin --run "$RUN" --nodes "$HOSTS"
}

# Slurm does not requeue what runs into its time limit. A program that has not ended by itself shortly before it, such as
# one whose ranks wait for each other, is requeued from its last checkpoint.
before_the_wall() {
    local ends left
    ends=$(squeue --noheader --jobs="$JOB" --format=%e 2>/dev/null) && ends=$(date --date="$ends" +%s 2>/dev/null) || return 0
    left=$((ends - $(date +%s)))
    sleep $((left > 450 ? left - 45 : left * 9 / 10)) &
    local sleeper=$!
    trap 'kill "$sleeper" 2>/dev/null; exit 0' TERM # by then the program has ended
    wait "$sleeper"
    trap : TERM
    say "the time limit is near and the program has not ended"
    settle_by tool slurm.outcome end --run "$RUN" --status 124
}

preflight() {
    [[ ${PREFLIGHT:-yes} == yes ]] || return 0
    local status=0 mark="$RUN/slurm/preflight.$SLURM_JOB_ID.$NUM_RESTARTS"
    rm -rf "$mark" && mkdir -p "$mark"
    # One node's failure says nothing of the others: they are heard to the end.
    RANKS_PER_NODE=1 NUM_RANKS=$SLURM_JOB_NUM_NODES KILL_ON_BAD_EXIT=0 WAIT_S=300 ranks "${PYTHON[@]}" -m slurm.preflight \
        node --run "$RUN" --mark "$mark" --gpus "${GPUS_PER_NODE:-0}" --local-disk "${LOCAL_DISK:-/tmp}" || status=$?
    if ((status == 0 && NUM_RANKS > 1)); then
        ranks "${PYTHON[@]}" -m slurm.preflight network --mark "$mark" --floor "${MIN_ALLREDUCE_GBPS:-0}" || status=$?
    fi
    settle_by tool slurm.outcome preflight --run "$RUN" --mark "$mark" --status "$status" --nodes "$HOSTS"
}

# Asks a command what is to be done, ``ACTION REASON`` on one line, and does it; returns if the job goes on.
settle_by() {
    local answer action reason
    if ! answer=$("$@"); then
        say "cannot tell what to do: ${*:1:4} failed; the job is held"
        answer="hold the job's own tools failed, see its output"
    fi
    read -r action reason <<<"$answer"
    [[ $action != go ]] || return 0
    say "$action: $reason"
    act "$action" "$reason"
}

# Before a run's folder is known: 78 holds the job, anything else is tried again a few times.
settle() {
    local action=hold
    [[ $1 == 78 ]] || ((NUM_RESTARTS >= 3)) || action=requeue
    act "$action" "status $1 before the start: see the job's output"
}

act() {
    local action=$1 reason=$2 state
    [[ $action != "done" && $action != link ]] || exit 0
    state=$(patiently squeue --noheader --jobs="$JOB" --format=%T) || state=RUNNING
    if [[ $state != RUNNING ]]; then
        say "Slurm is ending the job by itself ($state): cancelled, or requeued already"
        exit 1
    fi
    local change=keep nodes="" is_ended=""
    # An action of before the run's folder was known changes no nodes.
    [[ -z ${RUN:-} ]] || change=$(tool slurm.exclusions --run "$RUN") || change=keep
    read -r change nodes <<<"$change"
    trap 'is_ended=yes' TERM
    case $action in
    requeue | exclude) unhurt scontrol requeue "$JOB" ;;
    hold)
        scontrol update JobId="$JOB" Comment="$reason" || true
        # The links that have not begun, too; release them with the array's number.
        [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || scontrol hold "$SLURM_ARRAY_JOB_ID" || true
        unhurt scontrol requeuehold State=SpecialExit "$JOB"
        ;;
    *) exit 1 ;;
    esac
    # Only of a job that waits.
    [[ $change != "set" ]] || unhurt scontrol update JobId="$JOB" ExcNodeList="$nodes"
    # Slurm ends this script now; if it exited by itself before, the job would be taken for finished.
    [[ -n $is_ended ]] || sleep 120
    exit 1
}
