"""The output back ends of a merge: a local folder, S3, or any other file system of fsspec."""
