"""Object stores: range reads, and writes that are complete or not visible. Independent of models.

    options.py          StorageOptions: how to reach a store; plain data that travels to actors, never credentials
    urls.py             what a URL is, its normal form, its parts
    location.py         kinds of places: a local path, S3, another store, the Hub
    protocol.py         the ObjectStore protocol, and what S3 allows of an upload in parts
    registry.py         `open_store`: one store for each scheme and set of options
    object_file.py      an object as a file to read
    s3_store.py         S3 and what speaks its language, with conditional reads, multipart uploads, server-side copies
    fsspec_store.py     whatever fsspec reaches (gs://, memory://, https://, ...) at plain speed
    retry.py            which failures are transient, how long to back off, how many requests at once
    s3_responses.py     checks of an S3 server's replies
    errors.py           the exceptions
    error_messages.py   explains errors of client libraries: permission, remedy

s3fs and its dependencies (aiobotocore, aiohttp) are imported when a store is first used, never before.
"""
