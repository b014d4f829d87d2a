"""Installs the plugin `longmem_fairseq`; the scripts and examples stay in the clone.

A plain `pip install .` goes into an environment that already has a working fairseq, torch and faiss, and must leave
them as they are: so nothing of the kind is required here, only lower bounds of what every such environment meets.
The extras `cpu` and `gpu` are the whole environments that this version was tested with, pinned.
"""

from pathlib import Path

from setuptools import find_packages, setup

# The Makefile reads the two pins below from this file.

# torch by its version: a bare `torch` fetches the newest CUDA build, and fairseq is compiled against what it finds.
TORCH = "torch==2.13.0"
# fairseq's own 0.12.2 imports only up to Python 3.10 and needs pip < 24.1 and numpy < 1.24; this is the maintained
# build of the same code (module `fairseq`) for Python 3.11 and 3.12, and the plugin overrides its internals.
FAIRSEQ = "fairseq-fixed==0.12.3.1"
# One release for both: they install the same module `faiss`, so that only one of them may be there, and results on
# CPU and GPU are compared. The GPU wheel holds code for sm_70 to sm_90; older GPU wheels have none for Hopper.
FAISS_CPU = "faiss-cpu==1.15.1"
FAISS_GPU = "faiss-gpu==1.15.1"

# What preprocess/ and examples/ need beside the package: GPT-2's BPE, .zst documents, and plots.
PREPROCESS = ["regex>=2022.1.18", "tokenizers>=0.15", "zstandard>=0.18"]
EXAMPLES = PREPROCESS + ["matplotlib>=3.5"]
# What longmem_fairseq.evaluation needs beside the package: plots, and BLEU for dialogue.
EVALUATION = ["matplotlib>=3.5", "sacrebleu>=2.3"]

setup(
    name="longmem_fairseq",
    version="0.1.0",
    description="LongMem for fairseq: long-term memory for pretrained language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The longmem_fairseq authors",
    license="MIT",
    packages=find_packages(include=["longmem_fairseq", "longmem_fairseq.*"]),
    package_data={"longmem_fairseq.memory.search": ["*.cpp"]},
    python_requires=">=3.9",
    install_requires=[
        "numpy>=1.21",
        "safetensors>=0.4",
        "sentencepiece>=0.1.97",
        "tensorboard>=2.8",
        "torch>=2.6",  # from there on torch.load, also where fairseq calls it, runs no code from a file unless told to
        "tqdm>=4.60",
    ],
    extras_require={
        "cpu": [TORCH, FAIRSEQ, FAISS_CPU] + PREPROCESS,
        "gpu": [TORCH, FAIRSEQ, FAISS_GPU] + PREPROCESS,
        "preprocess": PREPROCESS,
        "examples": EXAMPLES,
        "eval": EVALUATION,
        "convert": ["transformers>=4.30", "safetensors>=0.4"],
        "dev": EXAMPLES
        + EVALUATION
        + [
            "hypothesis>=6.80",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "ruff==0.17.6",  # another release has other rules
            "transformers>=4.30",  # what conversions are compared with
        ],
    },
)
