"""Frozen settings of every command, and the TOML files they are read from."""
