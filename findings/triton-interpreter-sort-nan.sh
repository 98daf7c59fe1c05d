#!/usr/bin/env bash
# triton 3.9.0 with TRITON_INTERPRET=1, torch 2.13.0 (CPU): tl.sort of four numbers, one of them NaN.
# Guess: the NaN comes last, as in torch and numpy, or its place is undefined but the other numbers stay.
# Seen: [2, nan, 1, 3] becomes [1, 2, 2, 3]: the NaN is gone and a number stands twice.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" -q install torch==2.13.0
"$dir/v/bin/pip" -q install triton==3.9.0 numpy==2.4.0
cat > "$dir/a.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.sort(tl.load(x + i)))


out = torch.zeros(4)
kernel[(1,)](torch.tensor([2.0, float("nan"), 1.0, 3.0]), out, 4)
print(out.tolist())
assert out.tolist() == [1.0, 2.0, 2.0, 3.0]
PY
TRITON_INTERPRET=1 "$dir/v/bin/python" "$dir/a.py"
