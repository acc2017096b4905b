# DistFUSE. The first things to run: `make demo`, `make test`.

.PHONY: all build setup demo test lab clean

all: build

build: setup
	cargo build --release --workspace

setup:
	@tests/setup.sh

demo: build
	target/release/bench demo

test: setup
	@tests/run.sh

lab:
	@echo "make lab: the VM lab (QEMU guests with SoftRoCE and the kernel extension) is not there yet" >&2
	@exit 1

clean:
	cargo clean
