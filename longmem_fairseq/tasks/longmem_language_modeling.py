"""The task ``longmem_language_modeling``: whole documents on lanes, so that a memory follows each document."""

import functools
import logging
import os
from typing import Any, Dict, Optional

from fairseq import utils
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingTask

from ..data.document_dataset import DocumentDataset
from ..data.manifest import dictionary_fingerprint
from ..data.text_meter import find_meter
from ..safe_load import allow_plain_data
from ..text import encode_text
from .batch_memory import BatchMemory
from .checkpoints import Restored, check_dictionary, check_space, read_checkpoint
from .data_tokenizer import bpe_of_data
from .document_splits import load_documents
from .evaluation_batches import EvaluationBatches
from .explicit_options import ExplicitOptions
from .generation_options import check_generation
from .generator import LongMemGenerator
from .lane_batches import LaneBatches
from .memory_session import MemorySession, memory_of_evaluation, memory_options, refuse_memory_options
from .model_setup import prepare_model
from .option_table import TABLE as OPTIONS
from .options import LongMemLanguageModelingConfig, check_options
from .prompt_dataset import PromptDataset, document_prompts
from .run_description import describe_run
from .saved_settings import SavedSettings
from .stop_rule import answers_in_lines
from .training_setup import prepare_training

logger = logging.getLogger(__name__)


