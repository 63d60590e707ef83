"""The clustering engine: k-means for many short vectors and up to 65,536 codes. Arrays in, arrays out."""

from cluscomp_jax.kmeans.assign import assign
from cluscomp_jax.kmeans.code_index import Forest, nearest_code, plant_forest
from cluscomp_jax.kmeans.fit import KMeansStats, fit_codebook, fit_codebooks

__all__ = ["Forest", "KMeansStats", "assign", "fit_codebook", "fit_codebooks", "nearest_code", "plant_forest"]
