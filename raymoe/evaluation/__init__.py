"""`raymoe eval`: how well a merge predicts labelled text, and where its routers send the tokens.

options.py           what is asked for
dataset.py           labelled texts, checked line by line
finished_merge.py    the merge and what it was made of, as its record names it
inputs.py            all of that opened and checked, every problem in one report
moe_block.py         a layer's experts and router as one module, by the host's own rule
scoring.py           texts through a model that is streamed layer by layer: log-likelihoods
metrics.py           numbers out of log-likelihoods and choices; numpy only
routing_samples.py   a few texts token by token
run.py               the passes, how far they are, and the result
output_files.py      the files that are written
lm_eval.py           a merge in lm-evaluation-harness, for its tasks

What is run (the merge, its base, its experts) are tables of weights (checkpoints/weight_table.py).
"""
