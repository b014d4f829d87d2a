"""LongMem for fairseq: long-term memory for pretrained language models (``--user-dir longmem_fairseq``).

Importing the package registers its models, task, criterion, backbone families, memory policies and ``--bpe
hf_tokenizer``; nothing else happens.
"""

from .backbones import alibi_lm, llama, transformer_lm  # noqa: F401
from .criterions import longmem_cross_entropy  # noqa: F401
from .models import longmem_lm  # noqa: F401
from .released import parallel_backbone, parallel_lm, released_format, shared_memory  # noqa: F401
from .tasks import longmem_language_modeling  # noqa: F401
from .text import huggingface_bpe  # noqa: F401
