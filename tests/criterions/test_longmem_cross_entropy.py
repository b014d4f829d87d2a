"""The criterion: fairseq's loss, and beside it the figures that show whether the memory is of use."""

import math

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY, build_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.distributed.module_proxy_wrapper import ModuleProxyWrapper
from fairseq.logging import metrics
from omegaconf import OmegaConf

from longmem_fairseq.criterions.longmem_cross_entropy import LongMemCrossEntropyConfig, LongMemCrossEntropyCriterion
from longmem_fairseq.modules.joint_attention import GATE_PACE
from tests.models.tiny import LONGMEM, VOCABULARY, batches, documents, longmem, stock_model, task_of

T = LONGMEM["tokens_per_sample"]
DOCS = documents([4 * T + 3, 2 * T, 3])


def samples(docs=DOCS):
    """Batches as the task makes them: the target is the next token, padding where there is none."""
    made = []
    for tokens, segments in batches(docs, T):
        target = tokens.roll(-1, dims=1)
        for row, length in enumerate(segments.lengths):
            target[row, length - 1] = VOCABULARY.eos()
            target[row, length:] = VOCABULARY.pad()
        made.append(
            {
                "net_input": {"src_tokens": tokens, "segments": segments},
                "target": target,
                "ntokens": int(segments.lengths.sum()),
                "nsentences": len(tokens),
            }
        )
    return made


def criterion(interval=50, sentence_avg=False):
    return LongMemCrossEntropyCriterion(task_of(VOCABULARY), sentence_avg, interval)


@pytest.fixture
def model(tmp_path):
    return longmem(tmp_path)


def logs(model, criterion, made=None, training=False):
    """What is logged of each batch."""
    model.train(training)
    model.decoder.reset_memory()
    return [criterion(model, sample)[2] for sample in made or samples()]


def numbers(log):
    return {key: float(value) for key, value in log.items()}


def reduced(*steps):
    """The figures after steps, each with the logs of its ranks."""
    with metrics.aggregate(new_root=True) as aggregator:
        for outputs in steps:
            LongMemCrossEntropyCriterion.reduce_metrics(outputs)
        return aggregator.get_smoothed_values()


# --- the loss


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sentence_avg", [False, True])
def test_loss_and_gradients_are_fairseqs(model, sentence_avg, training):
    """Of the same logits, padding left out, with the same denominator."""
    results = []
    for kind in (criterion(0, sentence_avg), CrossEntropyCriterion(task_of(VOCABULARY), sentence_avg)):
        model.train(training)
        model.decoder.reset_memory()
        outputs = []
        for sample in samples():
            model.zero_grad()
            loss, size, logged = kind(model, sample)
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            outputs.append([loss.detach(), torch.tensor(size), logged, gradients])
        results.append(outputs)
    for (loss, size, logged, gradients), (loss_, size_, logged_, gradients_) in zip(*results):
        torch.testing.assert_close(loss, loss_)
        assert size == size_
        assert {key: float(logged[key]) for key in logged_} == pytest.approx(numbers(logged_))
        for actual, stock in zip(gradients, gradients_):
            torch.testing.assert_close(actual, stock, rtol=1e-4, atol=1e-5)


def test_loss_of_each_token(model):
    sample = samples()[0]
    each = criterion()(model, sample, reduce=False)[0]
    assert each.shape == (sample["target"].numel(),)
    assert not each[(sample["target"] == VOCABULARY.pad()).view(-1)].any()
    torch.testing.assert_close(each.sum(), criterion()(model, sample)[0])


def test_loss_is_in_full_precision_for_a_half_model(model):
    loss = criterion()(model.bfloat16(), samples()[0])[0]
    assert loss.dtype == torch.float32


def test_base_two(model):
    log = logs(model, criterion())[0]
    figures = reduced([log])
    assert figures["loss"] == pytest.approx(float(log["loss"]) / log["ntokens"] / math.log(2), abs=1e-3)
    assert figures["ppl"] == pytest.approx(2 ** (float(log["loss"]) / log["ntokens"] / math.log(2)), rel=1e-2)


# --- the same keys always


def test_every_batch_logs_the_same_keys_in_the_same_order(tmp_path):
    """fairseq sums them over ranks by their position, so that a rank at a document's start may not log less."""
    seen = set()
    for options in ({}, {"memory_size": 0}, {"use_external_memory": False}):
        model = longmem(tmp_path, **options)
        for training in (False, True):
            for interval in (0, 1, 50):
                for log in logs(model, criterion(interval), training=training):
                    seen.add(tuple(log))
                    assert all(torch.is_tensor(x) and x.dim() == 0 or isinstance(x, int) for x in log.values())
    assert len(seen) == 1
    assert LongMemCrossEntropyCriterion.logging_outputs_can_be_summed()


