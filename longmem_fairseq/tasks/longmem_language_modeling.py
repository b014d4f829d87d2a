"""The task ``longmem_language_modeling``: whole documents on lanes, so that a memory follows each document."""

import functools
import json
import logging
import os
import weakref
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from fairseq import utils
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import OmegaConf

from ..data.directories import has_split, open_split
from ..data.document_dataset import DocumentDataset
from ..data.lane_dataset import LaneDataset
from ..data.lane_iterator import LaneIterator
from ..data.manifest import dictionary_fingerprint
from ..modules.mixed_precision import compute_products_in
from ..text import encode_text, one_line
from .checkpoints import Restored, check_dictionary, check_space, prepare_restore, read_checkpoint
from .evaluation_batches import Evaluation
from .generator import Conversation, LongMemGenerator, check_generation
from .memory_snapshots import MemorySnapshots, before_each_checkpoint
from .options import LongMemLanguageModelingConfig, check_options
from .prompt_dataset import PromptDataset
from .replay import replay

logger = logging.getLogger(__name__)

FROM_CHECKPOINT = ("tokens_per_sample", "memory_scope")  # settings that evaluation takes from the model's


@register_task("longmem_language_modeling", dataclass=LongMemLanguageModelingConfig)
class LongMemLanguageModelingTask(LanguageModelingTask):
    """Language modelling over documents that are read segment by segment, each on a lane of its own.

    Any language model of fairseq can be trained and evaluated with it. One that has a memory (``memorize``,
    ``needs_replay`` and ``memory_tokens``) is given ``net_input["segments"]``: the lane and place that each row of a
    batch continues.
    """

    def __init__(self, args, dictionary, output_dictionary=None, targets=None):
        super().__init__(args, dictionary, output_dictionary, targets)
        self._model = self._model_cfg = None
        self._lanes: Dict[Tuple[str, bool], LaneDataset] = {}  # what is read of each split, in training (True) or not
        self._layouts: Dict[str, Tuple[int, int]] = {}
        self._epoch: Callable[[], Optional[LaneIterator]] = lambda: None  # the epoch of training that is being read
        self._snapshots: Optional[MemorySnapshots] = None
        self._last_batch = None
        self._conversation: Optional[Conversation] = None
        self._tokenizer = self._bpe = None

    @classmethod
    def add_args(cls, parser):
        """Add the options; ``--memory-text`` can be given several times, which fairseq's own way does not allow."""
        field = LongMemLanguageModelingConfig.__dataclass_fields__["memory_text"]
        parser.add_argument("--memory-text", action="append", metavar="FILE", help=field.metadata["help"])
        super().add_args(parser)  # leaves out what the parser has already

    @classmethod
    def setup_task(cls, args, **kwargs):
        check_options(args)
        task = super().setup_task(args, **kwargs)
        if args.path is not None:
            for path in filter(os.path.isfile, utils.split_paths(args.path)):
                read_checkpoint(path)
        elif not kwargs.get("from_checkpoint"):  # training
            if str(args.inference_dtype) != "float32":
                raise ValueError(
                    f"--inference-dtype {args.inference_dtype} is for evaluation and generation: leave it out, and "
                    "train in half precision with --fp16, --bf16 or --amp"
                )
            paths = utils.split_paths(args.data)
            if len(paths) > 1:  # what an epoch days from now will read is looked at today
                open_split(paths, args.train_subset, task.dictionary, combine=True)
            restored = prepare_restore(args.restore_file, args.save_dir, args.finetune_from_model, task.dictionary)
            task._prepare_snapshots(restored)
        return task

    def _prepare_snapshots(self, restored: Optional[Restored]) -> None:
        """Save the memory with each checkpoint, or read that of the one that training continues from, as asked for.

        Raises:
            ValueError: not every rank is told when a checkpoint is due (see ``before_each_checkpoint``).
        """
        args = self.args
        if args.memory_snapshot and args.no_save_optimizer_state:
            raise ValueError(
                "--memory-snapshot and --no-save-optimizer-state exclude each other: a training that cannot be "
                "continued needs no memory; leave one out"
            )
        if args.memory_snapshot and str(args.ddp_backend) == "fully_sharded":
            raise ValueError(
                "--memory-snapshot does not go with --ddp-backend fully_sharded, which gathers state in its own way: "
                "choose another, or leave it out and continue by replay"
            )
        if restored is not None and (restored.batches == 0 or args.reset_dataloader):
            restored = None  # an epoch begins, with nothing to remember
        resume = str(args.resume_memory or ("snapshot" if args.memory_snapshot else "replay"))
        if restored is not None and resume == "replay":
            if str(args.memory_scope) == "shared":
                logger.warning(
                    "a memory that all lanes share is rebuilt from the last batches alone, and may hold some more or "
                    "fewer of them than it did; a snapshot (--memory-snapshot) is exact"
                )
            restored = None
        if args.memory_snapshot or restored is not None:
            self._snapshots = MemorySnapshots(args.save_dir, restored)

    @classmethod
    def setup_dictionary(cls, args, **kwargs):
        if not args.data:
            raise ValueError("no data: name the directory that holds dict.txt and the binarized documents")
        path = os.path.join(utils.split_paths(args.data)[0], "dict.txt")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no dictionary: {path} does not exist")
        return super().setup_dictionary(args, **kwargs)

    def state_dict(self) -> Dict[str, Any]:
        """What a checkpoint says of the task; called when one is about to be written."""
        check_space(self.args.save_dir)
        return {
            **super().state_dict(),
            "dictionary_sha256": dictionary_fingerprint(self.dictionary.symbols),
            "dictionary_size": len(self.dictionary),
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        check_dictionary(state_dict, self.dictionary, "the checkpoint")
        super().load_state_dict(state_dict)

    def build_model(self, args, from_checkpoint=False):
        """Build the model; one from a checkpoint brings its segment length and memory scope with it."""
        if from_checkpoint:
            for name in FROM_CHECKPOINT:
                here, there = getattr(self.args, name), getattr(args, name, None)
                if there is not None and str(there) != str(here):
                    option = name.replace("_", "-")
                    logger.info("--%s: %s, from the checkpoint (change it with --model-overrides)", option, there)
                    self.args[name] = there
        model = super().build_model(args, from_checkpoint)
        if from_checkpoint and str(self.args.inference_dtype) != "float32":
            compute_products_in(model, getattr(torch, str(self.args.inference_dtype)))
        positions = model.max_positions()
        if positions is not None and self.args.tokens_per_sample > positions:
            raise ValueError(
                f"--tokens-per-sample {self.args.tokens_per_sample} exceeds the {positions} positions of the model"
            )
        self._model, self._model_cfg = model, args
        if self._snapshots is not None:
            self._snapshots.expect(model)
        return model

    @property
    def _has_memory(self) -> bool:
        return self._model is None or hasattr(self._model, "memorize")

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> DocumentDataset:
        """Open a split of the data directories.

        Of several (``a:b:c``) each epoch of training reads the next, validation the first, and commands that evaluate
        or generate read all that have the split.
        """
        paths = utils.split_paths(self.args.data)
        having = [path for path in paths if has_split(path, split)]
        if self.args.path is not None:
            paths = having or paths[:1]
        else:
            if split != self.args.train_subset and len(having) > 1:
                logger.warning(
                    "%s is read from %s alone, as fairseq does it; there is also one in %s",
                    split,
                    paths[0],
                    ", ".join(path for path in having if path != paths[0]),
                )
            paths = [paths[(epoch - 1) % len(paths)]]
        dataset = DocumentDataset(open_split(paths, split, self.dictionary, combine), self.dictionary, split)
        mean = dataset.tokens / len(dataset)
        logger.info(
            "%s: %s documents, %s tokens (%.0f on average)", split, f"{len(dataset):,}", f"{dataset.tokens:,}", mean
        )
        if mean < self.args.tokens_per_sample / 8 and str(self.args.memory_scope) == "document":
            logger.warning(
                "%s: items of %.0f tokens on average are much shorter than a segment; if they are lines of texts, "
                "join them with --memory-scope stream, or keep documents whole with preprocess/binarize_documents.py",
                split,
                mean,
            )
        if self.args.prompt_tokens is not None:
            return self._prompts_of(split, dataset)
        self.datasets[split] = dataset
        return dataset

    def _prompts_of(self, split: str, documents: DocumentDataset) -> PromptDataset:
        """The beginnings of documents as prompts, and the rest as what should follow.

        Raises:
            ValueError: all documents are too short.
        """
        n, eos, whole = self.args.prompt_tokens, self.dictionary.eos(), {}
        for i in range(len(documents)):
            document = torch.from_numpy(documents.read(i, 0, documents.size(i)))
            document = document[:-1] if document[-1] == eos else document
            if len(document) > n:
                whole[i] = document
        if len(whole) < len(documents):
            logger.info("%s: %d documents have no more than %d tokens", split, len(documents) - len(whole), n)
        if not whole:
            raise ValueError(f"no document of {split} has more than --prompt-tokens {n} tokens: lower it")
        self.datasets[split] = PromptDataset(
            [document[:n] for document in whole.values()],
            self.dictionary,
            self.args.tokens_per_sample,
            in_order=self.args.memorize_turns,
            targets=[document[n:] for document in whole.values()],
            ids=list(whole),
        )
        return self.datasets[split]

    def build_dataset_for_inference(self, src_tokens, src_lengths, constraints=None, **kwargs) -> PromptDataset:
        """Prompts to continue, or texts to score: tokens (length,) each, int64.

        Raises:
            ValueError: constraints are given.
        """
        if constraints is not None:
            raise ValueError("--constraints cannot be had of a language model: prompts are continued freely")
        return PromptDataset(
            src_tokens, self.dictionary, self.args.tokens_per_sample, in_order=self.args.memorize_turns
        )

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, prefix_allowed_tokens_fn=None):
        """fairseq's generator; for models with a memory one that reads prompts into it (:class:`LongMemGenerator`).

        Raises:
            ValueError: an option cannot be honoured.
        """
        own = any(hasattr(model, "memorize") for model in models)
        if not own or seq_gen_cls is not None:
            return super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn)
        check_generation(args, models)
        others = {key: value for key, value in (extra_gen_cls_kwargs or {}).items() if value is not None}
        if "lm_model" not in others:
            others.pop("lm_weight", None)
        generator = super().build_generator(
            models,
            args,
            functools.partial(LongMemGenerator, segment=self.args.tokens_per_sample),
            others,
            prefix_allowed_tokens_fn,
        )
        self._conversation = Conversation(generator, self.args, self._encode_text)
        return generator

    def build_tokenizer(self, args):
        self._tokenizer = super().build_tokenizer(args)
        return self._tokenizer

    def build_bpe(self, args):
        """The last thing that fairseq's commands build before the first prompt: now documents can be memorised."""
        self._bpe = super().build_bpe(args)
        if self._conversation is not None:
            self._conversation.begin()
        return one_line(self._bpe)

    def _encode_text(self, text: str):
        return encode_text(text, self.dictionary, self._bpe, self._tokenizer)

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """Continue the prompts of a batch.

        Raises:
            ValueError: the batch is of segments, not of prompts.
        """
        if not isinstance(generator, LongMemGenerator):
            return super().inference_step(generator, models, sample, prefix_tokens, constraints)
        if "segments" in sample["net_input"]:
            raise ValueError(
                "fairseq-generate continues the beginnings of documents: say with --prompt-tokens N how much of each"
            )
        hypotheses = generator.generate(models, sample, prefix_tokens=prefix_tokens, constraints=constraints)
        if self._conversation is not None and self._conversation.generator is generator:
            self._conversation.remember(sample, hypotheses)
        return hypotheses

    def _lanes_per_rank(self, documents: int, ranks: int, max_sentences, max_tokens) -> int:
        """Rows of a batch: ``--batch-size``, or what fits ``--max-tokens``; no more than there are documents."""
        limits = [-(-documents // ranks)]
        if max_sentences is not None:
            limits.append(max_sentences)
        if max_tokens is not None:
            limits.append(max(1, max_tokens // self.args.tokens_per_sample))
        return min(limits)

    def get_batch_iterator(
        self,
        dataset,
        max_tokens=None,
        max_sentences=None,
        max_positions=None,
        ignore_invalid_inputs=False,
        required_batch_size_multiple=1,
        seed=1,
        num_shards=1,
        shard_id=0,
        num_workers=0,
        epoch=1,
        data_buffer_size=0,
        disable_iterator_cache=False,
        skip_remainder_batch=False,
        grouped_shuffling=False,
        update_epoch_batch_itr=False,
    ) -> LaneIterator:
        """Lay the documents on ``num_shards`` times the lanes of a batch; see :class:`LaneIterator`.

        Raises:
            ValueError: ``--skip-remainder-batch`` is asked for.
        """
        if not isinstance(dataset, DocumentDataset):  # such as what generation builds
            return super().get_batch_iterator(
                dataset,
                max_tokens,
                max_sentences,
                max_positions,
                ignore_invalid_inputs,
                required_batch_size_multiple,
                seed,
                num_shards,
                shard_id,
                num_workers,
                epoch,
                data_buffer_size,
                disable_iterator_cache,
                skip_remainder_batch,
                grouped_shuffling,
                update_epoch_batch_itr,
            )
        if skip_remainder_batch:
            raise ValueError(
                "--skip-remainder-batch would drop tokens, but every token of a document is read: leave it out"
            )
        lanes = LaneDataset(
            dataset,
            self._lanes_per_rank(len(dataset), num_shards, max_sentences, max_tokens),
            num_shards,
            self.args.tokens_per_sample,
            self.dictionary.eos(),
            str(self.args.memory_scope),
            None if self.args.data_no_shuffle else seed,
            with_segments=self._has_memory,
        )
        lanes.set_epoch(epoch)
        layout = (lanes.n_lanes, lanes.steps)
        if self._layouts.get(dataset.split) != layout:
            self._layouts[dataset.split] = layout
            logger.info(
                "%s: %d lanes on each of %d ranks, %s batches of up to %d tokens a lane",
                dataset.split,
                lanes.n_lanes,
                num_shards,
                f"{lanes.steps:,}",
                lanes.T,
            )
        return LaneIterator(lanes, shard_id, epoch, num_workers, data_buffer_size, begins=self._begin)

    def _begin(self, epoch: LaneIterator, training: bool) -> None:
        """An epoch begins; validation may read the same split in other lanes than training does."""
        self._lanes[epoch.dataset.documents.split, training] = epoch.dataset
        if training and epoch.dataset.documents.split == self.args.train_subset:
            self._epoch = weakref.ref(epoch)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs):
        """One forward and backward pass, after making sure that the memory is where the batch continues."""
        if ignore_grad and self._last_batch is not None:
            # A rank that has run out of batches is given any batch, to take part in the reduction of gradients. Its own
            # last one leaves its memory as it is.
            sample = self._last_batch
        else:
            self._last_batch = sample
        model.train()
        autocast = isinstance(optimizer, AMPOptimizer)
        if self._snapshots is not None and "segments" in sample["net_input"]:
            self._snapshots.load(sample, self._model, self._epoch(), autocast)
            if self.args.memory_snapshot:
                before_each_checkpoint(optimizer, self._save_memory)
        self._catch_up(sample, model, True, autocast)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs)

    def valid_step(self, sample, model, criterion, **kwargs):
        """One forward pass in evaluation, whose memory is not that of training."""
        model.eval()
        self._catch_up(sample, model, False)
        return super().valid_step(sample, model, criterion, **kwargs)

    def _catch_up(self, sample, model, training: bool, autocast: bool = False) -> None:
        if "segments" in sample["net_input"]:
            split = sample["split"]
            lanes = self._lanes[(split, training) if (split, training) in self._lanes else (split, not training)]
            replay(sample, model, lanes, autocast)

    def _save_memory(self) -> None:
        self._snapshots.save(self._model, self._epoch())

    def post_save(self, checkpoint: str, num_updates: int) -> None:
        """Called by fairseq-train on the first rank, after it wrote a checkpoint and removed old ones."""
        if self.args.memory_snapshot:
            self._snapshots.remove_unused()

    def eval_lm_dataloader(
        self,
        dataset,
        max_tokens: Optional[int] = 36000,
        batch_size: Optional[int] = None,
        max_positions: Optional[int] = None,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 1,
        data_buffer_size: int = 10,
        context_window: int = 0,
    ):
        """Batches for fairseq-eval-lm; see :class:`Evaluation`.

        Raises:
            ValueError: ``--context-window`` is asked for.
        """
        if context_window > 0:
            raise ValueError(
                f"--context-window {context_window} cannot be had: the memory carries the context from segment to "
                "segment; leave it out"
            )
        iterator = self.get_batch_iterator(
            dataset,
            max_tokens=max_tokens,
            max_sentences=batch_size,
            num_shards=num_shards,
            shard_id=shard_id,
            num_workers=num_workers,
            data_buffer_size=data_buffer_size,
        )
        return Evaluation(
            iterator.next_epoch_itr(shuffle=False),
            iterator.dataset,
            self._model,
            shard_id,
            self.args.results_path,
            run=self._describe_run(iterator.dataset),
            bar=self.args.log_format == "tqdm" or (self.args.log_format is None and not self.args.no_progress_bar),
            log_interval=self.args.log_interval,
        )

    def _describe_run(self, lanes: LaneDataset) -> Dict[str, Any]:
        """What evaluations must have in common to be parts of one, as JSON."""
        cfg, checkpoint = self._model_cfg, self.args.path
        cfg = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True) if OmegaConf.is_config(cfg) else vars(cfg)
        dataset = lanes.documents
        file = [os.path.getsize(checkpoint), os.path.getmtime(checkpoint)] if checkpoint else None
        data = [dataset.split, len(dataset), dataset.tokens, lanes.n_lanes, lanes.T, lanes.scope, lanes.seed]
        model = {**json.loads(json.dumps(cfg, default=str)), "inference_dtype": str(self.args.inference_dtype)}
        return {"checkpoint": file, "model": model, "data": data}
