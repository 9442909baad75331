"""One page about several runs: what was configured, how it went, and what it got wrong.

``collect`` reads the folders of runs, ``pictures`` needs the data and the weights, ``figures`` and
``tables`` draw, and ``page`` writes the HTML. Nothing here trains or changes a run.
"""