def test_sums_of_ranks_reduce_as_the_ranks_do(model):
    ranks = logs(model, criterion())
    summed = {key: sum(log[key] for log in ranks) for key in ranks[0]}
    assert reduced([summed]) == pytest.approx(reduced(ranks))


# --- the comparison with the memory off


def test_loss_without_memory_is_that_of_the_memory_off(tmp_path):
    model, off = longmem(tmp_path), longmem(tmp_path, memory_size=0)
    compared = logs(model, criterion())
    for log, log_off in zip(compared, logs(off, criterion())):
        torch.testing.assert_close(log["loss_without_memory"], log_off["loss"])
        torch.testing.assert_close(log["loss_compared"], log["loss"])
        assert log["tokens_compared"] == log["ntokens"]
    assert compared[0]["loss"] == compared[0]["loss_without_memory"], "nothing is remembered yet"
    assert all(log["loss"] != log["loss_without_memory"] for log in compared[1:])


def test_gain_is_of_perplexity_in_percent(model):
    ranks = logs(model, criterion())
    tokens = sum(log["ntokens"] for log in ranks)
    with_memory, without = (
        math.exp(sum(float(log[key]) for log in ranks) / tokens) for key in ("loss", "loss_without_memory")
    )
    figures = reduced(ranks)
    assert figures["ppl"] == pytest.approx(with_memory, rel=1e-3)
    assert figures["ppl_no_mem"] == pytest.approx(without, rel=1e-3)
    assert figures["mem_gain"] == pytest.approx(100 * (without - with_memory) / without, abs=0.05)
    assert not any(key.startswith("_") for key in figures), "auxiliary figures are not shown"


def test_gain_of_several_steps_weighs_tokens(model):
    """Only the compared tokens count, each once, however they are spread over steps."""
    compared = logs(model, criterion())
    others = logs(model, criterion(0), training=True)
    together = reduced(compared)
    apart = reduced(*([log] for log in compared), others)
    for key in ("ppl_no_mem", "mem_gain"):
        assert apart[key] == pytest.approx(together[key], abs=0.02)


def test_training_compares_every_so_many_updates(model):
    model.train()
    for interval, expected in ((3, [0, 3, 6]), (1, list(range(8))), (0, [])):
        compared = []
        for update in range(8):
            model.set_num_updates(update)
            log = criterion(interval)(model, samples()[0])[2]
            if log["tokens_compared"]:
                compared.append(update)
                assert log["loss_without_memory"] > 0
            else:
                assert log["loss_without_memory"] == log["loss_compared"] == 0
        assert compared == expected


@pytest.mark.parametrize("interval", [0, 3])
def test_validation_compares_always(model, interval):
    model.set_num_updates(1)
    assert all(log["tokens_compared"] == log["ntokens"] for log in logs(model, criterion(interval)))


def test_the_comparison_does_not_change_the_gradients(model):
    gradients = []
    for interval in (0, 1):
        model.train()
        model.decoder.reset_memory()
        model.zero_grad()
        for sample in samples():
            criterion(interval)(model, sample)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_nothing_is_shown_of_steps_that_measured_nothing(model):
    figures = reduced(logs(model, criterion(0), training=True))
    assert "ppl_no_mem" not in figures and "mem_gain" not in figures
    assert {"loss", "ppl", "gate", "mem_fill", "mem_dist"} <= figures.keys()


def test_a_line_of_the_log_after_a_reset_shows_no_old_gain(model):
    """fairseq resets what train_inner shows after every line; derived figures stay registered."""
    with metrics.aggregate(new_root=True) as aggregator:
        LongMemCrossEntropyCriterion.reduce_metrics(logs(model, criterion()))
        assert aggregator.get_smoothed_values()["mem_gain"] is not None
        aggregator.reset()
        LongMemCrossEntropyCriterion.reduce_metrics(logs(model, criterion(0), training=True))
        figures = aggregator.get_smoothed_values()
    assert figures["ppl_no_mem"] is None and figures["mem_gain"] is None and figures["ppl"] > 1


# --- figures of the memory


def test_gate_is_the_mean_over_heads(model):
    gate = torch.tensor([-2.0, 0.5, 3.0])
    model.decoder.layers[model.decoder.reading_layers[0]].self_attn.gate_bias.data = gate / GATE_PACE
    ranks = logs(model, criterion())
    assert reduced(ranks)["gate"] == pytest.approx(float(gate.sigmoid().mean()), abs=1e-3)
    assert all(log["memory_batches"] == 1 for log in ranks)


