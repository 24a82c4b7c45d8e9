"""Submits a merge as a job of a Ray cluster: packs it, connects to the cluster's job server, and follows the job."""
