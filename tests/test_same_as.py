"""`runs/same_as.py` finds every difference between what two versions wrote."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pandas as pd

compare = runpy.run_path(str(Path(__file__).parent.parent / "runs" / "same_as.py"))["compare"]


def outputs(folder: Path, gate: float, wer: float, text: str) -> Path:
    folder.mkdir()
    pd.DataFrame({"gate": np.array([gate, 0.5], np.float32)}).to_parquet(folder / "trace.parquet")
    record = {"text": text, "rtf": len(folder.name), "rates": [{"wer": wer}]}
    (folder / "base.json").write_text(json.dumps(record))
    (folder / "info.txt").write_text(f"{folder}: 1.0 MB, on cpu\n{text}\n")
    return folder


def test_equal_outputs_have_no_difference_whatever_the_time_they_took(tmp_path: Path) -> None:
    assert compare(outputs(tmp_path / "before", 0.25, 1.5, "a"), outputs(tmp_path / "after", 0.25, 1.5, "a")) == []


def test_one_bit_of_a_trace_a_rate_and_a_word_are_found(tmp_path: Path) -> None:
    before = outputs(tmp_path / "before", 0.25, 1.5, "a")
    after = outputs(tmp_path / "after", float(np.nextafter(np.float32(0.25), np.float32(1))), 1.6, "b")
    assert compare(before, after) == [
        "base.json/text: 'a' became 'b'",
        "base.json/rates/0/wer: 1.5 became 1.6",
        "info.txt differs",
        "trace.parquet: column gate differs",
    ]


def test_what_is_gone_is_a_difference_and_what_is_new_is_none(tmp_path: Path) -> None:
    before, after = outputs(tmp_path / "before", 0.25, 1.5, "a"), outputs(tmp_path / "after", 0.25, 1.5, "a")
    pd.DataFrame({"gate": np.array([0.25, 0.5], np.float32), "segment": 0}).to_parquet(after / "trace.parquet")
    (after / "new.txt").touch()
    assert compare(before, after) == []
    (before / "routers.json").write_text(json.dumps({"routers": {"combined": 1, "local": 2}}))
    (after / "routers.json").write_text(json.dumps({"routers": {"gate": 1, "local_probability": 3}}))
    assert compare(before, after) == ["routers.json/routers/local: 2 became 3"]  # renamed since, and compared
    (after / "routers.json").write_text((before / "routers.json").read_text())
    (after / "base.json").write_text(json.dumps({"text": "a", "rates": []}))
    (after / "info.txt").unlink()
    assert compare(before, after) == ["base.json/rates: [{'wer': 1.5}] became []", "info.txt is missing"]
