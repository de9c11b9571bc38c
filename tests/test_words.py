"""Words and manifests: what is compared, and where it comes from."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdmole.speech.manifest import ManifestError, fingerprint, manifest_rows, read_manifest
from hdmole.speech.words import character_disagreement, count_errors, normalise, rate_name, score


def test_normalisation_by_hand() -> None:
    assert normalise("Turn on, the  LIGHTS!") == "turn on the lights"
    assert normalise("It\u2019s 'Anna's' rock-n-roll") == "it's anna's rock n roll"
    assert normalise("Cafe\u0301 \u00dcber %") == "caf\u00e9 \u00fcber" and normalise(" ?! ") == ""


def test_digits_are_read_as_words_and_in_chinese_as_numbers() -> None:
    assert normalise("Room 205, at 4!") == "room two zero five at four"
    assert normalise("2024\u5e74") == "\u4e8c\u96f6\u4e8c\u56db\u5e74"
    assert normalise("2024\u5e74\u306b") == "2024\u5e74\u306b"  # Japanese
    assert score(["call seven five"], ["Call 7-5."])["errors"] == [0]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2024年5月1日", "二零二四年五月一日"),
        ("二〇二四年", "二零二四年"),
        ("涨了３．５％。", "涨了百分之三点五"),
        ("共1,200人", "共一千二百人"),
        ("2个人，12个人", "两个人 十二个人"),
        ("气温-5℃", "气温负五摄氏度"),
        ("第7-5号", "第七 五号"),
        ("1/2的", "二分之一的"),
        ("房间0012", "房间零零一二"),
        ("打13800138000", "打一三八零零一三八零零零"),
        ("听MP3和Beat It", "听mp三和beat it"),
        ("ＡＢ型", "ab型"),
    ],
)
def test_chinese_numbers_and_widths_by_hand(written: str, read: str) -> None:
    assert normalise(written) == read == normalise(read)


@given(st.text(st.sampled_from("0123456789.,-/%年月日个点元℃٣²½中ab ")))
def test_chinese_with_numbers_is_normalised_once(text: str) -> None:
    once = normalise("中" + text)
    assert normalise(once) == once and not any(digit in once for digit in "0123456789")


def test_characters_count_one_by_one_and_latin_words_whole() -> None:
    assert count_errors("听beat it吧", "听 beat 吧") == (1, 4)
    assert count_errors("𫖯一", "头一") == (1, 2) and count_errors("一𫖯", "一") == (1, 2)
    assert score(["二零二四年"], ["2024年！"])["errors"] == [0]


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["turn on the lights"], "WER"),
        (["打开灯", "一二三四五六七八 ok"], "CER"),  # 11 of 12
        (["我们 meeting 见"], "MER"),  # 3 of 4
        (["one two three four five six seven eight nine 你"], "WER"),  # 1 of 10
        ([""], "WER"),
    ],
)
def test_what_the_rate_is_called(texts: list[str], name: str) -> None:
    assert rate_name(texts) == name


@given(st.text())
def test_normalisation_is_done_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once and "  " not in once and once == once.strip()


@given(st.lists(st.text("abcdefgh'", min_size=1), min_size=1), st.sampled_from([",", "! ", " - ", ".\n"]))
def test_case_and_punctuation_do_not_count(words: list[str], mark: str) -> None:
    assert normalise(mark.join(words).upper() + mark) == normalise(" ".join(words))


def test_errors_by_hand() -> None:
    assert count_errors("a b c d", "a x c d e") == (2, 4)  # one substituted, one inserted
    assert count_errors("a b", "") == (2, 2) and count_errors("", "a b c") == (3, 0) and count_errors("", "") == (0, 0)
    assert count_errors("\u4f60\u597d\u5417", "\u4f60\u574f\u5417") == (1, 3)  # a character counts as a word


def test_a_table_of_scores() -> None:
    found = score(["turn on the lights", "", "one"], ["Turn off the lights!", "so", "One."])
    assert found == {"hypothesis": ["turn off the lights", "so", "one"], "errors": [1, 1, 0], "words": [4, 0, 1]}
    with pytest.raises(ValueError, match="zip"):
        score(["one"], [])


def test_disagreement_in_letters() -> None:
    assert character_disagreement("abd", "abcd") == 0.25 and character_disagreement("same", "same") == 0
    assert character_disagreement("abcdefgh", "z") == 2.0 and character_disagreement("", "") == 0  # at most 2


@pytest.mark.parametrize(
    ("content", "sentence", "code"),
    [
        ("", "m.jsonl is empty; give", "empty"),
        ("{", "Line 1 of m.jsonl is not valid JSON.", "not_json"),
        (
            '\n{"audio": "a.wav"}',
            "Line 2 of m.jsonl has no text and no accent; each line needs audio, text and accent.",
            "incomplete",
        ),
        (
            '{"audio": "a.wav", "text": "x", "accent": "y"}',
            "Line 1 of m.jsonl names a.wav, which does not exist",
            "no_such_audio",
        ),
        ("[]", "has no audio and no text and no accent", "incomplete"),
        ("\udcff", "m.jsonl is not text in UTF-8", "not_text"),
    ],
)
def test_bad_manifests_are_plain_sentences(tmp_path: Path, content: str, sentence: str, code: str) -> None:
    (tmp_path / "m.jsonl").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ManifestError) as error:
        read_manifest(tmp_path / "m.jsonl")
    assert sentence in str(error.value) and error.value.code == f"manifest.{code}"


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"There is no manifest .*none\.jsonl; give") as error:
        read_manifest(tmp_path / "none.jsonl")
    assert error.value.code == "manifest.absent"


def test_manifests_may_have_a_byte_order_mark_rare_line_ends_and_numbered_speakers(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    row = {"audio": "a.wav", "text": "one\u2028two", "accent": "x"}
    lines = [json.dumps(row | more, ensure_ascii=False) for more in ({"speaker": 0}, {}, {"speaker": ""})]
    (tmp_path / "m.jsonl").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    read = read_manifest(tmp_path / "m.jsonl")
    assert [line.speaker for line in read] == ["0", "line-2", "line-3"] and read[0].text == "one two"
    assert [line.number for line in read] == [1, 2, 3] and read[0].audio == tmp_path / "a.wav"


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3), max_size=5))
def test_rows_come_back_as_they_were_written(rows: list[dict[str, str | int | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.jsonl"
        path.write_text("\n\n".join(json.dumps({**row, "text": "x"}) for row in rows), encoding="utf-8")
        assert list(manifest_rows(path, ["text"])) == [(2 * k + 1, {**row, "text": "x"}) for k, row in enumerate(rows)]


def test_the_fingerprint_follows_text_and_recordings(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(b"1")

    def of(**change: str) -> str:
        row = {"audio": "a.wav", "text": "one", "accent": "x"} | change
        (tmp_path / "m.jsonl").write_text(json.dumps(row))
        return fingerprint(read_manifest(tmp_path / "m.jsonl"))

    first = of()
    assert of() == first and of(text="One!") == first  # words are compared without case and punctuation
    others = [of(text="two"), of(accent="y"), of(speaker="s"), of(audio="b.wav")]
    (tmp_path / "a.wav").write_bytes(b"12")
    assert len({first, *others, of()}) == 6
