"""Limits of a multipart upload on S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html."""

MIN_PART_BYTES = 5 << 20  # of each part but the last
MAX_PART_BYTES = 5 << 30
MAX_PARTS = 10_000
MAX_OBJECT_BYTES = 5 << 40
