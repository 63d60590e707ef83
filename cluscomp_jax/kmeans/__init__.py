"""The clustering engine: k-means for many short vectors and up to 65,536 codes. Arrays in, arrays out."""

from cluscomp_jax.kmeans.assign import assign
from cluscomp_jax.kmeans.fit import KMeansStats, fit_codebook, fit_codebooks
from cluscomp_jax.kmeans.found import add_up, mean_offset

__all__ = ["KMeansStats", "add_up", "assign", "fit_codebook", "fit_codebooks", "mean_offset"]
