"""`raymoe eval`: how well a merge predicts labeled text, and to which experts its routers send the tokens; losses of
dense models.

options.py           options and their checks
dataset.py           labeled texts, checked line by line
finished_merge.py    the merge and its source models, from its record
models.py            dense models, and further models of a comparison
inputs.py            all inputs opened and checked, every problem in one report
moe_block.py         a layer's experts and router as one module, by the architecture's own rule
scoring.py           log-likelihoods of texts, by a model that is streamed layer by layer
metrics.py           numbers out of log-likelihoods and choices; numpy only
routing_samples.py   a few texts token by token
passes.py            the models over the texts, one after another, and their progress
run.py               the evaluation of a merge
dense_run.py         the evaluation of a dense model
evaluate.py          which of the two it is
output_files.py      the files that are written
lm_eval.py           a merge in lm-evaluation-harness, for its tasks

The merge, its base and its experts are run from tables of weights (checkpoints/weight_table.py).
"""
