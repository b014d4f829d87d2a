"""The options of ``longmem_lm``, and which of them contradict each other, the backbone or the task."""

import logging
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.utils import safe_getattr
from omegaconf import II, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..backbones.base import Backbone
from ..memory.placement import DEVICES, choose_placement
from ..memory.search.base import SEARCHES, has_faiss_gpu
from ..memory.search.index_spec import FLAT, index_spec
from .longmem_decoder import MEMORY_DTYPES

logger = logging.getLogger(__name__)


@dataclass
class LongMemConfig(FairseqDataclass):
    """Options of ``longmem_lm``; sizes of the layers come from the backbone."""

    pretrained_model_path: Optional[str] = field(
        default=None, metadata={"help": "checkpoint of the backbone: any pre-norm transformer_lm, or an alibi_lm"}
    )
    use_external_memory: bool = field(
        default=True, metadata={"help": "read from and write to the memory (off: --no-use-external-memory)"}
    )
    memory_size: int = field(
        default=65536, metadata={"help": "tokens that the memory of a lane holds; 0 turns the memory off"}
    )
    k: int = field(
        default=64, metadata={"help": "tokens read from the memory per query and head; a multiple of --chunk-size"}
    )
    chunk_size: int = field(
        default=4, metadata={"help": "tokens of a chunk: chunks are searched by their mean key and read whole"}
    )
    retrieval_layer_index: int = field(
        default=17, metadata={"help": "backbone layer, counted from 0, whose keys and values are remembered"}
    )
    layer_reduction_factor: int = field(default=2, metadata={"help": "backbone layers per layer of the side network"})
    reload_ptm_layer: bool = field(
        default=True,
        metadata={"help": "start the side network from backbone layers (random instead: --no-reload-ptm-layer)"},
    )
    memory_search: ChoiceEnum(SEARCHES) = field(
        default="auto",
        metadata={
            "help": "exact search by faiss (on the GPU if the memory lies there), by plain torch, or by a native "
            "kernel for processors with AVX-512 VNNI; auto: native where it can be, faiss otherwise"
        },
    )
    memory_dtype: ChoiceEnum(["auto", *MEMORY_DTYPES]) = field(
        default="auto", metadata={"help": "precision of remembered keys and values; auto: the model's"}
    )
    memory_index: str = field(
        default=FLAT,
        metadata={
            "help": "flat: exact search; or a faiss factory string (IVF1024,Flat or IVF4096,PQ32 or HNSW32) for "
            "memories of a million tokens: an approximate index on the CPU for each lane and head"
        },
    )
    memory_index_parameters: str = field(
        default="",
        metadata={
            "help": "how an index is searched, as faiss writes it: nprobe=32 for IVF, efSearch=64 for HNSW (default: "
            "nprobe a 16th of the lists, efSearch=128)"
        },
    )
    memory_device: ChoiceEnum(list(DEVICES)) = field(
        default="auto",
        metadata={
            "help": "where keys and values lie; auto: where the model is; on the CPU, what is read is moved to it"
        },
    )
    memory_map: Optional[str] = field(
        default=None,
        metadata={
            "help": "hold keys and values in a memory-mapped file in this directory, which is gone with the process"
        },
    )
    use_gpu_to_search: bool = field(
        default=False, metadata={"help": "insist on a GPU build of faiss: search runs where the memory lies anyway"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout probability in the side network"})
    attention_dropout: float = field(
        default=0.0, metadata={"help": "dropout probability of the side network's local attention weights"}
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute the side network's activations in the backward pass"}
    )
    side_activation_fn: Optional[str] = field(
        default=None, metadata={"help": "activation function of the side network (default: the backbone's)"}
    )
    side_layer_norm_eps: Optional[float] = field(
        default=None, metadata={"help": "eps of the side network's LayerNorms (default: the backbone's)"}
    )
    normalize_last_hidden: bool = field(
        default=False,
        metadata={"help": "give the side network the backbone's last hidden state behind the final LayerNorm"},
    )
    save_backbone: bool = field(
        default=False, metadata={"help": "put the backbone into the checkpoints, so that they stand alone"}
    )
    backbone_config: Optional[str] = field(
        default=None, metadata={"help": "description of the backbone; written into checkpoints, not for the user"}
    )
    gpt_encoder_path: Optional[str] = field(
        default=None, metadata={"help": "accepted for the released scripts' sake; has no meaning here"}
    )
    no_token_positional_embeddings: bool = field(
        default=False, metadata={"help": "accepted for the released scripts' sake; the backbone decides it"}
    )
    base_layers: int = field(
        default=0, metadata={"help": "always 0; fairseq 0.12.2 asks every model for it before it saves a checkpoint"}
    )
    tokens_per_sample: int = II("task.tokens_per_sample")
    memory_scope: str = II("task.memory_scope")


OTHER_TASK = (
    "longmem_lm must be told which document each row of a batch continues, and this task does not know: name --task "
    "longmem_language_modeling"
)


def check_task(cfg: Any) -> None:
    """Refuse a task that lays no documents on lanes: it has no option to say whose past a memory holds."""
    try:
        safe_getattr(cfg, "memory_scope", None)
    except OmegaConfBaseException:
        raise ValueError(OTHER_TASK) from None


def with_defaults(cfg: Any):
    """The configuration with the fields that an older checkpoint did not have yet."""
    defaults = LongMemConfig()
    for name in LongMemConfig.__dataclass_fields__:
        if not name.startswith("_") and safe_getattr(cfg, name, None) is None:
            default = getattr(defaults, name)
            if not (isinstance(default, str) and default.startswith("${")):
                if OmegaConf.is_config(cfg):
                    OmegaConf.set_struct(cfg, False)
                setattr(cfg, name, default)
    return cfg


def check_options(cfg, backbone: Backbone) -> None:
    """Refuse options that contradict each other or the backbone."""
    if cfg.layer_reduction_factor < 1 or backbone.num_layers % cfg.layer_reduction_factor:
        raise ValueError(
            f"the backbone's {backbone.num_layers} layers are not divisible by --layer-reduction-factor "
            f"{cfg.layer_reduction_factor}"
        )
    if cfg.base_layers:
        raise ValueError(f"--base-layers {cfg.base_layers}: a side network has no BASE layers, leave the option out")
    longest = backbone.max_positions
    segment = safe_getattr(cfg, "tokens_per_sample", None)
    if longest is not None and segment is not None and segment > longest:
        raise ValueError(f"--tokens-per-sample {segment} is longer than the backbone's {longest} positions: lower it")
    if not cfg.use_external_memory or cfg.memory_size == 0:
        logger.info("the memory is off")
        return
    if cfg.chunk_size < 1 or cfg.k < 1 or cfg.k % cfg.chunk_size:
        raise ValueError(f"--k {cfg.k} is not a positive multiple of --chunk-size {cfg.chunk_size}")
    if cfg.memory_size < 0 or (segment is not None and cfg.memory_size < segment):
        raise ValueError(
            f"--memory-size {cfg.memory_size} is smaller than one segment of --tokens-per-sample {segment} tokens: "
            "raise it, or turn the memory off with --memory-size 0"
        )
    if cfg.memory_size < cfg.chunk_size:
        raise ValueError(
            f"--memory-size {cfg.memory_size} holds no chunk of --chunk-size {cfg.chunk_size} tokens: raise the one or "
            "lower the other"
        )
    indexed = cfg.memory_index != FLAT
    if indexed:
        index_spec(cfg.memory_index, cfg.memory_index_parameters, backbone.head_dim, cfg.memory_size // cfg.chunk_size)
    elif cfg.memory_index_parameters:
        raise ValueError(
            f"--memory-index-parameters {cfg.memory_index_parameters} means nothing to exact search: name an index "
            "with --memory-index, or leave it out"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose_placement(str(cfg.memory_device), cfg.memory_map, device, indexed)
    if cfg.use_gpu_to_search and indexed:
        raise ValueError(
            f"--use-gpu-to-search: an index as --memory-index {cfg.memory_index} lies on the CPU; leave one of them out"
        )
    if cfg.use_gpu_to_search and not (has_faiss_gpu() and torch.cuda.is_available()):
        raise ValueError(
            "--use-gpu-to-search needs a GPU and a faiss built for it: pip uninstall faiss-cpu and pip install "
            "faiss-gpu, or leave the option out"
        )