@register_task("longmem_language_modeling", dataclass=LongMemLanguageModelingConfig)
class LongMemLanguageModelingTask(LanguageModelingTask):
    """Language modeling over documents that are read segment by segment, each on its own lane.

    It trains and evaluates any language model of fairseq. A model that has a memory (``memorize``, ``needs_replay`` and
    ``memory_tokens``) gets ``net_input["segments"]``: the lane and place that each row of a batch continues.

    Attributes:
        memory: Upkeep of the model's memory before each batch.
        lane_batches: Iterators over documents on lanes.
        session: Memory of a generation command; None before its generator is built.
        restored: Checkpoint that training continues from; None if there is none.
        saved: Settings of the checkpoints that are evaluated.
    """

    def __init__(self, args, dictionary, output_dictionary=None, targets=None):
        super().__init__(args, dictionary, output_dictionary, targets)
        self.memory = BatchMemory(args)
        self.lane_batches = LaneBatches(args, dictionary.eos(), self.memory.start_epoch)
        self.session: Optional[MemorySession] = None
        self.restored: Optional[Restored] = None
        self.saved = SavedSettings({})
        self._model = self._model_cfg = self._last_batch = None
        self._tokenizer = self._bpe = None

    @classmethod
    def add_args(cls, parser):
        """Add the options, so that the task knows which of them the user gave."""
        super().add_args(ExplicitOptions(parser))

    @classmethod
    def setup_task(cls, args, **kwargs):
        """Check the options, the checkpoint and the data before anything is built."""
        allow_plain_data()  # fairseq reads its checkpoints after this
        from_checkpoint = bool(kwargs.get("from_checkpoint"))
        if not from_checkpoint:
            args.tokens_per_sample += args.context_window  # which fairseq-eval-lm subtracted: here it is the window
        check_options(args, from_checkpoint)
        saved = SavedSettings.of_command(args, from_checkpoint)
        task = super().setup_task(args, **kwargs)
        task.saved = saved
        if args.path is not None:
            paths = filter(os.path.isfile, utils.split_paths(args.path))
            saved.expect([read_checkpoint(path) for path in paths], set(OPTIONS))
        elif not from_checkpoint:
            task.restored, task.memory.snapshots = prepare_training(args, task.dictionary)
        return task

    @classmethod
    def setup_dictionary(cls, args, **kwargs):
        """Load the dictionary of the first data directory."""
        if not args.data:
            raise ValueError("no data: name the directory that contains dict.txt and the binarized documents")
        path = os.path.join(utils.split_paths(args.data)[0], "dict.txt")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no dictionary: {path} does not exist")
        return super().setup_dictionary(args, **kwargs)

    def state_dict(self) -> Dict[str, Any]:
        """Describe the task for a checkpoint that is about to be written."""
        check_space(self.args.save_dir)
        return {
            **super().state_dict(),
            "dictionary_sha256": dictionary_fingerprint(self.dictionary.symbols),
            "dictionary_size": len(self.dictionary),
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Check a checkpoint's description of its task."""
        check_dictionary(state_dict, self.dictionary, "the checkpoint")
        super().load_state_dict(state_dict)

    def build_model(self, args, from_checkpoint=False):
        """Build the model; the segment length and memory scope of a checkpoint are the task's defaults."""
        if from_checkpoint:
            self.saved.apply(args, self.args)
        elif self.restored is not None and "backbone_fingerprint" in args:
            args.backbone_fingerprint = self.restored.backbone  # the model compares it with its backbone's
        model = super().build_model(args, from_checkpoint)
        prepare_model(model, self.args, from_checkpoint)
        self._model = self.memory.model = model
        self._model_cfg = args
        if self.memory.snapshots is not None:
            self.memory.snapshots.expect(model)
        return model

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs):
        """Open a split of the data directories: its documents, or with ``--prompt-tokens`` their first tokens."""
        dataset = load_documents(self.args, self.dictionary, split, epoch, combine)
        if self.args.prompt_tokens is not None:
            args = self.args
            dataset = document_prompts(
                dataset, args.prompt_tokens, self.dictionary, args.tokens_per_sample, args.memorize_turns
            )
        self.datasets[split] = dataset
        return dataset

    def build_dataset_for_inference(self, src_tokens, src_lengths, constraints=None, **kwargs) -> PromptDataset:
        """Make a dataset of prompts to continue, or of texts to score.

        Args:
            src_tokens: Token ids of each prompt, shape (length,), int64.
            src_lengths: Ignored.
            constraints: None; constraints are not supported.
            kwargs: Ignored.

        Returns:
            The prompts.

        Raises:
            ValueError: There are constraints.
        """
        if constraints is not None:
            raise ValueError("--constraints is not supported by a language model: prompts are continued freely")
        return PromptDataset(src_tokens, self.dictionary, self.args.tokens_per_sample, self.args.memorize_turns)

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, prefix_allowed_tokens_fn=None):
        """Build fairseq's generator; for models with a memory a :class:`LongMemGenerator`."""
        has_memory = any(hasattr(model, "memorize") for model in models)
        if not has_memory:
            refuse_memory_options(self.args)
        if not has_memory or seq_gen_cls is not None:
            return super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn)
        check_generation(args, models, len(self.dictionary))
        options = {key: value for key, value in (extra_gen_cls_kwargs or {}).items() if value is not None}
        if "lm_model" not in options:
            options.pop("lm_weight", None)
        options.setdefault("repetition_penalty", self.args.repetition_penalty)
        generator_class = functools.partial(LongMemGenerator, segment=self.args.tokens_per_sample)
        generator = super().build_generator(models, args, generator_class, options, prefix_allowed_tokens_fn)
        if "document_memories" not in options:  # a command, whose memory the task's options fill
            self.session = MemorySession(generator, self.args, self._encode_text)
        return generator

    def build_tokenizer(self, args):
        self._tokenizer = super().build_tokenizer(args)
        return self._tokenizer

    def build_bpe(self, args):
        """Build the BPE, without ``--bpe`` the data's; generation builds it last, so now documents can be memorized."""
        self._bpe = bpe_of_data(self.args.data) if args is None else super().build_bpe(args)
        if self.session is not None:
            self.session.start()
        return answers_in_lines(self.session, self.args, self._bpe, self._tokenizer)

    def _encode_text(self, text: str):
        return encode_text(text, self.dictionary, self._bpe, self._tokenizer)

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """Continue the prompts of a batch."""
        if not isinstance(generator, LongMemGenerator):
            return super().inference_step(generator, models, sample, prefix_tokens, constraints)
        if "segments" in sample["net_input"]:
            raise ValueError("fairseq-generate continues the first tokens of documents: set --prompt-tokens N")
        hypotheses = generator.generate(models, sample, prefix_tokens=prefix_tokens, constraints=constraints)
        if self.session is not None and self.session.generator is generator:
            self.session.end_turn(sample, hypotheses)
        return hypotheses

    def get_batch_iterator(self, dataset, max_tokens=None, max_sentences=None, **options):
        """Iterate over documents in segments on lanes (see :class:`LaneBatches`); over others as fairseq does."""
        if not isinstance(dataset, DocumentDataset):
            return super().get_batch_iterator(dataset, max_tokens, max_sentences, **options)
        options["with_segments"] = self._model is None or hasattr(self._model, "memorize")
        return self.lane_batches.iterator(dataset, max_tokens, max_sentences, **options)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs):
        """Run one forward and backward pass, with the memory at the start of the batch."""
        if ignore_grad and self._last_batch is not None:
            # A rank that has run out of batches gets any batch, to take part in the reduction of gradients. Its last
            # one leaves its memory as it is.
            sample = self._last_batch
        else:
            self._last_batch = sample
        model.train()
        self.memory.before_training(sample, model, optimizer)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs)

    def valid_step(self, sample, model, criterion, **kwargs):
        """Run one forward pass, with the memory of evaluation at the start of the batch."""
        model.eval()
        self.memory.before_validation(sample, model)
        return super().valid_step(sample, model, criterion, **kwargs)

    def post_save(self, checkpoint: str, num_updates: int) -> None:
        """Clean up after fairseq-train wrote a checkpoint and removed old ones, on the first rank."""
        self.memory.after_checkpoint()

    def eval_lm_dataloader(self, dataset, max_tokens=36000, batch_size=None, context_window=0, **options):
        """Iterate over the batches of fairseq-eval-lm; see :class:`EvaluationBatches`."""
        options.pop("max_positions", None)
        iterator = self.get_batch_iterator(dataset, max_tokens, batch_size, context=context_window, **options)
        args, lanes, memory = self.args, iterator.dataset, None
        if memory_options(args):
            self.build_tokenizer(args.tokenizer_settings)
            self.build_bpe(args.bpe_settings)
            memory = memory_of_evaluation(self._model, args, self.dictionary, self._encode_text, lanes.n_ranks)
        return EvaluationBatches(
            iterator.next_epoch_itr(shuffle=False),
            lanes,
            self._model,
            options.get("shard_id", 0),
            args.results_path,
            run=describe_run(args, self._model_cfg, lanes, memory),
            bar=args.log_format == "tqdm" or (args.log_format is None and not args.no_progress_bar),
            log_interval=args.log_interval,
            find_meter=functools.partial(find_meter, utils.split_paths(args.data), self.dictionary),
        )
