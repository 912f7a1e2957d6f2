# shellcheck shell=bash
# What all job scripts share: where things are, one srun task a rank, and what follows from a program's exit status.
# Sourced on the first node of a job, in the job's folder.
set -euo pipefail

# Slurm may signal this shell too. It must survive until the programs have saved, so that it can requeue the job.
trap : TERM CONT USR1 USR2

# Filters and formats that a user has set for Slurm's commands would change the output parsed here. With torchrun's variables
# rank 0 would wait for torchrun's rendezvous store. sbatch passes on what limits an outer job's steps; steps of this job
# have its own memory and time without these variables.
unset "${!SQUEUE_@}" "${!SINFO_@}" "${!SCONTROL_@}" SLURM_TIME_FORMAT SLURM_CLUSTERS "${!TORCHELASTIC_@}" \
    "${!SLURM_MEM_PER_@}" SLURM_TIMELIMIT SRUN_CPUS_PER_TASK
unset "${!SLURM_STD@}" SLURM_GPUS_PER_SOCKET SLURM_CPUS_PER_GPU SLURM_DISTRIBUTION SLURM_THREADS_PER_CORE \
    SLURM_WORKING_DIR SLURM_TASK_PROLOG SLURM_TASK_EPILOG SLURM_EXACT SLURM_EXCLUSIVE SLURM_GRES
# With the first, cd prints; with the others, bash and Python print something else than they are asked for.
unset CDPATH BASH_ENV PYTHONIOENCODING
# These scripts' own variables, which the shell of another job, or a user, may export.
unset UNIMO3_STATUS_DIR IS_DECIDED RUN STEP_MINUTES WAIT_S KILL_ON_BAD_EXIT IGNORE_STOP_SIGNALS

export JOB=$SLURM_JOB_ID # `name_job` adds the link of an array

# If this script exits before an action is chosen, as by an error in site.env, `on_unexpected_exit` chooses one.
trap 'on_unexpected_exit $?' EXIT
on_unexpected_exit() { [[ $1 == 0 || -n ${IS_DECIDED:-} ]] || apply_default_policy "$1"; }

# States of a job whose script runs on: a user may stop, signal or resize it.
RUNNING_STATES="RUNNING STOPPED SIGNALING RESIZING"

# A log on a full disk must not end the script.
log() { printf '%(%H:%M:%S)T slurm: %s\n' -1 "$*" >&2 || true; }

# Slurm's controller may be away for minutes, as when it fails over: 20 tries, SLURM_RETRY_S seconds apart.
with_retries() {
    local try
    for try in {1..20}; do
        ! "$@" || return 0
        log "$1 $2 failed ($try of 20)"
        sleep "${SLURM_RETRY_S:-15}"
    done
    return 1
}

