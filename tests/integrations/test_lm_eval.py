"""lm-evaluation-harness computes with models of this package what it does with transformers', and their scores."""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from longmem_fairseq.evaluation.scoring.scorer import Scorer
from longmem_fairseq.hub import LongMem
from longmem_fairseq.integrations.lm_eval import LongMemHarness, main
from preprocess.convert_huggingface import from_huggingface
from tests.evaluation.conftest import T, files, restored_loggers, text  # noqa: F401  (fixtures)
from tests.fairseq_runs import make_dictionary
from tests.huggingface_tokenizers import byte_level, llama
from tests.preprocess.test_convert_huggingface import tiny_gpt2
from tests.preprocess.test_huggingface_llama import SIZES
from tests.repository import ROOT

LENGTH = 48  # tokens of a converted model's window


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def harness(path, **arguments):
    return LongMemHarness(str(path), device="cpu", **arguments)


def tiny_llama(vocab_size):
    sizes = {**SIZES, "vocab_size": vocab_size, "max_position_embeddings": LENGTH}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.eval()


MODELS = {
    "gpt2": (lambda size: tiny_gpt2(vocab_size=size, n_positions=LENGTH), byte_level, "<|endoftext|>", "<|endoftext|>"),
    "llama": (tiny_llama, llama, "<s>", "</s>"),
}


@pytest.fixture(scope="module", params=MODELS)
def converted(request, tmp_path_factory, text):  # noqa: F811
    """A model of transformers in the harness, and the same converted; the tokenizer puts no token before a text."""
    make, tokenizer_of, start, end = MODELS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    content = json.loads(tokenizer_of([text]))
    content["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token=start, eos_token=end
    )
    tokenizer.save_pretrained(directory)
    model = make(len(tokenizer) + 3)  # rows that the tokenizer does not use
    # transformers and this package decode bytes that are not a character differently: none is ever the likeliest.
    byte_tokens = [number for token, number in tokenizer.get_vocab().items() if token.startswith("<0x")]
    model.lm_head.weight.data[byte_tokens] = 0.0
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(directory)
    from_huggingface(directory, directory / "fairseq")
    return SimpleNamespace(
        directory=directory,
        expected=HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, max_length=LENGTH),
        path=directory / "fairseq" / "checkpoint.pt",
    )


def test_equals_transformers(converted, text):  # noqa: F811
    """Contexts within the window and longer ones, none, a likeliest continuation, whole texts, and generation."""
    model, expected = harness(converted.path), converted.expected
    assert not model.add_bos_token and len(model.scorer.excluded) > 4
    pairs = [(text[:40], " Long"), (text[:40], " memory for"), ("", text[:20]), (text[:300], " text"), ("<", "a>")]
    greedy = {"until": ["\n\n", "qq"], "max_gen_toks": 6}
    prompts = [(text[:30], greedy), (text[5:30], greedy), (text[:400], greedy)]
    answers = expected.generate_until(requests("generate_until", *prompts), disable_tqdm=True)
    assert model.generate_until(requests("generate_until", *prompts), disable_tqdm=True) == answers
    drawn = [(prompt, {**greedy, "do_sample": True, "temperature": 0.5, "top_k": 1}) for prompt, _ in prompts]
    assert model.generate_until(requests("generate_until", *drawn), disable_tqdm=True) == answers
    want = expected.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    scores = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in want], abs=1e-4)
    numbers = expected.tok_encode(text[:30])
    likeliest = expected.model.generate(torch.tensor([numbers]), max_new_tokens=3, do_sample=False)[0].tolist()
    pairs = [(None, likeliest[:-n], likeliest[-n:]) for n in (1, 3, 4)]
    want = expected._loglikelihood_tokens(pairs, disable_tqdm=True)  # noqa: SLF001
    encoded = [(None, [4 + x for x in context], [4 + x for x in end]) for _, context, end in pairs]
    scores = model._loglikelihood_tokens(encoded, disable_tqdm=True)  # noqa: SLF001
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in want] == [True, True, False]
    texts = [(text[:60],), (text[:900],)]
    want = expected.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    rolled = model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert rolled == pytest.approx(want, abs=1e-4 * len(texts[1][0]))


