"""What a merge leaves for people: the record of what was done, the model card, displays of plans and checkpoints."""
