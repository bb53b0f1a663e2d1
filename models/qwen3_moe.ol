# Qwen3 mixture of experts: the attention of Qwen3; each row goes through its best experts.
model qwen3_moe

weights {
  embed: [vocab, hidden] = hf "model.embed_tokens.weight" | gguf "token_embd.weight"
  norm: [hidden] = hf "model.norm.weight" | gguf "output_norm.weight"
  head: [vocab, hidden] = hf "lm_head.weight" | gguf "output.weight" else embed
  inv_freq: [head_dim / 2] = constant inv_freq
}

weights decoder {
  attn_norm: [hidden] = hf "model.layers.{i}.input_layernorm.weight" | gguf "blk.{i}.attn_norm.weight"
  q: [heads * head_dim, hidden] = hf "model.layers.{i}.self_attn.q_proj.weight" | gguf "blk.{i}.attn_q.weight"
  q_norm: [head_dim] = hf "model.layers.{i}.self_attn.q_norm.weight" | gguf "blk.{i}.attn_q_norm.weight"
  k: [kv_heads * head_dim, hidden] = hf "model.layers.{i}.self_attn.k_proj.weight" | gguf "blk.{i}.attn_k.weight"
  k_norm: [head_dim] = hf "model.layers.{i}.self_attn.k_norm.weight" | gguf "blk.{i}.attn_k_norm.weight"
  v: [kv_heads * head_dim, hidden] = hf "model.layers.{i}.self_attn.v_proj.weight" | gguf "blk.{i}.attn_v.weight"
  o: [hidden, heads * head_dim] = hf "model.layers.{i}.self_attn.o_proj.weight" | gguf "blk.{i}.attn_output.weight"
  ffn_norm: [hidden] = hf "model.layers.{i}.post_attention_layernorm.weight" | gguf "blk.{i}.ffn_norm.weight"
  router: [experts, hidden] = hf "model.layers.{i}.mlp.gate.weight" | gguf "blk.{i}.ffn_gate_inp.weight"
  gate: [experts, moe_ffn, hidden] = hf "model.layers.{i}.mlp.experts.{e}.gate_proj.weight" | gguf "blk.{i}.ffn_gate_exps.weight"
  up: [experts, moe_ffn, hidden] = hf "model.layers.{i}.mlp.experts.{e}.up_proj.weight" | gguf "blk.{i}.ffn_up_exps.weight"
  down: [experts, hidden, moe_ffn] = hf "model.layers.{i}.mlp.experts.{e}.down_proj.weight" | gguf "blk.{i}.ffn_down_exps.weight"
}

block decoder(x, angles, window) {
  h = rms_norm(x, w.attn_norm, eps=eps)
  q = rope(head_norm(linear(h, w.q), w.q_norm, eps=eps), angles)
  k = rope(head_norm(linear(h, w.k), w.k_norm, eps=eps), angles)
  kv = append(cache(kv_heads, head_dim, window), k, linear(h, w.v), rows)
  x = add(x, linear(attend(q, kv, rows, scale=query_scale), w.o))
  h = rms_norm(x, w.ffn_norm, eps=eps)
  p = softmax(linear(h, w.router))
  gates = normalize(top_k(p, p, k=experts_used), on=norm_topk)
  f = mul(silu(expert_linear(h, gates, w.gate, k=experts_used)), expert_linear(h, gates, w.up, k=experts_used))
  x = add(x, combine(expert_linear(f, gates, w.down, k=experts_used), gates))
}

step {
  x = embed(rows, w.embed)
  angles = rope_angles(rows, w.inv_freq, factor=rope_factor)
  layers layer_kinds {
    global: decoder(x, angles, 0)
    local: decoder(x, angles, window)
  }
  h = rms_norm(select(x, rows), w.norm, eps=eps)
  logits = linear(h, w.head)
  token = sample(logits, rows, slots)
  slots = commit(token, rows, slots)
}
