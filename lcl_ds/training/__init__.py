"""Training; the only package that imports DeepSpeed."""
