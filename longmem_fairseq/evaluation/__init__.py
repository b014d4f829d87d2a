"""Evaluation of language models with and without a long-term memory, as the examples' ``evaluate.py`` run it.

:class:`.scoring.scorer.Scorer` loads a checkpoint, memorizes a long text once and scores many continuations of it.
:mod:`.reporting` turns scores into tables with intervals and plots. :class:`.base.Evaluation` is the contract of an
evaluation, and :mod:`.command` runs one: it can be interrupted, and writes a report.
"""
