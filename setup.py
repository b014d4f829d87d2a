"""Install the plugin `longmem_fairseq`; the scripts and examples stay in the clone.

A plain `pip install .` is meant for an environment that already has a working fairseq, torch and faiss, and leaves them
as they are: fairseq and faiss are not required here, and the other requirements are lower bounds that every such
environment meets. The extras `cpu` and `gpu` are the complete environments that this version was tested with, pinned.
"""

import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# The Makefile reads the pins TORCH, NUMPY and FAIRSEQ from this file.

# Pinned, because fairseq is compiled against the installed torch; `torch` alone would install the newest CUDA build.
TORCH = "torch==2.13.0"
# The last release before numpy 2, which dropped names that fairseq calls: with numpy 2 stock fairseq-generate,
# fairseq-interactive and --sample-break-mode eos fail, on the very models that are trained as backbones.
NUMPY = "numpy==1.26.4"
# fairseq's own release 0.12.2 needs Python <= 3.10, pip < 24.1 and numpy < 1.24. This is a maintained build of the same
# code (module `fairseq`) for Python 3.11 and 3.12. Pinned, because the plugin overrides some of its internals.
FAIRSEQ = "fairseq-fixed==0.12.3.1"
# The same release for both, because results on CPU and GPU are compared. Both install the module `faiss`: only one of
# them may be installed. The GPU wheel contains code for sm_70 to sm_90; older GPU wheels do not support Hopper.
FAISS_CPU = "faiss-cpu==1.15.1"
FAISS_GPU = "faiss-gpu==1.15.1"

# Additional requirements of preprocess/ and examples/: tokenizers, .zst and .parquet documents, and plots.
PREPROCESS = ["regex>=2022.1.18", "tokenizers>=0.20", "zstandard>=0.18"]
PARQUET = ["pyarrow>=12.0,<26"]  # 26 needs numpy 2
EXAMPLES = PREPROCESS + ["matplotlib>=3.5"]
# Additional requirements of longmem_fairseq.evaluation: plots, and BLEU for dialogue.
EVALUATION = ["matplotlib>=3.5", "nltk>=3.8", "sacrebleu>=2.3"]
# EleutherAI's lm-evaluation-harness, for longmem_fairseq.integrations.lm_eval.
HARNESS = ["lm-eval>=0.4.9"]
# Reads models in llama.cpp's format.
GGUF = "gguf>=0.17"

# The kernel of --memory-search native: a C library, not a Python module, so that its compilation needs no headers.
SEARCH = "longmem_fairseq/memory/search"
KERNEL = Extension(
    "longmem_fairseq.memory.search.native_kernel",
    sources=[
        f"{SEARCH}/native_{part}.cpp" for part in ("search", "tokens", "quantized", "search_avx2", "search_avx512")
    ],
    depends=[f"{SEARCH}/native_search.h", f"{SEARCH}/native_quantized.h"],
    extra_compile_args=["-O3", "-g0", "-std=c++17"],
    language="c++",
    optional=True,
)


class BuildKernel(build_ext):
    """Build the kernel where that is possible: without it memories are searched by faiss, and the log says so."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # such as a $CXX with an open quotation mark, which `optional` does not cover
            self.warn(f"the kernel of --memory-search native is not built: {error}")


setup(
    name="longmem_fairseq",
    version="0.1.0",
    description="LongMem for fairseq: long-term memory for pretrained language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The longmem_fairseq authors",
    license="MIT",
    packages=find_packages(include=["longmem_fairseq", "longmem_fairseq.*"]),
    package_data={"longmem_fairseq.memory.search": ["*.cpp", "*.h"]},
    ext_modules=[KERNEL] if platform.machine() in ("x86_64", "AMD64") else [],
    cmdclass={"build_ext": BuildKernel},
    python_requires=">=3.9",
    install_requires=[
        "numpy>=1.21",
        "safetensors>=0.4",
        "sentencepiece>=0.1.97",
        "tensorboard>=2.8",
        "torch>=2.6",  # the first whose torch.load, also where fairseq calls it, runs no code from a file by default
        "tqdm>=4.60",
    ],
    extras_require={
        "cpu": [TORCH, NUMPY, FAIRSEQ, FAISS_CPU] + PREPROCESS,
        "gpu": [TORCH, NUMPY, FAIRSEQ, FAISS_GPU] + PREPROCESS,
        "preprocess": PREPROCESS,
        "parquet": PARQUET,
        "examples": EXAMPLES,
        "eval": EVALUATION,
        "lm-eval": HARNESS,
        "convert": ["transformers>=4.30", "safetensors>=0.4", GGUF],
        "dev": EXAMPLES
        + EVALUATION
        + PARQUET
        + HARNESS
        + [
            GGUF,
            "accelerate>=0.26",  # the harness's model of transformers, which its adapter is compared with
            "hypothesis>=6.80",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "ruff==0.17.6",  # pinned, because each release changes rules and format
            "transformers>=4.30",  # converted models are compared with it
            # On the CPU, its interpreter runs the kernels for GPUs. PyTorch's CUDA build requires it anyway.
            "triton>=3.3; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
)
