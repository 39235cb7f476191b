"""Model files: validated, mapped, never executed. GGUF, safetensors, configuration, weights, tokenizer, chat template."""
