"""GPU kernels of error feedback and refinement: a program chooses the codes of many channels, one after another."""
