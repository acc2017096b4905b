#!/bin/sh
# A cluster on the hosts of a file (one name a line), reached with ssh without a password.
set -eu

hosts=${HOSTS:-hosts}
fsd=${FSD:-/usr/local/bin/fsd}

[ $# -gt 0 ] || { echo "usage: HOSTS=FILE $0 COMMAND…   (runs in the mount: cd \"\$FSD_MOUNT\")" >&2; exit 2; }
exec "$fsd" launch --hostfile "$hosts" --tag -- "$@"
