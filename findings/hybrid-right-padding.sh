#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): a prompt padded on the right, mask and position_ids given.
# Guess: the next token is that of the prompt alone, as it is with padding on the left.
# Seen: so it is in Llama (3e-7 of the largest logit). In hybrid models the recurrent or convolution state
# goes on through the padding that the mask hides, and the next token's logits are others, without a warning:
# Bamba off by 6.5e-01, Qwen3-Next by 3.6e-02, with padding on the left both by less than 1e-6.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" -q install torch==2.13.0
"$dir/v/bin/pip" -q install transformers==5.24.0
cat > "$dir/a.py" <<'PY'
import torch
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
models = {
    "llama": LlamaForCausalLM(LlamaConfig(**sizes)),
    "bamba": BambaForCausalLM(BambaConfig(**sizes, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=32,
                                          mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16)),
    "qwen3_next": Qwen3NextForCausalLM(Qwen3NextConfig(
        **sizes, head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32)),
}
ids, after = torch.randint(3, 96, (1, 20)), torch.randint(3, 96, (1, 1))
pad, one = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 20, dtype=torch.long)
off = {}
for name, model in models.items():
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=torch.cat([ids, after], 1)).logits[0, -1]
        for side, text, mask in (("left", [pad, ids], [pad, one]), ("right", [ids, pad], [one, pad])):
            mask = torch.cat(mask, 1)
            cache = model(input_ids=torch.cat(text, 1), attention_mask=mask, use_cache=True,
                          position_ids=(mask.cumsum(1) - 1).clamp(min=0))["cache"]
            found = model(input_ids=after, cache=cache, position_ids=torch.tensor([[20]]),
                          attention_mask=torch.cat([mask, one[:, :1]], 1)).logits[0, -1]
            off[name, side] = float((found - alone).abs().max() / alone.abs().max())
            print(f"{name}, padded on the {side}: off by {off[name, side]:.1e} of the largest logit")
assert all(off[name, "left"] < 1e-5 for name in models) and off["llama", "right"] < 1e-5
assert off["bamba", "right"] > 0.1 and off["qwen3_next", "right"] > 0.01
PY
"$dir/v/bin/python" "$dir/a.py"
