"""Turn samples into batches: mixing, packing, lanes and the loader, with a position that can be saved."""
