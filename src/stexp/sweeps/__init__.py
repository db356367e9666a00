"""Sweeps: which jobs they consist of, and where and when these run."""
