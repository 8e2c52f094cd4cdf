#!/usr/bin/env bash
# A run of fedmom on all nodes of a Slurm job: one Ray over them, and the command that follows, on the first.
#
#   sbatch --nodes=4 slurm.sh fedmom run config.toml --set engine.workers=32
#
# The run's folder is runs/slurm-JOBID (or $RUN) where the job was submitted; the first node alone writes it. A job that
# is requeued goes on with it: two minutes before its time limit it stops at a checkpoint and requeues itself, and Slurm
# requeues what it preempts. `scancel` stops it at a checkpoint too, for good.
#SBATCH --job-name=fedmom
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# --exclusive: two Rays on one node would want the same ports. GPUs: add --gpus-per-node.
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=0
port=6379
run=${RUN:-runs/slurm-$SLURM_JOB_ID}
[ $# -gt 0 ] || { echo "slurm.sh: name the command: sbatch slurm.sh fedmom run CONFIG …" >&2; exit 2; }

# A node's address as the first one sees it, never that of its loopback, by which no other node reaches it.
address() {
    local found
    found=$(getent ahostsv4 "$1" | awk '$1 !~ /^127\./ { print $1; exit }')
    [ -n "$found" ] || { echo "slurm.sh: $1 has no address but its loopback's; see /etc/hosts" >&2; exit 2; }
    echo "$found"
}

steps=() # srun's process of each node, in the order of $nodes
start_ray() {
    local node=$1 here
    shift
    here=$(address "$node")
    # --overlap: the command needs the first node's cores too. srun does not inherit --cpus-per-task.
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ray start "$@" --node-ip-address="$here" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
    steps+=($!)
}

# Returns once so many nodes are there; ends the job if Ray has ended on one of them instead.
await_nodes() {
    python -W ignore - "$head" "$port" "$1" "${steps[@]}" <<'END' &
import os
import socket
import sys
import time

import ray

host, port, wanted, *steps = sys.argv[1:]


def pause():
    time.sleep(0.2)
    for step in steps:
        try:
            os.kill(int(step), 0)
        except ProcessLookupError:
            sys.exit(1)


while True:
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        break
    except OSError:
        pause()
ray.init(address=f"{host}:{port}", log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(wanted):
    pause()
END
    waiting=$!
    if ! wait "$waiting"; then
        echo "slurm.sh: Ray did not come up on every one of ${nodes[*]}; the lines above say why" >&2
        exit 4
    fi
    waiting=""
}

# shellcheck disable=SC2317  # traps call these two
{
    # Whatever happens, Ray ends: on SIGTERM srun has Slurm kill all processes of its step.
    finish() {
        trap '' TERM USR1
        kill -TERM ${waiting:+"$waiting"} ${command:+"$command"} "${steps[@]}" 2>/dev/null || true
        wait || true
    }
    # fedmom leaves a checkpoint on SIGTERM, and ends with status 130.
    stop() {
        [ -n "$command" ] || exit 130
        kill -TERM "$command" 2>/dev/null || true
    }
}
waiting="" command="" limit=""
trap finish EXIT
trap stop TERM
trap 'limit=near; stop' USR1

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(address "${nodes[0]}")
start_ray "${nodes[0]}" --head --port="$port" --include-dashboard=false
await_nodes 1
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$head:$port"
done
await_nodes "${#nodes[@]}"

where=(--out "$run")
[ ! -e "$run/config.toml" ] || where=(--resume "$run")
"$@" "${where[@]}" --set "simulation.ray-address=$head:$port" &
command=$!
status=0
# A signal ends `wait`, not the command.
while wait "$command" && status=0 || status=$?; kill -0 "$command" 2>/dev/null; do :; done
command=""
# 130: stopped as asked. 4: something failed, perhaps in stopping. Either has a checkpoint.
if [ -n "$limit" ] && { [ "$status" -eq 130 ] || [ "$status" -eq 4 ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
