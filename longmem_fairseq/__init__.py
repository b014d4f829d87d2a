"""LongMem for fairseq: long-term memory for pretrained language models (``--user-dir longmem_fairseq``).

Importing the package registers its models, task and criterion with fairseq; nothing else happens.
"""

from .backbones import alibi_lm  # noqa: F401
from .criterions import longmem_cross_entropy  # noqa: F401
from .models import longmem_lm  # noqa: F401
from .released import parallel_lm, released_model  # noqa: F401
from .tasks import longmem_language_modeling  # noqa: F401
