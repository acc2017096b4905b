#!/bin/bash
# All tests, in one build profile: formatting, lints, the tests of each crate, then the whole system.
# Prints a summary; its last line is "N passed, N failed". Logs: target/test-logs/.
set -euo pipefail
cd "$(dirname "$0")/.."

target="${CARGO_TARGET_DIR:-$PWD/target}"
logs="$target/test-logs"
mkdir -p "$logs"
find "$logs" -maxdepth 1 -type f -delete
passed=0
failed=0
# A backtrace of a test's error tells where in the test: its message does already.
export RUST_BACKTRACE=0
export FSD_BIN="$target/release/fsd"

report() { # step, passed, failed, seconds
    passed=$((passed + $2))
    failed=$((failed + $3))
    printf '%-34s %5d passed %3d failed %5d s\n' "$1" "$2" "$3" "$4" >>"$logs/summary"
}

# Puts into the summary what a log says of failures: which tests and scenarios, how each begins to say why, and what processes of
# its cluster said was wrong.
failures() { # log
    awk '
        /(^|: )test .* FAILED( +[0-9.]+ s)?$/ { more = 1 }
        # The line that is between an error and its cause says nothing.
        /^( *node [0-9]+:)? *$/ { next }
        /---- .* stdout ----$/ || /panicked at / { more = 6 }
        / (WARN|ERROR) [a-z_:]+: / { more = more > 1 ? more : 1 }
        /^[a-z0-9.-]+ +FAILED in / { more = 5 }
        /^error/ { more = 1 }
        more-- > 0 && !seen[$0]++ && ++lines <= 40 { print "    " substr($0, 1, 240) }
    ' "$1" >>"$logs/summary"
}

# A step that passes or fails as a whole.
step() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    if "$@" 2>&1 | tee "$logs/${name// /-}.log"; then
        report "$name" 1 0 $((SECONDS - start))
    else
        report "$name" 0 1 $((SECONDS - start))
        failures "$logs/${name// /-}.log"
        return 1
    fi
}

# Adds to the line of each test how many seconds have gone by since the one before, which is what it took where a program runs one
# test at a time. What a test's processes say may come between its name and its result.
timed() {
    local line name='' now last=${EPOCHREALTIME/[.,]/}
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in
            "test "*" ... "*) name=${line%% ... *} ;;
        esac
        case $line in
            "test "*" ... ok" | "test "*" ... FAILED" | ok | FAILED)
                now=${EPOCHREALTIME/[.,]/}
                [ "$line" != ok ] && [ "$line" != FAILED ] || line="$name ... $line"
                printf '%s %d.%d s\n' "$line" $(((now - last) / 1000000)) $(((now - last) / 100000 % 10))
                last=$now
                ;;
            *)
                # A program begins.
                case $line in "running "*" test"*) last=${EPOCHREALTIME/[.,]/} ;; esac
                printf '%s\n' "$line"
                ;;
        esac
    done
}

# Tests that are counted, by name and log.
count() { # name, status, seconds
    local name=$1 log="$logs/${1// /-}.log" ok bad
    ok=$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$log")
    bad=$(awk '/^test result:/ { n += $6 } END { print n + 0 }' "$log")
    # It did not build, or a test program was killed.
    if [ "$2" != 0 ] && [ "$bad" = 0 ]; then bad=1; fi
    report "$name" "$ok" "$bad" "$3"
    [ "$bad" = 0 ] || failures "$log"
}

# A step whose tests are counted.
tests() {
    local name=$1 start=$SECONDS status=0
    shift
    echo "== $name: $*"
    "$@" 2>&1 | timed | tee "$logs/${name// /-}.log" || status=1
    count "$name" "$status" $((SECONDS - start))
}

# Starts a step whose tests are counted; `beside_ended` waits for it, and shows what it said.
beside() {
    beside_name=$1
    beside_start=$SECONDS
    shift
    echo "== $beside_name, in the background: $*"
    local said="$logs/said"
    rm -f "$said"
    mkfifo "$said"
    (
        "$@" >"$said" 2>&1 &
        child=$!
        # What it runs ends with it, for it is `timeout`.
        trap 'kill "$child"; exit 1' TERM
        timed <"$said"
        wait "$child"
    ) >"$logs/${beside_name// /-}.log" &
    beside_job=$!
}

beside_ended() {
    local status=0
    wait "$beside_job" || status=1
    beside_job=
    rm -f "$logs/said"
    cat "$logs/${beside_name// /-}.log"
    count "$beside_name" "$status" $((SECONDS - beside_start))
}

# The tests on real mounts that took longest.
slowest() {
    cat "$logs"/system*.log 2>/dev/null | sed -nE 's/^test (.*) \.\.\. [a-zA-Z]+ +([0-9.]+) s$/\2 \1/p' | sort -rn | awk '
        NR == 1 { print "the longest tests on real mounts:" }
        NR <= 10 { printf "%10.1f s  %s\n", $1, $2 }'
}

