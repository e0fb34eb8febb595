#!/usr/bin/env bash
# Runs every fuzz target for the given number of seconds: tests/fuzz/run.sh SECONDS [TARGET...]
# See docs/fuzzing.md. SANITIZER (default none) and CARGO_TARGET_DIR are honoured.
set -euo pipefail

usage() {
    echo "usage: $0 SECONDS [TARGET...]" >&2
    exit 2
}

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || usage
seconds=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")"

command -v cargo-fuzz >/dev/null || {
    echo "cargo-fuzz is missing: cargo install cargo-fuzz" >&2
    exit 2
}
# cargo-fuzz passes -Z options to rustc, which a stable compiler takes only so.
export RUSTC_BOOTSTRAP=1
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
sanitizer=${SANITIZER:-none}

if (($#)); then
    targets=("$@")
else
    mapfile -t targets < <(cargo fuzz list --fuzz-dir .)
fi

build=(cargo fuzz build --fuzz-dir . --target-dir "$CARGO_TARGET_DIR" --sanitizer "$sanitizer")
# Several targets cannot be named at once; all of them take hardly longer than one.
if ((${#targets[@]} == 1)); then build+=("${targets[0]}"); fi
"${build[@]}"
binaries=$CARGO_TARGET_DIR/$(rustc -vV | sed -n 's/^host: //p')/release

failed=0
for target in "${targets[@]}"; do
    mkdir -p "corpus/$target" "artifacts/$target"
    log=artifacts/$target.log
    status=0
    "$binaries/$target" "corpus/$target" \
        -max_total_time="$seconds" -max_len=4096 -timeout=30 -rss_limit_mb=2048 \
        -print_final_stats=1 -artifact_prefix="artifacts/$target/" >"$log" 2>&1 || status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    coverage=$(grep -o 'cov: [0-9]*' "$log" | tail -n 1 || true)
    if ((status == 0)); then
        echo "$target: ok, ${runs:-0} runs, ${coverage:-cov: 0}"
    else
        failed=1
        input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
        echo "$target: FAILED with status $status, input: $PWD/${input:-none}, log: $PWD/$log"
    fi
done
exit "$failed"
