"""Hugging Face folders: safetensors, AQLM, and repositories on the Hub."""
