"""LongMem for fairseq: long-term memory for pretrained language models (``--user-dir longmem_fairseq``).

Importing the package registers its models, task and criterion with fairseq; nothing else happens.
"""

from .criterions import longmem_cross_entropy  # noqa: F401
from .models import alibi_lm, longmem_lm, parallel_lm, released  # noqa: F401
from .tasks import longmem_language_modeling  # noqa: F401
