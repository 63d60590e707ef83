"""What can be proved of the GPU kernels without a GPU, and measured with one: `python -m scripts.verify_kernels`."""
