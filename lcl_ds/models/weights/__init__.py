"""Weights from and for other libraries."""
