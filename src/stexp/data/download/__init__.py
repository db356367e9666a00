"""Public data sets, fetched and verified."""
