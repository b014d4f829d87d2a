"""Generation through fairseq-interactive and fairseq-generate, as users run them."""

import json
import math
import re

import pytest
import torch
from safetensors import safe_open

from longmem_fairseq.hub import LongMem
from longmem_fairseq.models.live_window import prefill
from longmem_fairseq.text import one_line, text_codec
from tests.conftest import T
from tests.fairseq_runs import TASK, finish, run, start
from tests.text_models import huggingface_model, sentencepiece_model

LONG = 3 * T + 4  # new tokens: more than three windows
PROMPTS = (3, 40, 17)  # tokens of the prompts


def words(tokens):
    return " ".join(f"w{token}" for token in tokens)


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prompts")
    (directory / "book.txt").write_text("\n".join(words(range(i, i + 20)) for i in range(0, 40, 4)))
    (directory / "letter.txt").write_text(words(range(50, 59)))
    (directory / "prompts.txt").write_text("\n".join(words(range(n)) for n in PROMPTS) + "\n")
    return directory


def arguments(tiny_data, tiny_longmem, *options):
    return [tiny_data, *TASK, "--path", tiny_longmem.checkpoint, "--cpu", *options]


def hypotheses_of(output):
    """(number of the prompt, score, symbols) of each hypothesis, as printed."""
    return re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", output, re.MULTILINE)


BEAM = ["--beam", 3, "--nbest", 2, "--min-len", LONG, "--max-len-b", LONG, "--input", "prompts.txt"]


@pytest.fixture(scope="session")
def with_book(tiny_data, tiny_longmem, prompt_files):
    """Prompts of several lengths side by side, answered over three windows with two documents in memory."""
    documents = ["--memory-text", "book.txt", "--memory-text", "letter.txt"]
    return run(
        "interactive",
        *arguments(tiny_data, tiny_longmem, *BEAM, *documents),
        *"--buffer-size 3 --batch-size 3 --memory-save book.memory --memory-save-dtype float32".split(),
        cwd=prompt_files,
    )


def test_answers_over_three_windows(with_book, tiny_data, tiny_longmem, prompt_files):
    """Each has its length in new tokens, and every token the probability that the model gives it there."""
    assert "memorized book.txt: 200 tokens" in with_book and "memorized letter.txt: 9 tokens" in with_book
    hypotheses = hypotheses_of(with_book)
    assert [index for index, _, _ in hypotheses] == ["0", "0", "1", "1", "2", "2"]
    printed = re.findall(r"^P-\d+\t(.*)$", with_book, re.MULTILINE)
    model = LongMem.from_pretrained(str(tiny_longmem.checkpoint), data=str(tiny_data), device="cpu")
    for name in ("book.txt", "letter.txt"):
        model.memorize((prompt_files / name).read_text(), name)
    eos = torch.tensor([model.task.dictionary.eos()])
    for (index, score, text), scores in zip(hypotheses, printed):
        answer = torch.cat([model.encode(text), eos])
        assert len(answer) == LONG + 1
        inputs = torch.cat([eos, model.encode(words(range(PROMPTS[int(index)]))), answer[:-1]])
        begin = len(inputs) - len(answer)
        state = prefill(model.model.decoder, [inputs[:begin]], T, model.memory.bank)
        with torch.no_grad():
            logits = [model.model.decoder(token.view(1, 1), incremental_state=state)[0][0] for token in inputs[begin:]]
        expected = torch.cat(logits).log_softmax(-1).gather(1, answer[:, None])[:, 0] / math.log(2)
        reported = torch.tensor([float(x) for x in scores.split()])
        torch.testing.assert_close(reported, expected, atol=2e-4, rtol=1e-4)
        assert float(score) == pytest.approx(float(expected.mean()), abs=2e-4)


def test_a_saved_memory_is_as_good_as_the_book(tiny_data, tiny_longmem, with_book, prompt_files):
    output = run(
        "interactive", *arguments(tiny_data, tiny_longmem, *BEAM), "--memory-load", "book.memory", cwd=prompt_files
    )
    assert re.search(r"loaded \d+ tokens \(.*letter.txt\) in", output)
    before, after = hypotheses_of(with_book), hypotheses_of(output)
    assert len(after) == 6
    for (index, score, text), (other_index, other_score, other_text) in zip(before, after):
        assert (index, text) == (other_index, other_text)
        assert float(score) == pytest.approx(float(other_score), abs=1e-3)


def test_prompts_by_pipe_and_turns(tiny_data, tiny_longmem, prompt_files):
    process = start(
        "interactive",
        *arguments(tiny_data, tiny_longmem, *"--memorize-turns --memory-save turns.memory".split()),
        *"--sampling --sampling-topp 0.9 --beam 1 --nbest 1 --max-len-b 5".split(),
        cwd=prompt_files,
        stdin=open(prompt_files / "prompts.txt"),
    )
    output = finish(process)
    hypotheses = hypotheses_of(output)
    assert [index for index, _, _ in hypotheses] == ["0", "1", "2"]
    assert output.count("saved ") == 3, "after every turn"
    with safe_open(prompt_files / "turns.memory", framework="pt") as file:
        documents = json.loads(file.metadata()["documents"])
    turns = [n + len(text.split()) + 1 for n, (_, _, text) in zip(PROMPTS, hypotheses)]  # with an end-of-sentence each
    # The memory of 64 tokens has all of the last turn, and the end of the one before.
    assert [name for name, _, _ in documents] == ["turn 1", "turn 2", "turn 3"][-len(documents) :]
    assert documents[-1][2] - documents[-1][1] == turns[2] and documents[-1][2] >= 64 - 3


