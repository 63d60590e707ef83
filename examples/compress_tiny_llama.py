"""From a model to a compressed checkpoint, step by step: load, compress, look, evaluate, generate, save.

Each `# %%` begins a cell for an editor or a notebook. It also runs as a whole, from the repository root, in a minute on
two CPU cores: `python examples/compress_tiny_llama.py`. It writes the folder tiny-llama-2.6-bits. The model is the
small Llama of the tests; a Hugging Face folder, a hub id or a .gguf file can take its place.
"""

# %% Load: the config and the names of all tensors are read and checked here, the tensors themselves later
import dataclasses

import cluscomp_jax as cc

opened = cc.open_model("tests/fixtures/tiny_llama")
tokenizer = opened.load_tokenizer()
print(f"{opened.name}: {opened.model.num_blocks} blocks, {opened.config.vocab_size} tokens in the vocabulary")

# %% Two texts: one to calibrate on, int32 [samples, length], another to evaluate on, int32 [tokens]
train = cc.load_tokens("cluscomp_jax/data/wiki_train.txt.gz", tokenizer)
calibration = cc.calibration_samples(train, samples=16, length=128, seed=42)
test = cc.load_tokens("cluscomp_jax/data/wiki_test.txt.gz", tokenizer)[:8192]

# %% Compress to 2.6 bits per weight, codebooks included: every projection is clustered, then every block is tuned
cfg = cc.CompressConfig(
    model=opened.config,
    cluster=cc.ClusterConfig(bits=2.6),
    calibration=cc.CalibrationConfig(samples=16, length=128),
)
compressed = cc.compress(opened.source, cfg, calibration=calibration)

# %% The report: the stored size of each matrix and of the whole
report = cc.size_report(compressed)
print(f"{report.bits_per_weight:.3f} bits per weight in {len(report.matrices)} matrices")
print(f"{report.compressed_bytes:,} bytes of matrices, {report.dense_bytes:,} bytes of everything else")
for matrix in report.matrices[:7]:  # those of the first block
    print(f"  {matrix.path}: {matrix.shape}, {matrix.num_codes} codes, {matrix.bits_per_weight:.3f} bits per weight")

# %% A compressed kernel is a CodebookArray, a pytree of a codebook and an index, in the place of the array it was
kernel = compressed["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
print(f"kernel {kernel.shape}: codebook {kernel.codebook.shape}, index {kernel.index.shape}")

# %% Evaluate: the same function takes the original and the compressed parameters
original = cc.perplexity(opened.source, test, opened.config, context=256)
result = cc.perplexity(compressed, test, opened.config, context=256)
print(f"perplexity of {result.tokens:,} tokens: {original.perplexity:.2f} original, {result.perplexity:.2f} compressed")

# %% Generate
prompt = tokenizer.encode("The capital of France is")
new_tokens = cc.generate(compressed, prompt, opened.config, max_new_tokens=16)
completion = tokenizer.decode(new_tokens)
print(f"The capital of France is{completion}")

# %% Save, with the tokenizer and what was measured. `cluscomp inspect`, `evaluate` and `generate` take this folder
cc.save_checkpoint(
    "tiny-llama-2.6-bits",
    compressed,
    cfg,
    tokenizer="tests/fixtures/tiny_llama",
    metrics={"perplexity": {"original": dataclasses.asdict(original), "compressed": dataclasses.asdict(result)}},
)

# %% Load again: bit for bit what was saved
params, config = cc.load_checkpoint("tiny-llama-2.6-bits")
reloaded = cc.perplexity(params, test, config, context=256)
print(f"perplexity after loading: {reloaded.perplexity:.2f}")
