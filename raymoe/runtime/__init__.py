"""The Ray part: the expert actors, the coordinator that gives them work, and what a person sees of it."""
