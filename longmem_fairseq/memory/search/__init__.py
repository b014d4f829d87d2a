"""Search of the memory bank: the contract and its registry (``base``), and the backends, each in the file of its name.

Importing this package registers the backends ``faiss``, ``native``, ``torch`` and ``triton``.
"""

from . import faiss, native, torch, triton  # noqa: F401
