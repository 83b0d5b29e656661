"""Read tar shards: where they lie, what is in them, samples by number."""
