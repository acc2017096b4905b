#!/bin/bash
# Installs what the build and the tests need, once: does nothing where all is there.
set -euo pipefail

missing=()
have() { command -v "$1" >/dev/null 2>&1; }
have fusermount3 || missing+=(fuse3)
have pkg-config || missing+=(pkg-config)
have cc || missing+=(gcc libc6-dev)
have make || missing+=(make)

if ((${#missing[@]})); then
    echo "setup: installing ${missing[*]}"
    sudo=""
    [ "$(id -u)" = 0 ] || sudo="sudo"
    export DEBIAN_FRONTEND=noninteractive
    $sudo apt-get update -q
    $sudo apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

have cargo || { echo "setup: cargo is missing: install Rust 1.90 or later" >&2; exit 1; }
if [ ! -e /dev/fuse ]; then
    modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || echo "setup: /dev/fuse is missing: mounting will not work on this machine" >&2
fi
