"""`python -m cluscomp_jax` is `cluscomp`."""

import sys

from cluscomp_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