def test_a_token_before_each_text(converted, text):  # noqa: F811
    """As transformers puts one there, or as the argument has it."""
    start = converted.expected.tokenizer.bos_token_id
    context, end = (converted.expected.tok_encode(part) for part in (text[:40], text[40:50]))
    want = converted.expected._loglikelihood_tokens([(None, [start, *context], end)])[0][0]  # noqa: SLF001
    directory = converted.directory / "starts"
    shutil.copytree(converted.path.parent, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    symbol = (converted.expected.tokenizer.bos_token, start)
    tokenizer.post_processor = TemplateProcessing(f"{symbol[0]} $A", special_tokens=[symbol])
    tokenizer.save(str(directory / "tokenizer.json"))
    for model in (harness(directory / "checkpoint.pt"), harness(converted.path, add_bos_token=True)):
        assert model.add_bos_token
        encoded = (None, model.tok_encode(text[:40]), [4 + number for number in end])
        assert model._loglikelihood_tokens([encoded])[0][0] == pytest.approx(want, abs=1e-4)  # noqa: SLF001


@pytest.fixture(scope="module")
def model(files):  # noqa: F811
    return LongMem.from_pretrained(str(files.longmem), data=str(files.directory), device="cpu")


@pytest.mark.parametrize("system", ["memory", "off", "backbone"])
def test_equals_scores_of_the_python_api(files, model, text, system):  # noqa: F811
    """A text that fills whole segments is read as ``LongMem.score`` reads it, of which the continuation is the end."""
    lm = harness(files.longmem, data=str(files.directory), system=system)
    ids = model.encode(text)[: 4 * T]
    if system == "backbone":
        scorer = Scorer.load(str(files.longmem), str(files.directory), "cpu")
        inputs = torch.cat([torch.tensor([2]), ids[:-1]]).view(4, T)
        features = scorer.backbone.output(scorer.backbone.final_hidden(scorer.backbone.encode(inputs)))
        want = features.log_softmax(-1).gather(2, ids.view(4, T, 1)).flatten()
    else:
        reader = (model if system == "memory" else model.without_memory()).reader
        want = reader.score(ids, use_memory=system == "memory")
    context = [2, *ids[:-5].tolist()]
    ((score, greedy),) = lm._loglikelihood_tokens([(None, context, ids[-5:].tolist())])  # noqa: SLF001
    assert score == pytest.approx(float(want[-5:].sum()), abs=1e-4) and not greedy
    encoded = model.encode(text)
    if system == "memory":
        want = model.score(text).log_probabilities
        assert len(encoded) % T
        (rolled,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
        assert rolled == pytest.approx(float(want.double().sum()), abs=1e-2)
        prompt = (text[:40], {"until": ["\n", "st"], "max_gen_toks": 12})
        (answer,) = lm.generate_until(requests("generate_until", prompt), disable_tqdm=True)
        expected = model.generate(text[:40], max_new_tokens=12, min_new_tokens=0, stop=["\n", "st"])
        assert answer == expected


def test_shared_contexts_are_memorized_once(files, text, monkeypatch):  # noqa: F811
    """Also the document before two questions; no answer depends on the other requests or on their order."""
    lm = harness(files.longmem, data=str(files.directory))
    document = text[:1200]
    pairs = [
        (document + question, answer) for question in (" Who?", " Which of them?") for answer in ("He", " They do")
    ]
    pairs += [(text[300:700], "He"), ("Who?", "He")]
    single = harness(files.longmem, data=str(files.directory), batch_size=1)
    alone = [single.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)[0] for pair in pairs]
    lengths = []
    memorize = Scorer.memorize
    monkeypatch.setattr(Scorer, "memorize", lambda self, state, x: (lengths.append(len(x)), memorize(self, state, x)))
    for order in (range(6), (5, 2, 4, 0, 3, 1)):
        lengths.clear()
        scores = lm.loglikelihood(requests("loglikelihood", *(pairs[i] for i in order)), disable_tqdm=True)
        assert [score for score, _ in scores] == pytest.approx([alone[i][0] for i in order], abs=1e-4)
        whole = [len(lm.tok_encode(pairs[i][0])) // T for i in (0, 4)]
        assert whole[0] > 8 and sum(x for x in lengths if x >= T) <= (sum(whole) + 1) * T
    prompts = [(context, {"until": [], "max_gen_toks": 4}) for context, _ in pairs]
    alone = [lm.generate_until(requests("generate_until", prompt), disable_tqdm=True)[0] for prompt in prompts]
    assert lm.generate_until(requests("generate_until", *prompts), disable_tqdm=True) == alone


def test_a_released_model(tmp_path):
    """Also behind its memory, and with a dictionary of words."""
    make_dictionary(196).save(str(tmp_path / "dict.txt"))
    path, settings = ROOT / "tests" / "models" / "released" / "sidenet.pt", dict(memory_size=32)
    lm = harness(path, data=str(tmp_path), max_length=16, **settings)
    released = LongMem.from_pretrained(str(path), data=str(tmp_path), device="cpu", tokens_per_sample=16, **settings)
    words = " ".join(released.task.dictionary.symbols[4:68])
    want = released.score(words).log_probabilities
    (rolled,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (words,)), disable_tqdm=True)
    assert rolled == pytest.approx(float(want.double().sum()), abs=1e-3)
    context, end = words.rsplit(" ", 3)[0], " " + " ".join(words.split()[-3:])
    ((score, _),) = lm.loglikelihood(requests("loglikelihood", (context, end)), disable_tqdm=True)
    assert score == pytest.approx(float(want[-3:].sum()), abs=1e-4)


TASKS = {
    "tiny_choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "metric": "acc"},
    "tiny_text": {"output_type": "loglikelihood_rolling", "metric": "bits_per_byte"},
    "tiny_answer": {
        "output_type": "generate_until",
        "metric": "exact_match",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
    },
}


def test_command(files, model, text, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The harness's own command line, with local tasks alone, since the list of all takes a while to read."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    documents = [
        {"text": text[:500], "choices": [" memory", " text"], "answer": 0},
        {"text": text[100:200], "choices": ["a", " the"], "answer": 1},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        task = dict(task)
        metric = {"metric": task.pop("metric")}
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(tmp_path / "data.jsonl")},
            "test_split": "train",
            "doc_to_text": "{{text}}" if name != "tiny_text" else "",
            "doc_to_target": "{{text}}" if name == "tiny_text" else "{{answer}}",
            "metric_list": [metric],
            **task,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    arguments = f"path={files.longmem},data={files.directory},memory_size=96,system=memory"
    main(
        ["--model_args", arguments, "--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--device", "cpu"]
        + ["--output_path", str(tmp_path / "out"), "--log_samples"]
    )
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    smaller = LongMem.from_pretrained(str(files.longmem), data=str(files.directory), device="cpu", memory_size=96)
    losses = [-float(smaller.score(document["text"]).log_probabilities.double().sum()) for document in documents]
    size = sum(len(document["text"].encode()) for document in documents)
    bits = results["results"]["tiny_text"]["bits_per_byte,none"]
    assert bits == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-4)
    assert results["config"]["system"] == "memory on" and results["config"]["memory_size"] == 96
    assert "tiny_choice" in capsys.readouterr().out


