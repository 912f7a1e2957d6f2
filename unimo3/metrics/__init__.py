"""Metrics of predictions, a file for a benchmark or a kind. `unimo3/training/metrics.py` has what a run logs."""
