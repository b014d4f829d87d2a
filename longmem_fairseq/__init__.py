"""LongMem for fairseq: long-term memory for pretrained language models (``--user-dir longmem_fairseq``).

Importing the package registers its model, task and criterion with fairseq; nothing else happens.
"""
