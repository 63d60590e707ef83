"""Decoder families, the protocol they follow, and how their blocks are read, streamed and sharded."""
