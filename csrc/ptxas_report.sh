#!/bin/sh
# Runs a compiler and keeps what it says about registers and spills beside the object file, for tests/cuda_shim/report.py; a cached object
# brings its report along. Warnings are still shown.
for last; do [ "$previous" = -o ] && object=$last; previous=$last; done
[ -n "$object" ] || exec "$@"
"$@" 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' "$object.ptxas" >&2
exit $status
