"""Limits of S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html (multipart uploads),
https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html."""

MIN_PART_BYTES = 5 << 20  # of each part but the last
MAX_PART_BYTES = 5 << 30
MAX_PARTS = 10_000
MAX_DELETED_AT_ONCE = 1000  # objects of one request
