"""Output for users: the merge's description, the model card, displays of plans, checkpoints and evaluations."""
