"""One block's matrices become codebooks: Hessians, error feedback, refinement, bit allocation."""
