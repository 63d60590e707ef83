"""What a model is worth: perplexity, log-likelihoods of answers, the evaluation harness."""