def test_generate_continues_documents(tiny_data, tiny_longmem, prompt_files):
    options = arguments(tiny_data, tiny_longmem, "--gen-subset", "valid", "--batch-size", 3, "--max-len-b", 10)
    good = start("generate", *options, "--beam", 2, "--prompt-tokens", 20, cwd=prompt_files)
    bad = start("generate", *options, cwd=prompt_files)
    device = [*options, "--prompt-tokens", 20, "--memory-text", "book.txt", "--memory-save", "/dev/full"]
    device = start("generate", *device, cwd=prompt_files)
    assert sorted({index for index, _, _ in hypotheses_of(finish(good))}) == ["0", "1", "3"]  # number 2 has one token
    assert "--prompt-tokens N" in finish(bad, succeeds=False).splitlines()[-1]
    output = finish(device, succeeds=False)
    assert "--memory-save /dev/full is a device, not a regular file: name another path" in output.splitlines()[-1]
    assert "memorized" not in output, "it is refused before any work is done"


def test_bad_memories_are_one_sentence(tiny_data, tiny_longmem, with_book, prompt_files, tmp_path):
    whole = (prompt_files / "book.memory").read_bytes()
    (tmp_path / "truncated").write_bytes(whole[:-100])
    (tmp_path / "tampered").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    foreign = LongMem.from_pretrained(str(sentencepiece_model(tmp_path)), device="cpu")
    foreign.memorize("a text of another model")
    foreign.save_memory(str(tmp_path / "foreign"))
    sentences = {
        "truncated": r"the memory \S*truncated is damaged, or not a safetensors file",
        "tampered": r"the memory \S*tampered is not as it was written: its checksum \(sha256\) differs",
        "foreign": r"the memory \S*foreign was made by a backbone with fingerprint \w{12}, but the model's has \w{12}",
    }
    options = arguments(tiny_data, tiny_longmem, *BEAM)
    processes = {
        name: start("interactive", *options, "--memory-load", tmp_path / name, cwd=prompt_files) for name in sentences
    }
    for name, process in processes.items():
        output = finish(process, succeeds=False)
        assert re.search(sentences[name], output.splitlines()[-1])
        assert not hypotheses_of(output)


STORY = 'if x:\n    print("déjà vu 漢字")\nelse:\n\tpass\n'


def start_with_text(directory, tokenizer, *options, **kwargs):
    (directory / "story").write_text(STORY, encoding="utf-8")
    lines = [STORY.replace("\n", "<0x0A>"), "else:", "x"]
    (directory / "prompts").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return start(
        "interactive",
        directory,
        *TASK,
        "--path",
        directory / "model.pt",
        "--cpu",
        "--input",
        directory / "prompts",
        *tokenizer,
        *"--buffer-size 3 --batch-size 3".split(),
        *options,
        cwd=directory,
        **kwargs,
    )


def test_tokenizers(tmp_path):
    """Texts of several lines, by a tokenizer.json, as named, and by the data's sentencepiece; in two ways."""
    huggingface, spm = tmp_path / "huggingface", tmp_path / "sentencepiece"
    for directory in (huggingface, spm):
        directory.mkdir()
    huggingface_model(huggingface, [STORY * 9])
    sentencepiece_model(spm)
    diverse = ["--beam", 4, "--nbest", 4, "--diverse-beam-groups", 2, "--no-repeat-ngram-size", 2]
    process = start_with_text(
        huggingface,
        ["--bpe", "hf_tokenizer", "--tokenizer-json", huggingface / "tokenizer.json"],
        *diverse,
        "--max-len-b",
        30,
        "--min-len",
        30,
        "--memory-text",
        "-",
        stdin=open(__file__),
    )
    sampled = ["--sampling", "--sampling-topk", 9, "--temperature", 1.5, "--beam", 2, "--nbest", 2, "--max-len-b", 9]
    other = start_with_text(spm, [], *sampled, "--memory-text", "story")
    outputs = {huggingface: finish(process), spm: finish(other)}
    assert f"text is encoded by the tokenizer in {spm} (SentencepieceBPE)" in outputs[spm]
    assert "text is encoded by the tokenizer" not in outputs[huggingface]
    for (directory, output), n_best in zip(outputs.items(), (4, 2)):
        assert re.search(r"memorized (-|story): [\d,]+ tokens", output)
        hypotheses = hypotheses_of(output)
        assert len(hypotheses) == 3 * n_best
        model = LongMem.from_pretrained(str(directory), device="cpu")
        lines, symbol_bytes = one_line(model.bpe), text_codec(model.bpe).symbol_bytes
        sources = re.findall(r"^S-\d\t(.*)$", output, re.MULTILINE)
        assert [lines.decode(source) for source in sources] == [STORY.replace("\n", "<0x0A>"), "else:", "x"]
        answers = re.findall(r"^D-(\d)\t\S+\t(.*)$", output, re.MULTILINE)
        for (index, answer), (other_index, _, text) in zip(answers, hypotheses, strict=True):
            content = b"".join(symbol_bytes.get(symbol, symbol.encode()) for symbol in text.split())
            # All whitespace of an answer is kept: its prompt continues with it.
            assert index == other_index
            assert answer == content.decode("utf-8", "replace").replace("\n", "<0x0A>").replace("\r", "<0x0D>")
    for _, _, text in hypotheses_of(outputs[huggingface]):
        symbols = text.split()
        assert len(symbols) == 30 and len(set(zip(symbols, symbols[1:]))) == 29, "no pair is generated twice"
    assert all(len(text.split()) <= 9 for _, _, text in hypotheses_of(outputs[spm]))
