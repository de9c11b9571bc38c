"""A short run of `make fuzz`."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz import CONTAINERS, mutated, outcome, whole


@pytest.mark.parametrize("container", CONTAINERS)
def test_files_of_every_container_end_in_audio_or_in_a_sentence(container: str) -> None:
    data = whole(container)
    assert outcome(data)[0] == "audio"
    for number in range(2):
        changed = mutated(data, np.random.default_rng([22, number]))
        end, _ = outcome(changed)
        assert changed != data and (end == "audio" or end.startswith("audio."))
