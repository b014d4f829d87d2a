"""From text to fairseq data: scripts to be run from a clone, importable as ``preprocess.*``."""
