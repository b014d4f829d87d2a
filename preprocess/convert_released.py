"""The released LongMem's checkpoints as plain files, and these as a checkpoint for fairseq's commands.

    python preprocess/convert_released.py sidenet.pt longmem-558m/ [--backbone newgpt.pt]
    python preprocess/convert_released.py longmem-558m/ longmem.pt

The first writes ``config.json``, ``side_network.safetensors`` and ``backbone.safetensors``: no code, no optimizer, none
of its authors' paths. In Python, ``load_released("longmem-558m/")`` reads them. The second writes a checkpoint that
holds the backbone too: for --path, and for --pretrained-model-path, which takes the backbone out of it.

    fairseq-eval-lm data --user-dir longmem_fairseq --task longmem_language_modeling --path longmem.pt
    fairseq-train data ... --arch longmem_released --pretrained-model-path longmem.pt --finetune-from-model longmem.pt

Released checkpoints can also be given to these commands as they are.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if not __package__:  # run as a script: find the packages beside this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from torch import nn

from longmem_fairseq.models.longmem_lm import LongMemConfig
from longmem_fairseq.models.model_directory import write_directory
from longmem_fairseq.released.released_model import load_released
from preprocess.checkpoint_file import write_checkpoint

logger = logging.getLogger("preprocess.convert_released")

SEGMENT = 1024  # tokens, of the published model


def to_directory(side_network: Path, directory: Path, backbone: Path | None = None) -> None:
    """Write a released checkpoint as ``config.json`` and safetensors.

    Args:
        side_network: checkpoint of the side network.
        directory: made if need be.
        backbone: checkpoint of the backbone; by default the copy inside the side network's is taken.

    Raises:
        ValueError: where a file is none of the released format, or holds code.
    """
    write_directory(load_released(str(side_network), str(backbone) if backbone else None), str(directory))
    logger.info("wrote %s", directory)


def to_checkpoint(directory: Path, checkpoint: Path) -> None:
    """Write what :func:`to_directory` wrote as a checkpoint of ``longmem_lm`` that holds its backbone.

    Raises:
        ValueError: where the directory's files are not what they should be.
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
    """Run the command line; what the user can mend ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Examples are at the top of this file.")
    parser.add_argument("source", type=Path, help="released checkpoint of a side network, or a directory made from one")
    parser.add_argument("destination", type=Path, help="directory to write; from a directory, a .pt checkpoint")
    parser.add_argument("--backbone", type=Path, help="the backbone's checkpoint, where the side network's lacks it")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s | %(levelname)s | %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        if args.source.is_dir():
            if args.backbone:
                raise ValueError(f"--backbone {args.backbone} is for a checkpoint, and {args.source} is a directory")
            to_checkpoint(args.source, args.destination)
        else:
            to_directory(args.source, args.destination, args.backbone)
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_released.py: error: {error}") from None


if __name__ == "__main__":
    main()
