# shellcheck shell=bash
# A Ray cluster over the allocation of a Slurm job, open to this job's token alone. `start_ray_cluster` brings it up and sets RAY_HEAD, RAY_PORT
# and `cluster`, the process that ends when it does; it is torn down when the script that sources this one ends.
export RAY_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 4000)) # jobs that share a node must not share a port

ray_is_up() {
  $CONTAINER "$PYTHON" -m ray.scripts.scripts health-check --address "$RAY_HEAD:$RAY_PORT" >/dev/null 2>&1
}
export -f ray_is_up

start_ray_cluster() {
  local cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
  # The batch script runs on the first node of the allocation, and so does task 0 below: the head of the cluster.
  RAY_HEAD=$($CONTAINER "$PYTHON" -c 'from ray.util import get_node_ip_address as address; print(address())')
  RAY_AUTH_TOKEN=$($CONTAINER "$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')
  export RAY_HEAD RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
  # shellcheck disable=SC2016 # what nodes run holds variables of each node
  srun --quiet --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" --overlap bash -c '
    if [[ $SLURM_PROCID == 0 ]]; then
      role=(--head --node-ip-address="$RAY_HEAD" --port="$RAY_PORT" --include-dashboard=false)
    else
      until ray_is_up; do sleep 1; done
      role=(--address="$RAY_HEAD:$RAY_PORT")
    fi
    exec $CONTAINER "$PYTHON" -m ray.scripts.scripts start --block --num-cpus="$1" \
      ${OBJECT_STORE_BYTES:+--object-store-memory="$OBJECT_STORE_BYTES"} \
      --temp-dir="/tmp/ray-$SLURM_JOB_ID-$SLURM_PROCID" "${role[@]}"
  ' ray-node "$cpus" >/dev/null &
  cluster=$!
  trap tear_down EXIT
  trap 'exit 143' TERM # Slurm ends the job: leave by way of EXIT
  until ray_is_up; do
    kill -0 "$cluster" 2>/dev/null || { echo "error: Ray could not be started on the nodes of this job" >&2; exit 1; }
    sleep 1
  done
}

# shellcheck disable=SC2329 # called by the trap above
tear_down() {
  local status=$?
  kill "$cluster" 2>/dev/null || true
  wait "$cluster" || true
  if ((status == 0)); then # else its logs may say why
    # shellcheck disable=SC2016
    srun --quiet --ntasks-per-node=1 bash -c 'rm -rf "/tmp/ray-$SLURM_JOB_ID-$SLURM_PROCID"'
  fi
}
