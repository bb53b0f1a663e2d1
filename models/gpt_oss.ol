# gpt-oss: attention with biases and a sink per head, every other layer windowed; experts with biases and a clamped
# SwiGLU. The readers take apart how its checkpoints interleave gate and up.
model gpt_oss

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
  o_bias: [hidden] = hf "model.layers.{i}.self_attn.o_proj.bias" | gguf "blk.{i}.attn_output.bias"
  sinks: [heads] = hf "model.layers.{i}.self_attn.sinks" | gguf "blk.{i}.attn_sinks.weight"
  ffn_norm: [hidden] = hf "model.layers.{i}.post_attention_layernorm.weight" | gguf "blk.{i}.post_attention_norm.weight"
  router: [experts, hidden] = hf "model.layers.{i}.mlp.router.weight" | gguf "blk.{i}.ffn_gate_inp.weight"
  router_bias: [experts] = hf "model.layers.{i}.mlp.router.bias" | gguf "blk.{i}.ffn_gate_inp.bias"
  gate: [experts, moe_ffn, hidden] = hf "model.layers.{i}.mlp.experts.gate_proj" | gguf "blk.{i}.ffn_gate_exps.weight"
  up: [experts, moe_ffn, hidden] = hf "model.layers.{i}.mlp.experts.up_proj" | gguf "blk.{i}.ffn_up_exps.weight"
  down: [experts, hidden, moe_ffn] = hf "model.layers.{i}.mlp.experts.down_proj" | gguf "blk.{i}.ffn_down_exps.weight"
  gate_bias: [experts * moe_ffn] = hf "model.layers.{i}.mlp.experts.gate_proj_bias" | gguf "blk.{i}.ffn_gate_exps.bias"
  up_bias: [experts * moe_ffn] = hf "model.layers.{i}.mlp.experts.up_proj_bias" | gguf "blk.{i}.ffn_up_exps.bias"
  down_bias: [experts * hidden] = hf "model.layers.{i}.mlp.experts.down_proj_bias" | gguf "blk.{i}.ffn_down_exps.bias"
}

block decoder(x, angles, window) {
  h = rms_norm(x, w.attn_norm, eps=eps)
  q = rope(add(linear(h, w.q), w.q_bias), angles)
  k = rope(add(linear(h, w.k), w.k_bias), angles)
  v = add(linear(h, w.v), w.v_bias)
  kv = append(cache(kv_heads, head_dim, window), k, v, rows)
  x = add(x, add(linear(attend(q, kv, rows, w.sinks, scale=query_scale), w.o), w.o_bias))
  h = rms_norm(x, w.ffn_norm, eps=eps)
  r = add(linear(h, w.router), w.router_bias)
  p = softmax(r)
  gates = normalize(top_k(p, r, k=experts_used))
  g = clamp(expert_linear(h, gates, w.gate, w.gate_bias, k=experts_used), high=swiglu_limit)
  u = clamp(expert_linear(h, gates, w.up, w.up_bias, k=experts_used), low=0 - swiglu_limit, high=swiglu_limit)
  f = mul(mul(g, sigmoid(scale(g, by=swiglu_alpha))), shift(u, by=1))
  x = add(x, combine(expert_linear(f, gates, w.down, w.down_bias, k=experts_used), gates))
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
