"""Generation: how prompts are continued, in one process on random weights."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from longmem_fairseq.models.live_window import prefill
from longmem_fairseq.tasks.longmem_language_modeling import LongMemLanguageModelingTask
from longmem_fairseq.tasks.options import LongMemLanguageModelingConfig, check_options
from longmem_fairseq.tasks.prompt_dataset import PromptDataset
from longmem_fairseq.text import encode_text, read_text
from tests.models.tiny import VOCABULARY, documents, longmem, stock_model
from tests.tasks.test_options import config

T = 7  # tokens of a segment
EOS, PAD = VOCABULARY.eos(), VOCABULARY.pad()
PROMPTS = documents([1, 3, 6, 7, 8, 2 * T + 3, 9 * T], seed=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return longmem(tmp_path_factory.mktemp("generation"))


def make_task(**options):
    cfg = OmegaConf.structured(LongMemLanguageModelingConfig)
    return LongMemLanguageModelingTask(OmegaConf.merge(cfg, {"tokens_per_sample": T, **options}), VOCABULARY)


def generate(models, prompts, task=None, batch=None, **options):
    """Hypotheses of each prompt, read from the task's own batches."""
    task = task or make_task()
    models = models if isinstance(models, list) else [models]
    generator = task.build_generator(models, SimpleNamespace(**{"beam": 1, "max_len_b": 20, **options}))
    dataset = task.build_dataset_for_inference(prompts, [len(prompt) for prompt in prompts])
    results = {}
    for sample in task.get_batch_iterator(dataset, max_sentences=batch or len(prompts)).next_epoch_itr(shuffle=False):
        for index, hypotheses in zip(sample["id"].tolist(), task.inference_step(generator, models, sample)):
            results[index] = hypotheses
    return [results[i] for i in range(len(prompts))]


def tokens_of(hypotheses):
    return [hypothesis["tokens"].tolist() for hypothesis in hypotheses]


def log_probabilities(model, prompt, answer):
    """Of each token of an answer, read as a document of the same segments."""
    inputs = torch.cat([torch.tensor([EOS]), prompt, answer[:-1]])
    state = prefill(model.decoder, [inputs[: len(prompt)]], T)
    with torch.no_grad():
        logits = torch.cat(
            [model.decoder(token.view(1, 1), incremental_state=state)[0] for token in inputs[len(prompt) :]], dim=1
        )[0]
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def greedy(model, prompt, steps):
    inputs = torch.cat([torch.tensor([EOS]), prompt])
    state = prefill(model.decoder, [inputs[:-1]], T)
    token, answer = inputs[-1], []
    with torch.no_grad():
        while len(answer) < steps:
            logits = model.decoder(token.view(1, 1), incremental_state=state)[0][0, -1]
            logits[PAD] = float("-inf")
            if not answer:
                logits[EOS] = float("-inf")  # --min-len is 1
            token = logits.argmax()
            if token == EOS:
                break
            answer.append(int(token))
    return [*answer, EOS]


def test_beam_1_is_greedy_across_roll_overs(model):
    for hypotheses, prompt in zip(generate(model, PROMPTS, max_len_b=3 * T), PROMPTS):
        assert tokens_of(hypotheses) == [greedy(model, prompt, 3 * T)]


