"""Publishes a finished merge on the Hugging Face Hub.

    OUT --manifest--> the files to publish: those that the record names, and the record
    org/name --repository--> the token, the repository, the branch: checked, and created if they are missing
    both --upload--> missing files are sent one by one; then one commit makes all visible

The library is huggingface_hub's public API, imported where it is used.
"""
