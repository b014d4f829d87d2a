"""The tokenizer of the data, for commands that are given none."""

import logging

from fairseq import utils

from ..text import find_bpe

logger = logging.getLogger(__name__)


def bpe_of_data(data: str):
    """Build the BPE of the first data directory, and log which it is.

    Args:
        data: Data directories, separated by colons.

    Returns:
        fairseq's BPE, or None where the directory has no files of one.
    """
    directory = utils.split_paths(data)[0]
    bpe = find_bpe(directory)
    if bpe is not None:
        logger.info("text is encoded by the tokenizer in %s (%s); another: --bpe", directory, type(bpe).__name__)
    return bpe
