"""English texts that can be translated where they are shown."""

from __future__ import annotations

from typing import Any


class Text(str):
    """An English text that remembers what it was made of.

    It is the finished text, and can be used, saved and compared as any other.

    Args:
        sentence: the text, with `{name}` where the value `name` stands. Translations are keyed by it.
        values: the values in it, by name; texts and errors among them are translated too.
    """

    sentence: str
    values: dict[str, Any]

    def __new__(cls, sentence: str, /, **values: Any) -> Text:
        made = super().__new__(cls, sentence.format(**values) if values else sentence)
        made.sentence, made.values = sentence, values
        return made
