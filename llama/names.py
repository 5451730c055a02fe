"""Hugging Face's (and PEFT's) names for Meta's modules: the one place where a thing has two."""

HF_MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_names(n_layers: int, n_heads: int, n_kv_heads: int) -> dict[str, tuple[str, int]]:
    """{our module: (Hugging Face's name, heads whose rows are permuted, 0 for none)}."""
    heads = {"attention.wq": n_heads, "attention.wk": n_kv_heads}
    names = {"tok_embeddings": ("model.embed_tokens", 0), "norm": ("model.norm", 0)}
    names["output"] = ("lm_head", 0)
    for i in range(n_layers):
        for ours, theirs in HF_MODULES.items():
            names[f"layers.{i}.{ours}"] = (f"model.layers.{i}.{theirs}", heads.get(ours, 0))
    return names