def test_gates_of_several_layers(tmp_path):
    """The mean over all heads, and that of each layer under its number; fill and distance are means over layers."""
    model = longmem(tmp_path, retrieval_layer_index="1,3", k=30)
    for layer, gate in zip(model.decoder.layers, (-2.0, 1.0)):
        layer.self_attn.gate_bias.data.fill_(gate / GATE_PACE)
    figures, one = reduced(logs(model, criterion())), reduced(logs(longmem(tmp_path, k=30), criterion()))
    gates = torch.tensor([-2.0, 1.0]).sigmoid()
    assert [figures["gate_1"], figures["gate_3"]] == pytest.approx(gates.tolist(), abs=1e-3)
    assert figures["gate"] == pytest.approx(float(gates.mean()), abs=1e-3)
    assert [figures[name] for name in ("mem_fill", "mem_dist")] == [one[name] for name in ("mem_fill", "mem_dist")]
    assert not any(name.startswith("gate_") for name in one)


def test_fill_is_the_mean_over_lanes_and_batches(model):
    """Lane by lane from the tokens before: whole chunks, no more than the memory holds."""
    N, C = LONGMEM["memory_size"] // LONGMEM["chunk_size"], LONGMEM["chunk_size"]
    expected = []
    for sample in samples():
        segments = sample["net_input"]["segments"]
        expected.append(sum(min(N, start // C) / N for start in segments.starts) / len(segments))
    ranks = logs(model, criterion())
    assert [float(log["memory_fill"]) for log in ranks] == pytest.approx(expected)
    assert reduced(ranks)["mem_fill"] == pytest.approx(sum(expected) / len(expected), abs=1e-3)


def test_distance_is_the_mean_over_all_that_is_read(tmp_path):
    """Where k covers the memory, every chunk held is read, and the distances follow from the positions alone."""
    model = longmem(tmp_path, k=30)
    N, C, H = LONGMEM["memory_size"] // LONGMEM["chunk_size"], LONGMEM["chunk_size"], 3
    total = reads = 0
    ranks = logs(model, criterion())
    for sample, log in zip(samples(), ranks):
        segments = sample["net_input"]["segments"]
        distances = []
        for start, length in zip(segments.starts, segments.lengths):
            chunks = range(start // C)[-N:]
            distances += [start + t - (c * C + (C - 1) / 2) for t in range(length) for c in chunks] * H
        assert float(log["memory_reads"]) == len(distances)
        assert float(log["memory_distance"]) == pytest.approx(sum(distances))
        total, reads = total + sum(distances), reads + len(distances)
    assert reduced(ranks)["mem_dist"] == round(total / reads)


def test_no_figures_of_a_memory_that_is_off(tmp_path):
    model = longmem(tmp_path, memory_size=0)
    ranks = logs(model, criterion())
    assert all(not log[key] for log in ranks for key in ("memory_batches", "memory_reads", "tokens_compared"))
    assert not {"gate", "mem_fill", "mem_dist", "ppl_no_mem", "mem_gain"} & reduced(ranks).keys()


def test_logging_keeps_no_graph(model):
    model.train()
    for sample in samples():
        log = criterion(1)(model, sample)[2]
        assert not any(torch.is_tensor(x) and x.requires_grad for x in log.values())


def test_works_through_a_wrapper_of_distributed_training(model):
    """Which passes attributes on, as fairseq's does."""

    class Parallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    plain = logs(model, criterion())
    model.decoder.reset_memory()
    wrapped = ModuleProxyWrapper(Parallel(model)).eval()
    for sample, expected in zip(samples(), plain):
        assert numbers(criterion()(wrapped, sample)[2]) == pytest.approx(numbers(expected))


def test_registered_under_its_name():
    assert CRITERION_REGISTRY["longmem_cross_entropy"] is LongMemCrossEntropyCriterion
    cfg = OmegaConf.structured(LongMemCrossEntropyConfig(without_memory_interval=7, sentence_avg=True))
    cfg["_name"] = "longmem_cross_entropy"
    built = build_criterion(cfg, task_of(VOCABULARY))
    assert built.without_memory_interval == 7 and built.sentence_avg is True


def test_a_model_that_can_have_no_memory_is_refused():
    with pytest.raises(ValueError, match="measures a memory.*use --criterion cross_entropy"):
        criterion()(stock_model(), samples()[0])
