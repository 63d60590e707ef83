"""GGUF files: header, model config, tensors, tokenizer."""
