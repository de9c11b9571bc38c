"""What a GPU computes is what a CPU computes; skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from hdmole import HDMoLEConfig, route, trace
from hdmole.speech.asr import ASR
from hdmole.speech.audio import decode
from hdmole.study.bench_layer import expert_loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
SAMPLES = sorted((Path(__file__).parent.parent / "assets" / "demo" / "samples").glob("*.flac"))


@pytest.fixture(scope="module")
def both() -> tuple[ASR, ASR]:
    return ASR.load("demo", "cpu"), ASR.load("demo")


def test_the_layer_is_the_loop_over_experts_and_what_a_cpu_computes() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), HDMoLEConfig.extended(["a", "b", "c"], target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "hdmole_" in name and "threshold" not in name:
            nn.init.normal_(parameter, std=0.3)
    x, posterior = torch.randn(4, 9, 64), torch.rand(4, 4).softmax(1)
    expected = model(x, accent_posterior=posterior)
    model.cuda()
    silent = model(x.cuda(), accent_posterior=posterior.cuda())
    with trace(model) as t:
        traced = model(x.cuda(), accent_posterior=posterior.cuda())
    assert silent.is_cuda and torch.equal(traced, silent)
    torch.testing.assert_close(silent.cpu(), expected, rtol=1e-5, atol=1e-5)
    layer = model.base_model.model[0]
    gates = np.stack([t.arrays("0", u)["gate"] for u in range(4)])
    with route(posterior.cuda()):
        torch.testing.assert_close(expert_loop(layer, x.cuda(), torch.tensor(gates).cuda()), silent, rtol=1e-5, atol=1e-5)
    silent.square().mean().backward()
    assert all(p.grad is not None and p.grad.is_cuda for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("shape", [(4, 9, 64), (9, 64)], ids=["utterances", "packed frames"])
def test_a_compiled_layer_computes_the_same(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), HDMoLEConfig.extended(["a", "b", "c"], target_modules=["0"])).cuda()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.hdmole_B["default"])
    x, posterior = torch.randn(shape).cuda(), torch.rand(4, 4).softmax(1).cuda()
    with route(posterior, torch.arange(len(x)).cuda() % 4):
        compiled = torch.compile(layer, fullgraph=True)(x)
        torch.testing.assert_close(compiled, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["base", "lora", "full", "hdmole"])
def test_the_demo_hears_on_a_gpu_what_it_hears_on_a_cpu(both: tuple[ASR, ASR], method: str) -> None:
    assert [asr.device.type for asr in both] == ["cpu", "cuda"]
    for sample in SAMPLES:
        audio = decode(sample)
        here, there = (asr.transcribe(audio, method, want_trace=method == "hdmole") for asr in both)
        assert here.text == there.text, sample.name
        assert [w.confidence for w in here.words] == pytest.approx([w.confidence for w in there.words], abs=1e-3)
        assert here.in_domain["verdict"] == there.in_domain["verdict"]
        if here.trace is not None and there.trace is not None:
            for name in here.trace.layer_names:
                a, b = (t.arrays(name)["gate"] for t in (here.trace, there.trace))
                assert np.mean(np.abs(a - b) > 1e-3) < 0.01  # a weight within rounding of its threshold may fall either way


def test_utterances_in_a_batch_are_heard_as_each_alone(both: tuple[ASR, ASR]) -> None:
    gpu = both[1]
    segments = [gpu.segment(decode(sample))[0] for sample in SAMPLES]
    together = gpu.decode_batch(segments, "hdmole")
    assert [d.text for d in together] == [gpu.decode_batch([s], "hdmole")[0].text for s in segments]
