"""Generation: the decoder with its key-value cache, sampling, text in and out."""
