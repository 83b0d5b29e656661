"""Latent Compression Learning: pre-train vision encoders on interleaved image-text documents (arXiv 2406.07543)."""

__version__ = "0.1.0"
