"""Evaluation of language models with and without a long-term memory: what the examples' ``evaluate.py`` share.

:class:`.scorer.Scorer` loads any checkpoint, memorises a long text once and scores many continuations against it;
:mod:`.cache` is the baseline that every report carries; :mod:`.command` runs an evaluation that can be interrupted and
writes its report.
"""
