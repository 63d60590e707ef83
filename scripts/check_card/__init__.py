"""The steps of `scripts/check_card.py`: what is measured on a GPU, each step in a process of its own."""

LIMITS = {"values": 90.0, "kmeans": 110.0, "model": 120.0, "kernels": 90.0, "generation": 70.0}
"""{step: seconds that it may take}, in the order in which they run."""
