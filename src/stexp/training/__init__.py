"""Fitting a method: loop, callbacks, checkpoints, loggers."""
