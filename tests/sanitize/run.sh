#!/usr/bin/env bash
# The op and cache tests on kernels built with AddressSanitizer and UBSan, for every instruction set of this machine.
# torch itself is not instrumented: leaks are not looked for, since its allocations live until the end, and odr checks are off.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$PWD/.venv/bin/python
package=build-asan/package
mkdir -p "$package"
rm -rf "$package/stretto"
cp -r python/stretto "$package/stretto"
rm -f "$package"/stretto/_C*.so
cmake -G Ninja -S . -B build-asan -DCMAKE_BUILD_TYPE=Debug -DSTRETTO_SANITIZE=ON -DPython_EXECUTABLE="$python" \
  -DSTRETTO_OUTPUT_DIR="$PWD/build-asan/module" >build-asan/configure.log || { cat build-asan/configure.log; exit 1; }
cmake --build build-asan -j "${JOBS:-$(nproc)}"
cp build-asan/module/_C*.so "$package/stretto/"

# libstdc++ is loaded first too: AddressSanitizer looks up the real __cxa_throw when it starts.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0:detect_odr_violation=0:abort_on_error=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# The shim switches stacks by hand, which AddressSanitizer would take for corruption.
export PYTHONPATH=$PWD/$package OMP_WAIT_POLICY=passive STRETTO_TEST_SHIM=0
# The table's tests and the others take about as long, and one process keeps one core busy.
run() { timeout "${SANITIZE_SECONDS:-2400}" "$python" -m pytest -p no:cacheprovider -m "not slow and not fuzz" --timeout 300 "$@"; }
run tests/ops/test_table.py "$@" >build-asan/table.log 2>&1 &
table=$!
status=0
run tests/ops tests/cache --ignore tests/ops/test_table.py --deselect tests/ops/test_concurrency.py::test_a_call_costs_little "$@" || status=$?
wait "$table" || status=$?
cat build-asan/table.log
exit "$status"
