# DistFUSE. The first things to run: `make demo`, `make test`.

.PHONY: all build setup demo test sim lab lab-programs soak lab-bench checkpatch clean

all: build

build: setup
	cargo build --release --workspace

setup:
	@tests/setup.sh

demo: build
	target/release/bench demo

test:
	@tests/setup.sh test
	@tests/setup.sh lab
	@tests/run.sh

# The whole system below FUSE in deterministic simulation (docs/simulation.md); make sim SEEDS=1..10000 FLAGS="--mounts 3".
SEEDS ?= 1..1000
sim:
	cargo build --release --manifest-path tests/sim/Cargo.toml --target-dir target
	RUST_LOG=off target/release/fsd-sim --seeds $(SEEDS) $(FLAGS)

# Guests under QEMU with SoftRoCE; tests/lab/README.md has what else the lab can do.
lab: lab-programs
	cargo run --release -q -p lab -- test --limit 1800

# The checks among those scenarios round after round; make soak MINUTES=60.
MINUTES ?= 60
soak: lab-programs
	target/release/fsd-lab soak --minutes $(MINUTES)

lab-programs:
	@tests/setup.sh lab
	cargo build --release --workspace
	cargo test --release -p rdma-transport --test conformance --no-run
	cargo test --release -p system-tests --no-run

# Figures, in the same guests: file systems side by side, the RDMA provider beside perftest, the paper's figures; OCFS2 beside the extension.
lab-bench:
	@tests/setup.sh lab
	cargo build --release --workspace
	cargo run --release -q -p lab -- run --limit 2400 --scenario tests/lab/scenarios/bench-fs.toml
	cargo run --release -q -p lab -- run --limit 900 --scenario tests/lab/scenarios/bench-rdma.toml
	cargo run --release -q -p lab -- run --limit 2700 --scenario tests/lab/scenarios/paper.toml
	cargo run --release -q -p lab -- run --limit 1800 --scenario tests/lab/scenarios/peers.toml

# The kernel's style, by its own script: make checkpatch CHECKPATCH=/path/to/linux/scripts/checkpatch.pl
checkpatch:
	@test -f "$(CHECKPATCH)" || { echo "say where the script is: CHECKPATCH=linux/scripts/checkpatch.pl (Debian: in the package linux-source-6.1)" >&2; exit 1; }
	cd kmod && perl $(abspath $(CHECKPATCH)) -f *.c *.h include/uapi/*.h

clean:
	cargo clean
