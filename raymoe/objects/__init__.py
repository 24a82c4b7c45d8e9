"""Object stores: reading by range, and writing that no fault leaves half done. Knows nothing of models.

    options.py   StorageOptions: how to reach a store; plain data that travels to actors, never credentials
    urls.py      what a URL is, its normal form, its parts
    store.py     the ObjectStore protocol
    registry.py  `open_store`: one store for each scheme and set of options
    stream.py    an object as a file to read
    s3.py        S3 and what speaks its language, with conditional reads, multipart uploads and server-side copies
    generic.py   whatever fsspec reaches (gs://, memory://, https://, ...) at plain speed
    retry.py     which failures pass, how long to wait, how many requests at once
    answers.py   what an S3 server's answers are checked for
    problems.py  what is raised; failures.py puts errors of client libraries into words: permission, remedy

s3fs and what it brings (aiobotocore, aiohttp) are imported when a store is first used, never before.
"""
