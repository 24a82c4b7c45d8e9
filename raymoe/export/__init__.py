"""A merge in the formats of other programs."""
