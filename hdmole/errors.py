"""Errors about input, with one plain sentence that can be translated."""

from __future__ import annotations

from functools import partial
from typing import Any


class UserError(ValueError):
    """The user's input cannot be used.

    `str(error)` is the sentence with its values in place.

    Args:
        code: name of the fault for programs, such as "audio.silent". It stays the same when the
            sentence is reworded.
        sentence: what is wrong and what to do, with `{name}` in the place of the value `name`. It
            is the key of translations.
        values: the values in the sentence, by name.

    Raises:
        KeyError: the sentence has a place without a value.
    """

    def __init__(self, code: str, sentence: str, /, **values: Any) -> None:
        super().__init__(sentence.format(**values))
        self.code, self.sentence, self.values = code, sentence, values

    # keeps the values when an error is sent to another process
    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), self.code, self.sentence, **self.values), ()
