"""What is wrong with something that a user gave, in one plain sentence that can be translated."""

from __future__ import annotations

from functools import partial
from typing import Any


class UserError(ValueError):
    """Something the user gave cannot be used.

    `str(error)` is the sentence with its values in place.

    Args:
        code: name of the fault for programs, such as "audio.silent"; it stays when the sentence is reworded.
        sentence: what is wrong and what to do, with `{name}` where the value `name` stands. Translations are keyed by it.
        values: the values in the sentence, by name.

    Raises:
        KeyError: the sentence has a place for which there is no value.
    """

    def __init__(self, code: str, sentence: str, /, **values: Any) -> None:
        super().__init__(sentence.format(**values))
        self.code, self.sentence, self.values = code, sentence, values

    def __reduce__(self) -> tuple[Any, ...]:  # without it, an error that crosses to another process would lose its values
        return partial(type(self), self.code, self.sentence, **self.values), ()
