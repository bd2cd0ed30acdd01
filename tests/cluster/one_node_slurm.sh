#!/usr/bin/env bash
# A Slurm of one node on this machine, without systemd: one_node_slurm.sh start|stop DIR, as root, with DIR for all that it writes.
# Then SLURM_CONF=DIR/slurm.conf is what sbatch and its like need. Debian: apt-get install slurm-wlm munge
set -euo pipefail
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf
if [[ $1 == stop ]]; then
  for pid in "$dir"/run/*.pid; do
    if [[ -f $pid ]]; then kill "$(cat "$pid")" 2>/dev/null || true; fi
  done
  exit
fi
host=$(hostname -s)
mkdir -p "$dir"/{state,spool,run}
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
# how long a job that is put back into the queue must wait: until the credentials of its first start are void
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16917
SlurmdPort=16918
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.pid
SlurmdSpoolDir=$dir/spool
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobRequeue=1
KillWait=10
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(env -u OMP_NUM_THREADS nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
if ! munge -n >/dev/null 2>&1; then
  mkdir -p /run/munge /var/lib/munge /var/log/munge
  chown munge /run/munge /var/lib/munge /var/log/munge
  [[ -f /etc/munge/munge.key ]] || su -s /bin/sh munge -c mungekey
  su -s /bin/sh munge -c munged
fi
slurmctld -f "$SLURM_CONF"
sleep 1
slurmd -f "$SLURM_CONF"
for _ in $(seq 60); do
  if sinfo -h -o %T | grep -q idle; then exit; fi
  sleep 0.5
done
echo "Slurm didn't come up; see $dir/slurmctld.log and $dir/slurmd.log" >&2
exit 1
