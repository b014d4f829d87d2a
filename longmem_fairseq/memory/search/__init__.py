"""Search of the memory bank: the contract and its registry (``base``), and the backends, each in the file of its name.

Importing this package registers the backends ``faiss``, ``native`` and ``torch``.
"""

from . import faiss, native, torch  # noqa: F401
