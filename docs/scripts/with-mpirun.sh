#!/bin/sh
# A cluster as an MPI job: one rank a host.
set -eu

hosts=${HOSTS:-hosts}                  # MPI's hostfile: one line a host
fsd=${FSD:-/usr/local/bin/fsd}
port=${PORT:-7007}                     # free on the first host
roles=${ROLES:-meta=0,storage=0,client=all}

[ $# -gt 0 ] || { echo "usage: HOSTS=FILE $0 COMMAND…" >&2; exit 2; }
first=$(sed 's/#.*//' "$hosts" | awk 'NF { print $1; exit }')
count=$(sed 's/#.*//' "$hosts" | awk 'NF' | wc -l)
FSD_LAUNCH_KEY=$("$fsd" keygen -)
export FSD_LAUNCH_KEY
exec mpirun -n "$count" --hostfile "$hosts" --map-by node -x FSD_LAUNCH_KEY \
    "$fsd" launch --rendezvous "$first:$port" --roles "$roles" -- "$@"
