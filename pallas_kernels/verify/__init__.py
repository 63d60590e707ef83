"""What can be proved of the kernels without a GPU, and measured with one: `python -m pallas_kernels.verify`."""
