"""The options of ``longmem_lm``, and checks of those that are not the memory's alone."""

import argparse
import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.utils import safe_getattr
from omegaconf import II, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..backbones.base import Backbone
from ..memory.placement import DEVICES
from ..memory.search.index_spec import FLAT
from ..memory.settings import MEMORY_DTYPES

logger = logging.getLogger(__name__)

_HIDDEN = argparse.SUPPRESS  # the help of options that serve the released format, or no longer have an effect


@dataclass
class LongMemConfig(FairseqDataclass):
    """Options of ``longmem_lm``; sizes of the layers come from the backbone."""

    pretrained_model_path: Optional[str] = field(
        default=None, metadata={"help": "checkpoint of the backbone, a pre-norm transformer_lm or alibi_lm"}
    )
    backbone_dtype: ChoiceEnum(["float32", "bfloat16"]) = field(
        default="float32",
        metadata={
            "help": "precision of the frozen backbone's weights and of the products with them; bfloat16 needs half the "
            "memory, and is faster on processors that multiply in it"
        },
    )
    use_external_memory: bool = field(
        default=True, metadata={"help": "read from and write to the memory (off: --no-use-external-memory)"}
    )
    memory_size: int = field(
        default=65536, metadata={"help": "number of tokens that the memory of a lane holds; 0 turns the memory off"}
    )
    k: int = field(
        default=64, metadata={"help": "number of tokens read per query and head; a multiple of --chunk-size"}
    )
    chunk_size: int = field(
        default=4,
        metadata={"help": "number of tokens in a chunk: searched by its mean key and read whole"},
    )
    # A number, also in files of earlier versions, or text with several.
    retrieval_layer_index: Any = field(
        default=None,
        metadata={
            "help": "backbone layer, counted from 0, whose keys and values the memory holds (default: about two thirds "
            "up, 17 of 24 layers); or several, 13,17,21, each of which is read by a side layer of its own and takes as "
            "much memory as one"
        },
    )
    gate: ChoiceEnum(["head", "token"]) = field(
        default="head",
        metadata={
            "help": "what the share of the memory in a head's output depends on: on the head alone, or also on the "
            "token's query"
        },
    )
    memory_dropout: float = field(
        default=0.0,
        metadata={
            "help": "probability, in training, that a lane's segment reads neither memory, so that the side network "
            "also learns to do without"
        },
    )
    memory_query_distance: int = field(
        default=0,
        metadata={
            "help": "distance in tokens by which the queries that read the memory are rotated, as if all of it were so "
            "far back; for backbones with rotary positions, whose memory holds keys without position"
        },
    )
    carry_window: int = field(
        default=0,
        metadata={
            "help": "number of tokens before a segment to which every layer of backbone and side network also attends; "
            "0: each segment starts without a past but the memory"
        },
    )
    layer_reduction_factor: int = field(
        default=2, metadata={"help": "number of backbone layers per layer of the side network"}
    )
    reload_ptm_layer: bool = field(
        default=True,
        metadata={"help": "start the side network from backbone layers (random instead: --no-reload-ptm-layer)"},
    )
    zero_init_side_layers: bool = field(
        default=True,
        metadata={
            "help": "start side layers that do not read the memory with output projections of zero, so that the model "
            "starts close to the backbone (off: --no-zero-init-side-layers)"
        },
    )
    memory_search: str = field(
        default="auto",
        metadata={
            "help": "search backend: faiss (on the GPU if the memory is there), torch, or native (a kernel for "
            "processors with AVX-512 VNNI or AVX2); auto: native where it runs, faiss otherwise"
        },
    )
    memory_dtype: ChoiceEnum(["auto", *MEMORY_DTYPES]) = field(
        default="auto",
        metadata={
            "help": "precision of keys and values in the memory; auto: the model's, and float16 in the token memory"
        },
    )
    memory_index: str = field(
        default=FLAT,
        metadata={
            "help": "flat: exact search; or an approximate faiss index on the CPU for memories of a million tokens, "
            "with search parameters behind a colon: IVF1024,Flat:nprobe=32, IVF4096,PQ32 or HNSW32:efSearch=64"
        },
    )
    memory_index_parameters: str = field(default="", metadata={"help": _HIDDEN})  # now part of memory_index
    memory_device: ChoiceEnum(list(DEVICES)) = field(
        default="auto",
        metadata={
            "help": "where keys and values are stored; auto: on the model's device; cpu: in main memory, and "
            "chunks that are read are moved to the model"
        },
    )
    memory_map: Optional[str] = field(
        default=None,
        metadata={"help": "directory of a memory-mapped file for keys and values, which is removed with the process"},
    )
    use_gpu_to_search: bool = field(
        default=False,
        metadata={"help": "require a GPU build of faiss: search runs where the memory is stored in any case"},
    )
    token_memory: int = field(
        default=0,
        metadata={
            "help": "number of tokens of a lane's past whose final hidden states and next tokens are mixed into the "
            "output, with a weight that is learned for each token; 0 turns this off"
        },
    )
    token_memory_k: int = field(
        default=1024, metadata={"help": "number of tokens of the token memory that each token reads"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout probability in the side network"})
    attention_dropout: float = field(
        default=0.0, metadata={"help": "dropout probability of the side network's local attention weights"}
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute the side network's activations in the backward pass"}
    )
    save_backbone: bool = field(
        default=False, metadata={"help": "save the backbone in the checkpoints, so that they need no other file"}
    )
    # The released format's side network differs from its backbone.
    side_activation_fn: Optional[str] = field(default=None, metadata={"help": _HIDDEN})
    side_layer_norm_eps: Optional[float] = field(default=None, metadata={"help": _HIDDEN})
    normalize_last_hidden: bool = field(default=False, metadata={"help": _HIDDEN})
    # Written into checkpoints: what rebuilds the backbone, and recognizes it (text, since averaging and moving averages
    # of weights compute with every tensor of a checkpoint).
    backbone_config: Optional[str] = field(default=None, metadata={"help": _HIDDEN})
    backbone_fingerprint: Optional[str] = field(default=None, metadata={"help": _HIDDEN})
    # Accepted because the released scripts pass them; the backbone and the data decide.
    gpt_encoder_path: Optional[str] = field(default=None, metadata={"help": _HIDDEN})
    no_token_positional_embeddings: bool = field(default=False, metadata={"help": _HIDDEN})
    # Always 0; fairseq 0.12.2 reads it of every model before it saves a checkpoint.
    base_layers: int = field(default=0, metadata={"help": _HIDDEN})
    tokens_per_sample: int = II("task.tokens_per_sample")
    memory_scope: str = II("task.memory_scope")


OTHER_TASK = (
    "longmem_lm needs to know which document each row of a batch continues, and this task does not tell: use --task "
    "longmem_language_modeling"
)


def check_task(cfg: Any) -> None:
    """Refuse a task that does not read documents on lanes: it lacks the option for the memory's scope.

    Raises:
        ValueError: The task is another one.
    """
    try:
        safe_getattr(cfg, "memory_scope", None)
    except OmegaConfBaseException:
        raise ValueError(OTHER_TASK) from None


def with_defaults(cfg: Any) -> Any:
    """Return the configuration with the fields that an older checkpoint does not have."""
    defaults = LongMemConfig()
    for name in LongMemConfig.__dataclass_fields__:
        if not name.startswith("_") and safe_getattr(cfg, name, None) is None:
            default = getattr(defaults, name)
            if not (isinstance(default, str) and default.startswith("${")):
                if OmegaConf.is_config(cfg):
                    OmegaConf.set_struct(cfg, False)
                setattr(cfg, name, default)
    return cfg


def plain(cfg: Any) -> Any:
    """Return a configuration that can be pickled: fairseq's choices, which are classes without a name, as strings.

    Settings of other groups that it refers to are copied, as far as it has these groups beside it.
    """
    if not OmegaConf.is_config(cfg):
        return cfg
    values = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
    for name in values:
        if OmegaConf.is_interpolation(cfg, name):
            with contextlib.suppress(OmegaConfBaseException):
                values[name] = OmegaConf.to_container(OmegaConf.create([cfg[name]]), resolve=True, enum_to_str=True)[0]
    return OmegaConf.create(values)


def check_options(cfg: Any, backbone: Backbone) -> None:
    """Refuse options that contradict the backbone.

    Args:
        cfg: Configuration of the model.
        backbone: Backbone of the model.

    Raises:
        ValueError: An option contradicts the backbone.
    """
    if cfg.layer_reduction_factor < 1 or backbone.num_layers % cfg.layer_reduction_factor:
        raise ValueError(
            f"the backbone's {backbone.num_layers} layers are not divisible by --layer-reduction-factor "
            f"{cfg.layer_reduction_factor}: choose another factor"
        )
    if cfg.base_layers:
        raise ValueError(f"--base-layers {cfg.base_layers}: a side network cannot have BASE layers, leave it out")
    distance = cfg.memory_query_distance
    if distance < 0:
        raise ValueError(f"--memory-query-distance {distance} is negative: the memory is behind the queries, raise it")
    if distance and not backbone.has_rotary_positions:
        raise ValueError(
            f"--memory-query-distance {distance} rotates queries, and a {backbone.config['model']} has no rotary "
            "positions: leave it out"
        )
    if not 0.0 <= cfg.memory_dropout < 1.0:
        raise ValueError(
            f"--memory-dropout {cfg.memory_dropout} is not a probability below 1: choose one from 0 to 0.99"
        )
    check_carry_window(cfg, backbone)
    longest, segment = backbone.max_positions, safe_getattr(cfg, "tokens_per_sample", None)
    if longest is not None and segment is not None and segment > longest:
        raise ValueError(f"--tokens-per-sample {segment} is longer than the backbone's {longest} positions: lower it")


def check_carry_window(cfg: Any, backbone: Backbone) -> None:
    """Refuse a carried window that contradicts the backbone's positions.

    Args:
        cfg: Configuration of the model.
        backbone: Backbone of the model.

    Raises:
        ValueError: The window is negative or too long.
    """
    carried, longest = cfg.carry_window, backbone.max_positions
    segment = safe_getattr(cfg, "tokens_per_sample", None) or 1
    if carried < 0:
        raise ValueError(f"--carry-window {carried} is negative: 0 carries nothing, raise it")
    if not carried or longest is None:
        return
    if backbone.has_relative_positions and carried >= longest:
        raise ValueError(
            f"--carry-window {carried} is longer than the backbone's sliding window of {longest} tokens, which has the "
            f"token itself: lower it to at most {longest - 1}"
        )
    if not backbone.has_relative_positions and carried + segment > longest:
        raise ValueError(
            f"--carry-window {carried} and --tokens-per-sample {segment} are together longer than the backbone's "
            f"{longest} positions, with which the carried tokens are encoded again: lower one of them"
        )
