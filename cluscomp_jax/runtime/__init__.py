"""What touches the host: files, memory, progress, timing, processes."""