def test_bad_input(files, monkeypatch):  # noqa: F811
    def refuses(sentence, path=files.longmem, **arguments):
        with pytest.raises(ValueError, match=sentence):
            harness(path, data=str(files.directory), **arguments)

    refuses("system=on is unknown: choose memory, off, backbone", system="on")
    refuses("memory_size=64 acts on the memory, which system=off does not read", system="off", memory_size=64)
    refuses("k=4 needs a LongMem, and .* is a backbone alone", files.backbone, k=4)
    refuses("system=memory needs a LongMem", files.backbone, system="memory")
    refuses("system=memory contradicts memory_size=0", system="memory", memory_size=0)
    refuses("memory_size=many is not a number of tokens from 0", memory_size="many")
    refuses("max_length=0 is not a number of tokens from 1", max_length=0)
    refuses("max_length 999 is longer than the backbone's 64 positions", max_length=999)
    refuses("batch_size=0 is neither a number from 1 on nor auto", batch_size=0)
    refuses("max_batch_size=8 is not supported", max_batch_size=8)
    refuses("add_bos_token=perhaps is neither True nor False", add_bos_token="perhaps")
    refuses("does not have the setting memry_size: did you mean memory_size", memry_size=64)
    lm = harness(files.backbone, data=str(files.directory))
    with pytest.raises(ValueError, match="a continuation of 0 tokens"):
        lm.loglikelihood(requests("loglikelihood", ("a", "")))
    for arguments, sentence in (
        ({"length_penalty": 2}, "length_penalty=2 is not supported in generation"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 is not a whole number from 1"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True needs temperature above 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            lm.generate_until(requests("generate_until", ("a", arguments)))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    with pytest.raises(SystemExit, match="integrations.lm_eval: .*tiny_none") as stopped:
        main(["--model_args", f"path={files.longmem}", "--tasks", "tiny_none"])
    assert "\n" not in str(stopped.value)
