"""Scorers: functions, classifiers, ensembles and language models that judge."""
