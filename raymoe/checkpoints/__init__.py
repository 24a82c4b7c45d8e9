"""Finished checkpoints: their files, their weights by role, and the record of the merge that made them."""
