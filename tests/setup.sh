#!/bin/bash
# Installs what the build and the tests need, once: does nothing where all is there.
#   tests/setup.sh         for building
#   tests/setup.sh test    also for the tests on this machine: network namespaces, Open MPI
#   tests/setup.sh lab     also for the VM lab: the emulator, and the programs that its guests get from this machine
set -euo pipefail

missing=()
# Some programs are where a plain user's PATH does not lead.
have() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; }
have fusermount3 || missing+=(fuse3)
have pkg-config || missing+=(pkg-config)
have cc || missing+=(gcc libc6-dev)
have make || missing+=(make)
# For the RDMA provider: libraries with their headers, and libclang, from which its bindings are made.
pkg-config --exists libibverbs 2>/dev/null || missing+=(libibverbs-dev)
pkg-config --exists librdmacm 2>/dev/null || missing+=(librdmacm-dev)
# The C library: libclang-cpp, which other packages bring along, is not it.
libclang=(/usr/lib/llvm-*/lib/libclang.so* /usr/lib/*/libclang-[0-9]*.so* /usr/lib*/libclang.so*)
[ -n "$(ls -d "${libclang[@]}" 2>/dev/null)" ] || missing+=(libclang-dev)

need_test() {
    have ip || missing+=(iproute2)
    have mpirun || missing+=(openmpi-bin)
}

need_lab() {
    local rxe=(/usr/lib/*/libibverbs/librxe-rdmav*.so)
    have qemu-system-x86_64 || missing+=(qemu-system-x86)
    # The one without libraries: a guest starts with it alone.
    [ "$(dpkg-query -W -f '${db:Status-Status}' busybox-static 2>/dev/null)" = installed ] || missing+=(busybox-static)
    have xz || missing+=(xz-utils)
    have dash || missing+=(dash)
    have ip && have tc && have bridge && have rdma || missing+=(iproute2)
    [ -e "${rxe[0]}" ] && [ -e /etc/libibverbs.d/rxe.driver ] || missing+=(ibverbs-providers)
    have ibv_devinfo || missing+=(ibverbs-utils)
    have ib_read_lat || missing+=(perftest)
    have rping || missing+=(rdmacm-utils)
    have dropbear && have dbclient || missing+=(dropbear-bin)
    # A peer that is measured beside DistFUSE.
    have mkfs.ocfs2 || missing+=(ocfs2-tools)
    # The kernel extension: the compiler that the kernels were built with, and what their build programs link to.
    have gcc-12 || missing+=(gcc-12)
    have strip || missing+=(binutils)
    [ -n "$(ls /usr/lib/*/libelf.so.1 /lib/*/libelf.so.1 2>/dev/null)" ] || missing+=(libelf1)
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
}
case "${1:-}" in
    test) need_test ;;
    lab) need_lab ;;
esac

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
