# Qwen2 / Qwen1.5 mixture of experts: the attention of Qwen2; beside each row's best experts one that all share,
# which a sigmoid weighs.
model qwen2_moe

weights {
  embed: [vocab, hidden] = hf "model.embed_tokens.weight" | gguf "token_embd.weight"
  norm: [hidden] = hf "model.norm.weight" | gguf "output_norm.weight"
  head: [vocab, hidden] = hf "lm_head.weight" | gguf "output.weight" else embed
  inv_freq: [head_dim / 2] = constant inv_freq
}

weights decoder {
  attn_norm: [hidden] = hf "model.layers.{i}.input_layernorm.weight" | gguf "blk.{i}.attn_norm.weight"
  q: [heads * head_dim, hidden] = hf "model.layers.{i}.self_attn.q_proj.weight" | gguf "blk.{i}.attn_q.weight"
  q_bias: [heads * head_dim] = hf "model.layers.{i}.self_attn.q_proj.bias" | gguf "blk.{i}.attn_q.bias"
  k: [kv_heads * head_dim, hidden] = hf "model.layers.{i}.self_attn.k_proj.weight" | gguf "blk.{i}.attn_k.weight"
  k_bias: [kv_heads * head_dim] = hf "model.layers.{i}.self_attn.k_proj.bias" | gguf "blk.{i}.attn_k.bias"
  v: [kv_heads * head_dim, hidden] = hf "model.layers.{i}.self_attn.v_proj.weight" | gguf "blk.{i}.attn_v.weight"
  v_bias: [kv_heads * head_dim] = hf "model.layers.{i}.self_attn.v_proj.bias" | gguf "blk.{i}.attn_v.bias"
  o: [hidden, heads * head_dim] = hf "model.layers.{i}.self_attn.o_proj.weight" | gguf "blk.{i}.attn_output.weight"
  ffn_norm: [hidden] = hf "model.layers.{i}.post_attention_layernorm.weight" | gguf "blk.{i}.ffn_norm.weight"
  router: [experts, hidden] = hf "model.layers.{i}.mlp.gate.weight" | gguf "blk.{i}.ffn_gate_inp.weight"
  gate: [experts, moe_ffn, hidden] = hf "model.layers.{i}.mlp.experts.{e}.gate_proj.weight" | gguf "blk.{i}.ffn_gate_exps.weight"
  up: [experts, moe_ffn, hidden] = hf "model.layers.{i}.mlp.experts.{e}.up_proj.weight" | gguf "blk.{i}.ffn_up_exps.weight"
  down: [experts, hidden, moe_ffn] = hf "model.layers.{i}.mlp.experts.{e}.down_proj.weight" | gguf "blk.{i}.ffn_down_exps.weight"
  shared_gate: [shared_ffn, hidden] = hf "model.layers.{i}.mlp.shared_expert.gate_proj.weight" | gguf "blk.{i}.ffn_gate_shexp.weight"
  shared_up: [shared_ffn, hidden] = hf "model.layers.{i}.mlp.shared_expert.up_proj.weight" | gguf "blk.{i}.ffn_up_shexp.weight"
  shared_down: [hidden, shared_ffn] = hf "model.layers.{i}.mlp.shared_expert.down_proj.weight" | gguf "blk.{i}.ffn_down_shexp.weight"
  shared_router: [1, hidden] = hf "model.layers.{i}.mlp.shared_expert_gate.weight" | gguf "blk.{i}.ffn_gate_inp_shexp.weight"
}

block decoder(x, angles, window) {
  h = rms_norm(x, w.attn_norm, eps=eps)
  q = rope(add(linear(h, w.q), w.q_bias), angles)
  k = rope(add(linear(h, w.k), w.k_bias), angles)
  v = add(linear(h, w.v), w.v_bias)
  kv = append(cache(kv_heads, head_dim, window), k, v, rows)
  x = add(x, linear(attend(q, kv, rows, scale=query_scale), w.o))
  h = rms_norm(x, w.ffn_norm, eps=eps)
  p = softmax(linear(h, w.router))
  gates = normalize(top_k(p, p, k=experts_used), on=norm_topk)
  f = mul(silu(expert_linear(h, gates, w.gate, k=experts_used)), expert_linear(h, gates, w.up, k=experts_used))
  s = linear(mul(silu(linear(h, w.shared_gate)), linear(h, w.shared_up)), w.shared_down)
  x = add(x, mul(s, sigmoid(linear(h, w.shared_router))))
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
