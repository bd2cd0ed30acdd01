# shellcheck shell=bash
# What the training scripts share. `train PROGRAM ARGUMENT…` trains on every node of the allocation, under launcher/supervise.py, which
# starts again after faults. Asked to stop by USR1, which Slurm sends 5 minutes before the time limit, the run saves and the job is put
# back into the queue; it then goes on, as it does when it is preempted, requeued, or submitted again.
#
#   PYTHON              another interpreter than .venv/bin/python
#   PROCESSES_PER_NODE  another number than one per GPU; it must be given where there are none
#   LAUNCHER            deepspeed (the default: one launcher per node, without ssh), or srun, which starts every process itself
#   CONTAINER           words that come before the interpreter of every process, such as: apptainer exec --nv image.sif
#   HOST_PYTHON         with CONTAINER, an interpreter outside of it that has this project's packages; torch isn't imported there
#   DRY_RUN             if set, what would run is printed; this needs no Slurm: DRY_RUN=1 bash launcher/slurm/pretrain.sbatch …
#
# Account and partition are sbatch's own variables: SBATCH_ACCOUNT, SBATCH_PARTITION.
export PYTHON=${PYTHON:-.venv/bin/python} CONTAINER=${CONTAINER:-}
HOST_PYTHON=${HOST_PYTHON:-$PYTHON}
export PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}

# The nodes' host file is what tells DeepSpeed's launcher, started once per node, of the others.
# shellcheck disable=SC2016 # what nodes run holds variables of each node
WITH_DEEPSPEED='
  hosts=$(mktemp)
  trap "rm -f $hosts" EXIT
  scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$PROCESSES_PER_NODE/" >"$hosts"
  $CONTAINER "$PYTHON" -m deepspeed.launcher.runner --hostfile "$hosts" --no_ssh --node_rank "$SLURM_NODEID" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"'
# shellcheck disable=SC2016
WITH_SRUN='
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec $CONTAINER "$PYTHON" "$@"'

train() {
  if [[ -z $PROCESSES_PER_NODE ]]; then
    echo "error: the job has no GPUs; give --gpus-per-node, or PROCESSES_PER_NODE to train on CPUs" >&2
    return 2
  fi
  local nodes=${SLURM_JOB_NUM_NODES:-1} cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}} tasks=1 on_node=$WITH_DEEPSPEED options=()
  case ${LAUNCHER:-deepspeed} in
    deepspeed) ;;
    srun)
      tasks=$PROCESSES_PER_NODE on_node=$WITH_SRUN cpus=$((cpus / PROCESSES_PER_NODE))
      if ((cpus == 0)); then cpus=1 options=(--overcommit); fi
      ;;
    *)
      echo "error: LAUNCHER is $LAUNCHER; choose deepspeed or srun" >&2
      return 2
      ;;
  esac
  local command=(srun --kill-on-bad-exit=1 --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks"
    --cpus-per-task="$cpus" "${options[@]}" bash -c "$on_node" node "$@")
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$HOST_PYTHON" launcher/supervise.py -- "${command[@]}"
    echo
    return
  fi
  # The batch script runs on the first node of the allocation, where rank 0 will be. Jobs that share a node must not share a port.
  MASTER_ADDR=$("$HOST_PYTHON" -c 'import socket; print(socket.gethostbyname(socket.gethostname()))')
  MASTER_PORT=$((24000 + SLURM_JOB_ID % 5000)) # below what systems give to outgoing connections
  export MASTER_ADDR MASTER_PORT
  local requeue=false status=0
  "$HOST_PYTHON" launcher/supervise.py -- "${command[@]}" &
  local supervisor=$!
  trap 'requeue=true; kill -USR1 "$supervisor"' USR1
  trap '$requeue || kill -USR1 "$supervisor"' TERM # a second one would end it at once
  while kill -0 "$supervisor" 2>/dev/null; do
    wait "$supervisor" || true # a signal ends wait, not what is waited for
  done
  trap - USR1 TERM
  wait "$supervisor" || status=$?
  if $requeue && ((status != 2)); then # also after a fault: the next start goes on from the newest checkpoint
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}
