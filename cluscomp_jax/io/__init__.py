"""Reading and writing models, tokenizers and text: safetensors, GGUF, compressed checkpoints."""
