"""The splits of the data directories (``a:b:c``) as datasets of documents."""

import logging

from fairseq import utils
from fairseq.data import Dictionary

from ..data.directories import has_split, open_split
from ..data.document_dataset import DocumentDataset
from ..files import printable
from ..memory.policies import memory_policy

logger = logging.getLogger(__name__)


def load_documents(cfg, dictionary: Dictionary, split: str, epoch: int = 1, combine: bool = False) -> DocumentDataset:
    """Open a split of the data directories.

    Of several directories, each epoch of training reads the next, validation the first, and commands that evaluate or
    generate read all that have the split.

    Args:
        cfg: Configuration of the task.
        dictionary: Dictionary of the data.
        split: Name of the split.
        epoch: Number of the epoch, from 1.
        combine: If true, also read ``split1``, ``split2``...

    Returns:
        The documents.
    """
    paths = utils.split_paths(cfg.data)
    having = [path for path in paths if has_split(path, split)]
    if cfg.path is not None:
        paths = having or paths[:1]
    else:
        if split != cfg.train_subset and len(having) > 1:
            others = ", ".join(path for path in having if path != paths[0])
            logger.warning(
                "%s is read from %s alone, as fairseq does it; there is also one in %s",
                split,
                printable(paths[0]),
                printable(others),
            )
        paths = [paths[(epoch - 1) % len(paths)]]
    documents = DocumentDataset(open_split(paths, split, dictionary, combine), dictionary, split)
    mean = documents.tokens / len(documents)
    logger.info(
        "%s: %s documents, %s tokens (%.0f on average)", split, f"{len(documents):,}", f"{documents.tokens:,}", mean
    )
    if mean < cfg.tokens_per_sample / 8 and not memory_policy(cfg.memory_scope).joins_documents:
        logger.warning(
            "%s: items of %.0f tokens on average are much shorter than a segment; if they are lines of texts, "
            "join them with --memory-scope stream, or keep documents whole with preprocess/binarize_documents.py",
            split,
            mean,
        )
    return documents
