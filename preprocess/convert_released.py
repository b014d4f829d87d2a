"""Convert the released LongMem's checkpoints to plain files, and these to a checkpoint for fairseq's commands.

    python -m preprocess.convert_released sidenet.pt longmem-558m/ [--backbone newgpt.pt]
    python -m preprocess.convert_released longmem-558m/ longmem.pt

The first writes ``config.json``, ``side_network.safetensors`` and ``backbone.safetensors``: no code, no optimizer, no
paths of the machine they were trained on. In Python, ``load_released("longmem-558m/")`` reads them. The second writes a
checkpoint that holds the backbone too: for --path, and for --pretrained-model-path, which takes the backbone out of it.

    fairseq-eval-lm data --user-dir longmem_fairseq --task longmem_language_modeling --path longmem.pt
    fairseq-train data ... --arch longmem_released --pretrained-model-path longmem.pt --finetune-from-model longmem.pt

Released checkpoints can also be given to these commands as they are.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from torch import nn

from longmem_fairseq.models.longmem_lm import LongMemConfig
from longmem_fairseq.models.model_directory import write_directory
from longmem_fairseq.released.released_model import load_released
from preprocess.checkpoint_file import write_checkpoint
from preprocess.destination import whole_directory

logger = logging.getLogger("preprocess.convert_released")

PROG = "python -m preprocess.convert_released"
SEGMENT = 1024  # tokens per segment of the published model


def to_directory(side_network: Path, directory: Path, backbone: Path | None = None) -> None:
    """Convert a released checkpoint to ``config.json`` and safetensors.

    Args:
        side_network: Path of the side network's checkpoint.
        directory: Path of the directory to write; it is created if it does not exist.
        backbone: Path of the backbone's checkpoint; if None, the copy inside the side network's checkpoint is used.

    Raises:
        ValueError: A file is not of the released format, or holds code.
    """
    model = load_released(str(side_network), str(backbone) if backbone else None)
    with whole_directory(directory) as temporary:
        write_directory(model, str(temporary))
    logger.info("wrote %s", directory)


def to_checkpoint(directory: Path, checkpoint: Path) -> None:
    """Convert a directory to a checkpoint of ``longmem_lm`` that holds its backbone.

    Args:
        directory: Path of the directory, as :func:`to_directory` writes it.
        checkpoint: Path of the checkpoint to write.

    Raises:
        ValueError: A file of the directory is damaged or of another format.
    """
    model = load_released(str(directory))
    settings = {name: value for name, value in vars(model.cfg).items() if name in LongMemConfig.__dataclass_fields__}
    memory = model.cfg.memory_size
    settings.update(
        _name="longmem_lm",
        pretrained_model_path=None,
        save_backbone=True,
        memory_scope="document",
        memory_dtype="auto",
        tokens_per_sample=min(SEGMENT, memory) if memory else SEGMENT,
    )
    task = {"_name": "longmem_language_modeling", "tokens_per_sample": settings["tokens_per_sample"]}
    write_checkpoint(checkpoint, settings, task, nn.Module.state_dict(model), {})
    logger.info("wrote %s", checkpoint)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can repair ends it with one sentence.

    Args:
        arguments: Arguments of the command line; if None, those of the process.
    """
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="released checkpoint of a side network, or a directory made from one")
    parser.add_argument("destination", type=Path, help="directory to write; from a directory, a .pt checkpoint")
    parser.add_argument("--backbone", type=Path, help="checkpoint of the backbone, if the side network's has no copy")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s | %(levelname)s | %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        if args.source.is_dir():
            if args.backbone:
                raise ValueError(
                    f"--backbone {args.backbone} needs a checkpoint, and {args.source} is a directory: leave it out"
                )
            to_checkpoint(args.source, args.destination)
        else:
            to_directory(args.source, args.destination, args.backbone)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{PROG}: error: {error}") from None


if __name__ == "__main__":
    main()
