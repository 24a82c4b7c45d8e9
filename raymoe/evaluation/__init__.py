"""`raymoe eval`: how well a merge predicts labelled text, and where its routers send the tokens.

options.py   what is asked for
texts.py     labelled texts, checked line by line
models.py    what is run (the merge, its base, its experts) as tables of weights
sources.py   the merge and what it was made of, as its record names it
opened.py    all of that opened and checked, every problem in one report
mixture.py   a layer's experts and router as one module, by the host's own rule
engine.py    texts through a model that is streamed layer by layer: log-likelihoods
metrics.py   numbers out of log-likelihoods and choices; numpy only
samples.py   a few texts token by token
run.py       the passes, and the result; progress.py how far they are; written.py the files
"""
