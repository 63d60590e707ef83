"""The squared error of a trellis, measured: what a bit budget is spent by.

The mean relative squared error over four matrices of SmolLM2-135M, codebooks fitted to the weights alone
(docs/experiments.md). Between matrices it varies by 2 to 4%.
"""

_ROWS: dict[tuple[int, int, int], tuple[float, ...]] = {
    (1, 1, 6): (0.31153, 0.30373, 0.29475, 0.28707, 0.28002),
    (1, 2, 6): (0.09545, 0.08858, 0.08407, 0.08023, 0.07674),
    (1, 3, 6): (0.02938, 0.02612, 0.02378, 0.02207, 0.02087),
    (1, 4, 6): (0.00985, 0.00859, 0.00732, 0.00653, 0.00603),
    (1, 5, 7): (0.00379, 0.00294, 0.00237, 0.00205),
    (2, 1, 5): (0.57498, 0.56166, 0.55126, 0.54231, 0.53393, 0.52563, 0.51658, 0.50500),
    (2, 2, 5): (0.32504, 0.31224, 0.30154, 0.29307, 0.28474, 0.27685, 0.26887, 0.26104),
    (2, 3, 5): (0.18746, 0.17317, 0.16485, 0.15809, 0.15177, 0.14612, 0.14012, 0.13476),
    (2, 4, 5): (0.11076, 0.09925, 0.09203, 0.08585, 0.08091, 0.07687, 0.07299, 0.06977),
    (2, 5, 6): (0.05904, 0.05191, 0.04730, 0.04351, 0.04066, 0.03827, 0.03618),
    (2, 6, 7): (0.03097, 0.02670, 0.02378, 0.02175, 0.02010, 0.01905),
    (2, 7, 8): (0.01578, 0.01352, 0.01196, 0.01085, 0.01019),
}
"""{(weights per code g, bits per code b, L of the first): errors of windows of L, L + 1, ... bits}."""


TRELLIS_DISTORTION = {
    (g, 2 ** (first + i), step_bits): error
    for (g, step_bits, first), errors in _ROWS.items()
    for i, error in enumerate(errors)
}
"""{(weights per code g, codes n, bits per code b): relative squared error}."""
