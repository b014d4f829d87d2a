"""Scripts that turn text into fairseq data and convert models; run as ``python -m preprocess.NAME`` from a clone."""
