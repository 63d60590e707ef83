"""The clustering engine: k-means for many short vectors and up to 65,536 codes. Arrays in, arrays out."""

from cluscomp_jax.kmeans.assign import assign
from cluscomp_jax.kmeans.code_index import CodeIndex, build_code_index, nearest_code
from cluscomp_jax.kmeans.fit import KMeansStats, fit_codebook, fit_codebooks

__all__ = ["CodeIndex", "KMeansStats", "assign", "build_code_index", "fit_codebook", "fit_codebooks", "nearest_code"]
