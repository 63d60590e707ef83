"""HTML reports of runs: one self-contained file per report, and a PNG of each of its figures."""
