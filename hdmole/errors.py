"""What is wrong with something that a user gave, in one plain sentence that can be translated."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Something the user gave cannot be used.

    Args:
        code: name of the kind of fault, such as "audio.silent"; for programs.
        sentence: what is wrong and what to do, with `{name}` where a value stands; what is translated.
        values: the values in the sentence.
    """

    def __init__(self, code: str, sentence: str, **values: Any) -> None:
        super().__init__(sentence.format(**values))
        self.code, self.sentence, self.values = code, sentence, values

    def __reduce__(self) -> tuple[Any, ...]:  # for process pools: the keywords would be lost
        return _again, (type(self), self.code, self.sentence, self.values)


def _again(kind: type[UserError], code: str, sentence: str, values: dict[str, Any]) -> UserError:
    return kind(code, sentence, **values)
