"""A finished merge on the Hugging Face Hub.

    OUT --manifest--> what is published: the files that the record names, and the record
    org/name --repository--> the token, the repository, the branch: checked, and made where they are missing
    both --upload--> what the repository lacks, file by file; then one commit that makes it all visible

The library is huggingface_hub's public API, imported where it is used.
"""
