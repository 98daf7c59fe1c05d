#!/usr/bin/env bash
# torch 2.13.0 (CPU): scaled_dot_product_attention with values narrower than keys, as latent attention (MLA) has them.
# Guess: the flash kernel takes value_dim < head_dim, as FlashAttention does; memory stays linear in the length.
# Seen: it falls back to the kernel that forms all scores: 4 heads at 4,096 tokens take 660 MB and 1.8 s more, where
# the same values, padded with zeros to head_dim, take 14 MB and .3 s. Fewer kv heads (enable_gqa), float16
# and gradients do not fall back; a query whose last dimension is strided does.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" -q install torch==2.13.0 numpy==2.4.0
cat > "$dir/a.py" <<'PY'
import resource
import sys
import time

import torch
from torch.nn.functional import pad, scaled_dot_product_attention


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


case, n = sys.argv[1], 4096
torch.set_num_threads(1)
torch.manual_seed(0)
query, key, value = torch.randn(1, 4, n, 96), torch.randn(1, 4, n, 96), torch.randn(1, 4, n, 64)
small = torch.randn(1, 4, 64, 96)
scaled_dot_product_attention(small, small, small, is_causal=True)
begin, before = time.perf_counter(), peak_mb()
if case == "narrow":
    scaled_dot_product_attention(query, key, value, is_causal=True)
elif case == "padded":
    scaled_dot_product_attention(query, key, pad(value, (0, 32)), is_causal=True)[..., :64]
elif case == "groups":
    scaled_dot_product_attention(query, key[:, :2], key[:, :2], is_causal=True, enable_gqa=True)
elif case == "strided":
    strided = query.transpose(2, 3).contiguous().transpose(2, 3)
    scaled_dot_product_attention(strided, key, key, is_causal=True)
print(case, round(peak_mb() - before), "MB", round(time.perf_counter() - begin, 2), "s")
PY
run() { "$dir/v/bin/python" "$dir/a.py" "$1"; }
narrow=$(run narrow); padded=$(run padded); groups=$(run groups); strided=$(run strided)
printf '%s\n' "$narrow" "$padded" "$groups" "$strided"
mb() { echo "$1" | cut -d' ' -f2; }
test "$(mb "$narrow")" -gt 400 && test "$(mb "$padded")" -lt 100
test "$(mb "$groups")" -lt 100 && test "$(mb "$strided")" -gt 400
"$dir/v/bin/python" - <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

query, value = torch.randn(1, 4, 256, 96), torch.randn(1, 4, 256, 64)
with torch.no_grad():
    exact = torch.nn.functional.scaled_dot_product_attention(query, query, value, is_causal=True)
    wide = torch.nn.functional.pad(value, (0, 32))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        padded = torch.nn.functional.scaled_dot_product_attention(query, query, wide, is_causal=True)
assert torch.allclose(exact, padded[..., :64], atol=1e-5)
print("the padded values give the same output")
PY
