"""Text and conversations as tokens: calibration samples, rows to train on."""
