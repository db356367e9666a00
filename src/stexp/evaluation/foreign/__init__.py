"""Predictions that another tool made: read, their genes and spots matched with a data set, their scale named."""
