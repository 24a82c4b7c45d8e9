"""Where a merge is written: a local folder, S3, or whatever else fsspec reaches."""
