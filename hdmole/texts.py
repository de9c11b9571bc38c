"""English texts that can be translated when they are shown."""

from __future__ import annotations

from typing import Any


class Text(str):
    """An English text that keeps the sentence and the values that it was made of.

    It is a string with the values in place.

    Args:
        sentence: the text, with `{name}` in the place of the value `name`. It is the key of
            translations.
        values: the values by name. Texts and errors among them are translated too.
    """

    sentence: str
    values: dict[str, Any]

    def __new__(cls, sentence: str, /, **values: Any) -> Text:
        made = super().__new__(cls, sentence.format(**values) if values else sentence)
        made.sentence, made.values = sentence, values
        return made
