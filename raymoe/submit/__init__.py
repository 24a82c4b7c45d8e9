"""A merge as a job of a Ray cluster: what is sent, how the cluster's job server is reached, and following the job."""
