"""Programs of other codebases: their products by kernels, found in the jaxpr and computed from codebook and index."""
