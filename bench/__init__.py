"""Measured here and now, each figure beside its physical floor from the same run."""
