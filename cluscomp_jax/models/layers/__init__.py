"""What decoder families share: attention, rotary embeddings, the key-value cache, fields of config.json."""
