#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): QuantizedCache(backend="fp8") after a first update of small keys.
# Guess: the scale follows what comes later, or the layer is quantised anew, as the int4 backends do.
# Seen: one scale per tensor, frozen at the first update. Keys a hundred times as large as those of the first
# prompt saturate: once they are quantised they are off by 97 % of their norm, and nothing is said.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" -q install torch==2.13.0
"$dir/v/bin/pip" -q install transformers==5.24.0
cat > "$dir/a.py" <<'PY'
import warnings
import torch
from transformers import LlamaConfig, QuantizedCache

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)


def error(first: float) -> float:
    """Relative error of later keys of size 10, after a first update of keys of size `first`."""
    cache = QuantizedCache(backend="fp8", config=config)
    keys = torch.randn(1, 2, 64, 16)
    cache.update(first * keys, first * keys, 0)
    later = 10 * torch.randn(1, 2, 64, 16)
    cache.update(later, later, 0)
    for _ in range(200):
        held, _ = cache.update(later[:, :, :1], later[:, :, :1], 0)
    return float((held[:, :, 64:128] - later).norm() / later.norm())


with warnings.catch_warnings():
    warnings.simplefilter("error")
    small, alike = error(0.1), error(10.0)
print(f"first keys as large as the later ones: off by {alike:.3f}; a hundredth of them: off by {small:.3f}")
assert alike < 0.05 and small > 0.9
PY
"$dir/v/bin/python" "$dir/a.py"
