"""Searches for good values of options with Optuna, each trial a run on held-out images.

``space`` is what is searched, ``trial`` trains one set of values, ``study`` runs the trials of one
storage in one process or several, ``results`` writes what was found.
"""