# Scenarios in guests with RDMA devices; the last line says how many. If the lab cannot run at all, that is a failure:
# nothing else here tests RDMA. `make lab` runs all scenarios on both kernels.
lab() { # kernel, scenarios
    local name="lab $1" start=$SECONDS log="$logs/lab-$1.log" status=0 counts passed_here failed_here
    echo "== $name: fsd-lab test --kernel $*"
    timeout 1800 "$target/release/fsd-lab" test --limit 900 --kernel "$@" 2>&1 | tee "$log" || status=1
    counts=$(tail -1 "$log" | grep -E '^[0-9]+ passed, [0-9]+ failed$' || echo "0 passed, 1 failed")
    read -r passed_here _ failed_here _ <<<"$counts"
    if [ "$status" != 0 ] && [ "$failed_here" = 0 ]; then failed_here=1; fi
    report "$name" "$passed_here" "$failed_here" $((SECONDS - start))
    [ "$failed_here" = 0 ] || failures "$log"
}

# fsx is a tool of its own, under a licence of its own: it is run, never linked.
fsx_tool() {
    [ -x "$target/tools/bin/fsx" ] || cargo install fsx --locked --root "$target/tools"
}

# Licences and sources of dependencies (deny.toml). Advisories are not looked at: their database is a repository elsewhere.
deny_tool() {
    [ -x "$target/tools/bin/cargo-deny" ] || cargo install cargo-deny --version '^0.20' --locked --root "$target/tools"
}

deny() { # manifest
    "$target/tools/bin/cargo-deny" --config deny.toml --manifest-path "$1" \
        check --hide-inclusion-graph licenses bans sources
}

fsx_on() { # cache mode
    # The mount's folder comes in the environment of the command that fsd dev runs.
    # shellcheck disable=SC2016
    timeout 300 "$FSD_BIN" dev --mounts 1 --pool 128MiB --cache "$1" -- \
        sh -c 'timeout 240 "$0" -f "$2" -N 4000 -S 7 -P "$1" "$FSD_DIR/0/fsx"' "$target/tools/bin/fsx" "$logs" \
        "tests/fsx/$1.toml"
}

beside_job=
finish() {
    # Also where a step could not be run at all.
    [ -z "$beside_job" ] || kill "$beside_job" 2>/dev/null || true
    echo
    echo "== summary (logs: $logs)"
    cat "$logs/summary"
    slowest
    echo "$passed passed, $failed failed" | tee "$logs/total"
}
trap finish EXIT

step fmt cargo fmt --all --check || true
step clippy cargo clippy --release --workspace --all-targets -- -D warnings || true
# A workspace of its own, for the sake of its features. What it shares with the other one, the crates of others, is built once: its
# Cargo.lock has the same versions.
sim=(--release --manifest-path tests/sim/Cargo.toml --target-dir "$target")
step "sim fmt" cargo fmt --manifest-path tests/sim/Cargo.toml --check || true
step "sim clippy" cargo clippy "${sim[@]}" --all-targets -- -D warnings || true
if step "deny build" deny_tool; then
    step deny deny Cargo.toml || true
    step "sim deny" deny tests/sim/Cargo.toml || true
fi
tests "rt simulated" timeout 300 cargo test --release -p rt --features sim
tests sim env RUST_LOG=off timeout 900 cargo test "${sim[@]}" --no-fail-fast
# Tests on real mounts that mostly wait (for terms, for the dead to be declared so, for servers that are away) run beside the others,
# one of them at a time. Those whose own times decide have the machine for themselves: terms of two seconds among links that are cut, moments
# in which nothing is under way, closes that the kernel tells late.
waiting=(anew:: both_die:: copies:: deaths:: faults:: former:: half_done:: keeper:: launch:: leftovers:: links:: locks_many:: lost_end::
    mounting:: names_held:: servers_away:: status:: stopping:: storage::)
alone=(mappings:: partitions:: replace:: storm::)
not() { printf -- '--skip %s ' "$@"; }
# shellcheck disable=SC2046
on_mounts() {
    local one=(cargo test --release -p system-tests --test system -- --test-threads=1)
    beside "system waiting" timeout 2400 "${one[@]}" "${waiting[@]}"
    tests system timeout 2400 "${one[@]}" $(not "${waiting[@]}" "${alone[@]}")
    beside_ended
    tests "system alone" timeout 1200 "${one[@]}" "${alone[@]}"
}

# Without the programs there is nothing to test as a whole. All targets at once, so that the features of the tests do not have the same
# crates built a second time.
if step build cargo build --release --workspace --exclude system-tests --all-targets; then
    tests crates timeout 1500 cargo test --release --workspace --exclude system-tests --no-fail-fast
    # Builds the programs that guests run, too.
    tests "system units" timeout 1200 cargo test --release -p system-tests --lib --bins --test arrows --no-fail-fast
    if step "system build" cargo test --release -p system-tests --test system --no-run; then on_mounts; fi
    lab 6.12 devices faults kmod extension contended strain mount-rdma conformance counts coherence histories holder-killed
    lab 6.1 devices kmod extension contended mount-rdma
    if step "fsx build" fsx_tool; then
        step "fsx direct" fsx_on direct || true
        step "fsx writethrough" fsx_on writethrough || true
    fi
fi
[ "$failed" = 0 ]
