"""The names of the llama families' tensors in Hugging Face folders and in GGUF files."""

from cluscomp_jax.models.decoder.names import HUGGING_FACE, gguf_names

TENSOR_NAMES = {"hugging_face": HUGGING_FACE, "gguf": gguf_names(interleaved=("llama", "mistral"))}
"""{form: names of its tensors}."""
