"""Trellis indices: codes that are overlapping windows of a stream of bits, found by Viterbi's algorithm."""