STRATEGIES = {
    "beam": dict(beam=4),
    "long beam": dict(beam=3, max_len_b=3 * T, min_len=3 * T - 2),
    "diverse beam": dict(beam=4, diverse_beam_groups=2),
    "no repeated bigram": dict(beam=3, no_repeat_ngram_size=2),
    "temperature": dict(beam=3, temperature=2.0),
    "likeliest sample": dict(sampling=True, sampling_topk=1),
    "nucleus of one": dict(sampling=True, sampling_topp=1e-6),
    "length penalty": dict(beam=4, lenpen=2.0, unkpen=1.0),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_batch_is_as_one_by_one(model, name):
    together = generate(model, PROMPTS, **STRATEGIES[name])
    for hypotheses, prompt in zip(together, PROMPTS):
        (alone,) = generate(model, [prompt], **STRATEGIES[name])
        assert tokens_of(hypotheses) == tokens_of(alone)
        for one, other in zip(hypotheses, alone):
            torch.testing.assert_close(one["positional_scores"], other["positional_scores"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["beam", "long beam"])
def test_scores_are_those_of_the_tokens(model, name):
    for hypotheses, prompt in zip(generate(model, PROMPTS, **STRATEGIES[name]), PROMPTS):
        assert len(hypotheses) == STRATEGIES[name]["beam"]
        scores = [float(hypothesis["score"]) for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for hypothesis in hypotheses:
            expected = log_probabilities(model, prompt, hypothesis["tokens"])
            torch.testing.assert_close(hypothesis["positional_scores"], expected, atol=1e-4, rtol=1e-4)


def test_lengths_count_new_tokens(model):
    for hypotheses in generate(model, PROMPTS, beam=2, min_len=5, max_len_b=6):
        assert all(6 <= len(hypothesis["tokens"]) <= 7 for hypothesis in hypotheses)  # with end-of-sentence


def test_no_ngram_is_repeated(model):
    for hypotheses in generate(model, PROMPTS, beam=3, no_repeat_ngram_size=2, min_len=20, max_len_b=25):
        for tokens in tokens_of(hypotheses):
            bigrams = list(zip(tokens, tokens[1:]))
            assert len(bigrams) == len(set(bigrams))


def test_samples_follow_the_seed(model):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return [tokens_of(results) for results in generate(model, PROMPTS, beam=3, sampling=True, **options)]

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, sampling_topk=5) != sample(1, sampling_topp=0.5)
    best = [tokens_of(results)[0][0] for results in generate(model, PROMPTS)]
    nucleus = sample(3, sampling_topk=1)
    assert [results[0][0] for results in nucleus] == best


def test_an_empty_prompt_starts_a_document(model):
    (hypotheses,) = generate(model, [torch.tensor([], dtype=torch.int64)])
    assert tokens_of(hypotheses) == [greedy(model, torch.tensor([], dtype=torch.int64), 20)]


def test_an_ensemble_of_equals_is_one(model):
    one, two = (generate(models, PROMPTS, beam=3) for models in (model, [model, model]))
    assert [tokens_of(results) for results in one] == [tokens_of(results) for results in two]


def test_a_stock_model_is_continued_by_the_stock_generator():
    model, prompt = stock_model(), PROMPTS[1]
    (hypotheses,) = generate(model, [prompt], max_len_b=10)
    tokens, answer = torch.cat([torch.tensor([EOS]), prompt]), []
    assert hypotheses[0]["tokens"][: len(prompt)].tolist() == prompt.tolist()  # stock hypotheses begin with the prompt
    with torch.no_grad():
        while len(prompt) + len(answer) < 10:
            logits = model(tokens[None])[0][0, -1]
            logits[PAD] = float("-inf")
            answer.append(int(logits.argmax()))
            tokens = torch.cat([tokens, tokens.new_tensor(answer[-1:])])
            if answer[-1] == EOS:
                break
    expected = [*prompt.tolist(), *answer]
    assert hypotheses[0]["tokens"].tolist() == expected + ([] if answer[-1] == EOS else [EOS])


def test_turns_are_remembered(model):
    task = make_task(memorize_turns=True)
    first, second = PROMPTS[3], PROMPTS[4]
    results = generate(model, [first, second, second], task, batch=1)
    document_memory = task.session.generator.document_memories[0]
    answers = [hypotheses[0]["tokens"][:-1] for hypotheses in results]
    assert [document.name for document in document_memory.documents][-1] == "turn 3"
    assert document_memory.end == sum(len(p) + len(a) + 1 for p, a in zip([first, second, second], answers))
    alone = generate(model, [second])[0][0]
    past = results[1][0]
    n = min(len(alone["tokens"]), len(past["tokens"]))
    assert (alone["positional_scores"][:n] - past["positional_scores"][:n]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="not 3 at once: set --batch-size 1"):
        generate(model, [first, second, second], make_task(memorize_turns=True))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(match_source_len=True), "--match-source-len is not supported"),
        (dict(constraints="ordered"), "--constraints is not supported"),
        (dict(print_alignment="hard"), "--print-alignment is not supported"),
        (dict(score_reference=True), "--score-reference is not supported"),
        (dict(lm_path="other.pt"), "--lm-path is not supported"),
        (dict(temperature=0.0), "--temperature 0.0 is not above 0"),
        (dict(beam=0), "--beam 0 is less than one"),
        (dict(beam=2, nbest=3), "--nbest 3 is more than the 2 hypotheses of --beam"),
        (dict(min_len=30), "--min-len 30 is more than --max-len-b 20"),
    ],
)
def test_options_that_are_not_supported_are_refused(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(model, PROMPTS, **options)


def test_models_of_two_kinds_are_refused(model):
    with pytest.raises(ValueError, match="TransformerLanguageModel"):
        generate([model, stock_model()], PROMPTS)


def test_memory_options_need_a_memory(tmp_path):
    with pytest.raises(ValueError, match="need a memory"):
        generate(longmem(tmp_path, use_external_memory=False), PROMPTS, make_task(memorize_turns=True))


def test_prompts_as_batches():
    dataset = PromptDataset([torch.tensor([5, 6, EOS]), torch.tensor([7]), torch.arange(4, 20)], VOCABULARY, T)
    assert [dataset.size(i) for i in range(3)] == [3, 2, 17]
    assert [dataset.num_tokens(i) for i in range(3)] == [3, 2, T]
    assert dataset.ordered_indices().tolist() == [1, 0, 2]
    batch = dataset.collater([dataset[1], dataset[0]])
    assert batch["net_input"]["src_tokens"].tolist() == [[EOS, 7, PAD], [EOS, 5, 6]]
    assert batch["net_input"]["src_lengths"].tolist() == [2, 3]
    assert batch["target"].tolist() == [[7, PAD, PAD], [5, 6, PAD]]
    assert batch["id"].tolist() == [1, 0]
    assert dataset.collater([]) == {}


def test_every_prompt_is_in_a_batch():
    dataset = PromptDataset(documents([2, 3, 5, 5, 20]), VOCABULARY, T)
    assert dataset.batch_by_size(range(5), max_sentences=2, required_batch_size_multiple=8) == [[0, 1], [2, 3], [4]]
    assert dataset.batch_by_size(range(5), max_tokens=12) == [[0, 1], [2, 3], [4]]  # 3 + 4, 6 + 6, 7 of them at a time
    assert dataset.batch_by_size(range(5), max_tokens=1) == [[0], [1], [2], [3], [4]]


def test_text_as_tokens(monkeypatch, tmp_path):
    assert encode_text("w0 w2\nw1\n", VOCABULARY).tolist() == [4, 6, 5]
    with pytest.raises(ValueError, match="the text is empty"):
        encode_text("\n", VOCABULARY)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8 text .byte 3."):
        read_text(str(tmp_path / "latin"))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("é".encode())))
    assert read_text("-") == "é"


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(memory_text=["missing.txt"]), "--memory-text missing.txt does not exist, or is not a file"),
        (dict(memory_load="missing"), "--memory-load missing does not exist, or is not a file"),
        (dict(memory_save="no/such/place"), "--memory-save no/such/place cannot be written"),
        (dict(prompt_tokens=-1), "--prompt-tokens -1 is negative"),
        (
            dict(memory_text=["-"], input="-", fairseq_command="fairseq-interactive"),
            "no prompt is left in it: name a file of prompts with --input",
        ),
    ],
)
def test_paths_are_checked_before_anything_is_read(options, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        check_options(config(path="model.pt", **options))


def test_a_document_by_pipe():
    """Prompts then come from a file, or in other commands than fairseq-interactive from the data."""
    check_options(
        config(path="model.pt", memory_text=["-"], input="prompts.txt", fairseq_command="fairseq-interactive")
    )
    for command in ("fairseq-generate", "fairseq-eval-lm"):
        check_options(config(path="model.pt", memory_text=["-"], input="-", fairseq_command=command))