setup() {
    [[ -z ${UNIMO3_ROOT:-} ]] || apply_default_policy 78 "UNIMO3_ROOT is no longer supported; name the job's folder with sbatch --chdir=DIR"
    # In a checkout there is a .venv; when pip-installed, this file is inside the environment.
    local project
    project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    BIN=$project/.venv/bin
    if [[ $project == */lib/*/site-packages ]]; then
        BIN=${project%/lib/*}/bin
    else
        export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
    fi
    CONTAINER=()
    local site=${UNIMO3_SITE:-slurm/site.env}
    # Export all variables. Disable -u: scripts of environment modules may fail with it.
    set -a +u
    # shellcheck source=slurm/site.env.example
    [[ ! -f $site ]] || source "$site"
    set +a -u
    PYTHON=("${CONTAINER[@]}" "${UNIMO3_PYTHON:-$BIN/python}")
    JOB_FACTS=$(with_retries scontrol show job "$JOB" --oneliner)
    RANKS_PER_NODE=${RANKS_PER_NODE:-${GPUS_PER_NODE:-1}}
    RANKS_PER_NODE=$(requested_ranks || echo "$RANKS_PER_NODE")
    # A job submitted from this one would inherit them; srun gets the numbers of tasks as options.
    unset UNIMO3_RANKS_PER_NODE SLURM_NTASKS_PER_NODE SLURM_NTASKS_PER_GPU
    # These may be those of an outer job, too.
    [[ $JOB_FACTS == *" TresPerTask="* ]] || unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
    [[ $JOB_FACTS == *" TresPerNode="* ]] || unset SLURM_GPUS_PER_NODE
    [[ $JOB_FACTS == *" TresPerJob="* ]] || unset SLURM_GPUS
    [[ $JOB_FACTS == *" TresBind="* ]] || unset SLURM_GPU_BIND SLURM_TRES_BIND
    NUM_RANKS=$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))
    NUM_RESTARTS=0
    [[ ! $JOB_FACTS =~ \ Restarts=([0-9]+) ]] || NUM_RESTARTS=${BASH_REMATCH[1]}
    export SLURM_RESTART_COUNT=$NUM_RESTARTS
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((SLURM_CPUS_ON_NODE + RANKS_PER_NODE - 1) / RANKS_PER_NODE))}

    if [[ -n ${TMPDIR:-} && ! -w $TMPDIR ]]; then
        log "TMPDIR $TMPDIR cannot be written on this node and is ignored"
        unset TMPDIR
    fi
    # Compiled kernels and other caches: on each node's own disk, not on the shared one that all ranks would overload.
    export UNIMO3_LOCAL=${LOCAL_DISK:-/tmp}/unimo3-$UID
    export TRITON_CACHE_DIR=$UNIMO3_LOCAL/triton TORCHINDUCTOR_CACHE_DIR=$UNIMO3_LOCAL/inductor
    export TORCH_EXTENSIONS_DIR=$UNIMO3_LOCAL/extensions CUDA_CACHE_PATH=$UNIMO3_LOCAL/cuda
    export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONUTF8=1

    # The address that Slurm itself uses for the node: its name need not be known to the others.
    MASTER_ADDR=$(with_retries scontrol show node "$SLURMD_NODENAME" --oneliner | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    MASTER_PORT=$(free_port)
    export MASTER_ADDR MASTER_PORT
    log "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $NUM_RANKS ranks, restart $NUM_RESTARTS, rendezvous at $MASTER_ADDR:$MASTER_PORT"
}

# Ranks per node that the job itself requests. SLURM_NTASKS and SLURM_NTASKS_PER_NODE may be those of an outer job.
requested_ranks() {
    if [[ $JOB_FACTS =~ NtasksPerN:B:S:C=([1-9][0-9]*): ]]; then
        echo "${BASH_REMATCH[1]}"
    elif [[ -n ${UNIMO3_RANKS_PER_NODE:-} ]]; then
        echo "$UNIMO3_RANKS_PER_NODE"
    elif [[ -n ${SLURM_NTASKS:-} && " $JOB_FACTS " == *" NumTasks=$SLURM_NTASKS "* ]]; then
        echo $((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    else
        return 1
    fi
}

# Like `with_retries`, but ignores SIGTERM: ``scontrol requeue`` makes Slurm end this script too.
ignoring_term() { (trap '' TERM && with_retries "$@"); }

# A port below the ephemeral port range. Jobs that start together have consecutive numbers, and so do the
# ports they try first; one that is in use is skipped.
free_port() {
    local port try
    for try in {0..49}; do
        port=$((10000 + (SLURM_JOB_ID + try * 997) % 20000))
        if ! (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; then
            echo "$port"
            return 0
        fi
    done
    log "no free port found from 10000 to 30000"
    return 1
}

# Runs a module of the project once, on this node.
run_module() { "${PYTHON[@]}" -m "$@"; }

# Prints the last line ``answer: ...`` of a module's output. All other lines, as of a container, go to the log. No
# temporary file is used, since a node whose /tmp is full must still find out that it is bad.
answer_in() {
    printf '%s\n' "$1" | grep --invert-match -e '^answer:' -e '^$' >&2 || true
    printf '%s\n' "$1" | sed -n 's/^answer: *//p' | tail -n 1
}

answer_of() {
    local output status=0
    output=$(run_module "$@" 2>&1) || status=$?
    answer_in "$output"
    return "$status"
}

# Runs a command once a rank, with the variables that torch's programs look for. Each rank's status is recorded. The shell
# around a rank survives stop signals, which the program handles. With IGNORE_STOP_SIGNALS, short checks ignore them, so
# that a stop request does not look like a failed check.
ranks() {
    # The inner shell sees the task's own variables; this one must not expand them.
    # shellcheck disable=SC2016
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$NUM_RANKS" --ntasks-per-node="$RANKS_PER_NODE" --export=ALL \
        --overcommit --cpu-bind=quiet,none --kill-on-bad-exit="${KILL_ON_BAD_EXIT:-1}" --wait="${WAIT_S:-60}" --input=none \
        ${STEP_MINUTES:+--time="$STEP_MINUTES"} \
        bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
            LOCAL_WORLD_SIZE='"$RANKS_PER_NODE"'
            if [[ -n ${IGNORE_STOP_SIGNALS:-} ]]; then trap "" TERM CONT USR1 USR2; else trap : TERM CONT USR1 USR2 QUIT; fi
            status=0; "$@" || status=$?
            if [[ -n ${UNIMO3_STATUS_DIR:-} ]]; then echo "$status" >"$UNIMO3_STATUS_DIR/end_$RANK"; fi
            exit "$status"' rank "$@"
}

# Trains: MODULE ARGUMENTS...
train() {
    local program=$1 status=0
    setup
    lock_run "$@"
    requeue_before_time_limit &
    local guard=$!
    preflight "${GPUS_PER_NODE:-0}"
    reset_status_folder
    ranks "${PYTHON[@]}" -m "$@" || status=$?
    kill "$guard" 2>/dev/null || true
    log "$program: srun exited with status $status"
    after_program "$status"
}

# Runs a program without ranks: FUNCTION MODULE ARGUMENTS...; the function starts the module.
run_without_ranks() {
    local start=$1 program=$2 status=0
    shift
    setup
    lock_run "$@"
    requeue_before_time_limit &
    local guard=$!
    local NUM_RANKS=1
    preflight 0
    reset_status_folder
    "$start" "$@" || status=$?
    kill "$guard" 2>/dev/null || true
    log "$program exited with status $status"
    after_program "$status"
}

# The folder for the ranks' exit statuses.
reset_status_folder() {
    export UNIMO3_STATUS_DIR=$RUN/slurm/statuses
    rm -rf "$UNIMO3_STATUS_DIR" && mkdir -p "$UNIMO3_STATUS_DIR"
}

after_program() {
    apply_policy end --run "$RUN" --status "$1" --statuses "$UNIMO3_STATUS_DIR" --state "$(state_of "$JOB")"
}

# Finds the folder that a program works on and locks it for this job: MODULE ARGUMENTS...
lock_run() {
    local output folder early comment status=0
    output=$(run_module slurm.runs "$@" 2>&1) || status=$?
    folder=$(answer_in "$output")
    ((status == 0)) || apply_default_policy "$status" "$(printf '%s\n' "$output" | sed -n 's/^ConfigError: //p' | tail -n 1)"
    [[ -n $folder ]] || apply_default_policy 1
    HOSTS=$(with_retries scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
    early=$(early_ends)
    comment=$(with_retries squeue --noheader --jobs="$JOB" --format=%k)
    RUN=$folder
    # Earlier nodes are excluded for status 126 and 127 alone: Python did not start there, and it does here. For any other
    # status no node is.
    if [[ -n $early && $early != *"status 12"[67]* ]]; then
        early="gone "
    fi
    apply_policy begin --run "$RUN" --nodes "$HOSTS" --early "${early#* }"
    # The reason of an earlier start; the user's own comment stays.
    [[ -z $early && $comment != "held: "* ]] || with_retries scontrol update JobId="$JOB" Comment=""
}

# Slurm does not requeue what runs into its time limit. A program that has not ended by itself shortly before it, such as
# one whose ranks wait for each other, is requeued from its last checkpoint.
requeue_before_time_limit() {
    local left margin sleeper=""
    trap '[[ -z $sleeper ]] || kill "$sleeper" 2>/dev/null; exit 0' TERM # by then the program has ended
    left=$(seconds_left) || left=600
    margin=$((left > 450 ? 45 : left / 10))
    # The end may have been moved meanwhile.
    while ((left > margin + 5)); do
        sleep $((left - margin)) &
        sleeper=$!
        wait "$sleeper"
        left=$(seconds_left) || left=600
    done
    trap : TERM
    # The history gets no end of this start: the program is still running.
    log "requeue: the time limit is near and the program has not ended"
    apply_action requeue "the time limit is near and the program has not ended"
}

# A task sees all GPUs that the job has on its node, even if each rank will see only its own.
see_all_gpus() {
    [[ -n ${SLURM_GPUS_ON_NODE:-} ]] || return 0
    [[ -z ${SLURM_GPUS_PER_TASK:-}${SLURM_TRES_PER_TASK:-} ]] || export SLURM_GPUS_PER_NODE=$SLURM_GPUS_ON_NODE
    unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_TRES_BIND
    export SLURM_GPU_BIND=none
}

# Checks the nodes, and their network if there are several ranks: NUM_GPUS of each node.
preflight() {
    [[ ${PREFLIGHT:-yes} == yes ]] || return 0
    local status=0 results="$RUN/slurm/preflight.$SLURM_JOB_ID.$NUM_RESTARTS"
    rm -rf "$results" && mkdir -p "$results"
    # One node's failure must not end the checks on the others.
    local -x IGNORE_STOP_SIGNALS=yes
    local STEP_MINUTES=15
    (see_all_gpus && RANKS_PER_NODE=1 NUM_RANKS=$SLURM_JOB_NUM_NODES KILL_ON_BAD_EXIT=0 WAIT_S=300 ranks "${PYTHON[@]}" \
        -m slurm.preflight node --run "$RUN" --results "$results" --gpus "$1" \
        --local-disk "${LOCAL_DISK:-/tmp}") || status=$?
    if ((status == 0 && NUM_RANKS > 1)); then
        ranks "${PYTHON[@]}" -m slurm.preflight network --results "$results" --floor "${MIN_ALLREDUCE_GBPS:-0}" || status=$?
    fi
    apply_policy preflight --run "$RUN" --results "$results" --status "$status" --nodes "$HOSTS"
}

# Asks slurm.requeue_policy what to do, ``ACTION REASON``, and does it; returns if the job continues. Where the policy needs
# the state of another job, it answers ``ask JOB``: it may run in a container, where Slurm's commands are missing.
apply_policy() {
    local answer action="" reason known=()
    while true; do
        if ! answer=$(answer_of slurm.requeue_policy "$@" "${known[@]}"); then
            log "slurm.requeue_policy $1 failed; the job is requeued, up to 3 times in a row"
            apply_default_policy 1
        fi
        action=${answer%% *} reason=${answer#* }
        [[ $action == ask ]] || break
        known=(--known "$reason=$(state_of "$reason")")
    done
    [[ $action != go ]] || return 0
    [[ -n $action ]] || apply_default_policy 1
    log "$action: $reason"
    apply_action "$action" "$reason"
}

# The policy when no run folder is known: STATUS [REASON]. Status 78 holds the job, any other requeues it up to 3 times in a row,
# without a node that cannot start Python. The number of these starts and their nodes are in the job's comment.
apply_default_policy() {
    local action=hold early number nodes reason bad_node=""
    early=$(early_ends)
    number=$((${early%% *} + 1))
    nodes=${early#* }
    nodes=${nodes%%:*}
    nodes=${nodes:+$nodes,}${SLURMD_NODENAME:-?}
    reason="$number starts ended early on $nodes: status $1, see the job's output"
    if [[ $1 == 78 ]]; then
        reason="status 78 before the start: ${2:-see its output}"
    elif ((number > 3)); then
        reason="retries exhausted: $reason" # counted again when the job is released
    else
        action=requeue
        [[ $1 != 12[67] ]] || bad_node=${SLURMD_NODENAME:-}
        with_retries scontrol update JobId="$JOB" Comment="$reason"
    fi
    log "$action: $reason"
    apply_action "$action" "$reason" "$bad_node"
}

# Starts in a row that ended before the policy could run, as ``NUMBER NODES: REASON``; nothing if there are none.
early_ends() {
    with_retries squeue --noheader --jobs="$JOB" --format=%k | sed -n 's/^\([0-9]*\) starts ended early on /\1 /p'
}

# A job's state; nothing if Slurm has forgotten it. If squeue fails for minutes, the job may still run: RUNNING. If another
# job is COMPLETING, its end is waited for.
state_of() {
    local state try
    for try in {1..20}; do
        # The answer has a prefix, because the dynamic linker may print other lines.
        if state=$(squeue --noheader --states=all --jobs="$1" --format="state: %T" 2>&1); then
            state=$(printf '%s\n' "$state" | sed -n 's/^state: //p' | head -n 1)
            if [[ $state != COMPLETING || $1 == "$JOB" || $try == 20 ]]; then
                echo "$state"
                return 0 # in the trap of an error, `return` alone would return the error's status
            fi
            sleep "${SLURM_RETRY_S:-15}"
            continue
        fi
        [[ $state != *"Invalid job id"* ]] || return 0
        log "squeue failed ($try of 20): $state"
        sleep "${SLURM_RETRY_S:-15}"
    done
    echo RUNNING
}

# Until the job's time limit, as it is now; fails if there is none or Slurm gives no answer.
seconds_left() {
    local left
    left=$(with_retries squeue --noheader --jobs="$JOB" --format=%L)
    [[ $left =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)$ ]] || return 1
    local days=${BASH_REMATCH[2]:-0} hours=${BASH_REMATCH[4]:-0} minutes=${BASH_REMATCH[5]} seconds=${BASH_REMATCH[6]}
    echo $((((10#$days * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds))
}

# Does what was decided: ACTION REASON [NODE]; the node is excluded at the next start, for this job alone.
apply_action() {
    local action=$1 reason=$2 bad_node=${3:-} state
    IS_DECIDED=yes
    [[ $action != "done" && $action != link ]] || exit 0
    [[ $action != left ]] || exit 1
    state=$(state_of "$JOB")
    if [[ " $RUNNING_STATES " != *" $state "* ]]; then
        log "no action: Slurm has already cancelled or requeued the job ($state)"
        exit 1
    fi
    local change=keep nodes="" is_ended="" excluded
    excluded=$(with_retries squeue --noheader --jobs="$JOB" --format=%x)
    excluded=${excluded%%$'\n'*}
    [[ -z $excluded ]] || excluded=$(with_retries scontrol show hostnames "$excluded" | paste -sd,)
    if [[ -n $bad_node ]]; then
        change="set $excluded${excluded:+,}$bad_node"
    elif [[ -n ${RUN:-} ]]; then
        change=$(answer_of slurm.bad_nodes --run "$RUN" --excluded "$excluded") || change=keep
    fi
    nodes=${change#* } change=${change%% *}
    trap 'is_ended=yes' TERM
    case $action in
    requeue | exclude) ignoring_term scontrol requeue "$JOB" ;;
    hold)
        with_retries scontrol update JobId="$JOB" Comment="held: $reason" || true
        # The links that have not begun, too; release them with the array's number.
        [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || scontrol hold "$SLURM_ARRAY_JOB_ID" || true
        ignoring_term scontrol requeuehold State=SpecialExit "$JOB"
        ;;
    *) exit 1 ;;
    esac
    # Slurm changes this for a pending job only.
    [[ $change != "set" ]] || ignoring_term scontrol update JobId="$JOB" ExcNodeList="$nodes"
    # Slurm ends this script now; if it exited by itself before, Slurm would mark the job completed. Two minutes are
    # more than Slurm takes to end it.
    [[ -n $is_ended ]] || sleep 120
    exit 1
}

# A link (array task) is addressed by the array's number and its own: the plain number may mean all of them. sbatch passes
# these variables of an outer job on, so Slurm is asked whether they belong to this one.
name_job() {
    local link links
    link=${SLURM_ARRAY_JOB_ID:-}_${SLURM_ARRAY_TASK_ID:-}
    [[ $link != _ ]] || return 0
    links=$(with_retries squeue --noheader --jobs="$SLURM_JOB_ID" --format=%F_%K)
    if [[ $'\n'$links$'\n' == *$'\n'"$link"$'\n'* ]]; then
        JOB=$link
    else
        unset "${!SLURM_ARRAY_@}"
    fi
}
name_job
