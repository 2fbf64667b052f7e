"""config.json of a few public models, as far as it decides what they are: to plan for one without having it."""

SHAPES = {
  "gpt2-xl": {
    "model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50_257,
  },
  "gpt-j-6b": {
    "model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "rotary_dim": 64,
    "vocab_size": 50_400,
  },
  "llama-3.1-8b": {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14_336, "max_position_embeddings": 131_072, "vocab_size": 128_256,
    "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": False,
    "rope_scaling": {
      "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    },
  },
}  # fmt: skip

# Repositories of the hub whose config.json says the same.
SHAPE_OF = {
  "nlpcloud/instruct-gpt-j-fp16": "gpt-j-6b", "EleutherAI/gpt-j-6b": "gpt-j-6b", "openai-community/gpt2-xl": "gpt2-xl",
  "meta-llama/Llama-3.1-8B": "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
}  # fmt: skip
