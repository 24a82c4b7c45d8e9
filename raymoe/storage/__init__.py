"""Moving bytes: ranges of source files in, shard files out. Free of Ray and torch."""
