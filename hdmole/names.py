"""Names that all rooms share: the general domain, and labels of methods, layers and accents."""

from __future__ import annotations

from collections.abc import Sequence

GENERAL = "general"
SHARED = "shared"  # name of the shared expert, beside those of accents
METHOD_NAMES = {
    "base": "Frozen base",
    "lora": "LoRA",
    "full": "Full fine-tuning",
    "hdmole": "HDMoLE",  # with the paper's gate
    "hdmole-extended": "HDMoLE, extended",  # with that of `HDMoLEConfig.extended`
}
_SHORT = {  # parts of layer names -> what labels have instead; replaced in this order
    "base_model.model.": "",
    "multi_modal_projector.": "",
    "audio_tower.": "",
    "language_model.model.": "llm.",
    "model.encoder.layers.": "encoder.",
    "model.decoder.layers.": "decoder.",
    "encoder.layers.": "encoder.",
    "llm.layers.": "llm.",
    "feed_forward": "ff",
    "self_attn.": "",
    "mlp.": "",
}


# What people and codes call an accent -> its name in the models of this project
ACCENT_ALIASES = {
    "british": "british", "england": "british", "uk": "british", "gb": "british", "en gb": "british",
    "scotland": "scottish", "scots": "scottish", "gb sct": "scottish", "jamaican": "caribbean", "west indian": "caribbean",
    "india": "indian", "en in": "indian", "germany": "german", "de": "german", "deutsch": "german", "de de": "german",
    "spain": "spanish", "es": "spanish", "es es": "spanish", "castilian": "spanish", "france": "french", "fr": "french",
    "fr fr": "french", "china": "mandarin", "chinese": "mandarin", "zh": "mandarin", "cmn": "mandarin", "zh cn": "mandarin",
    "mandarin chinese": "mandarin", "none": GENERAL, "no accent": GENERAL,
}  # fmt: skip


def accent_named(name: str, accents: Sequence[str]) -> str:
    """Which of `accents` a name means, whatever its case, its spaces and what people call it.

    A name that means none of them stays as it is.
    """
    known = {plain_accent(accent): accent for accent in accents}
    plain = plain_accent(name)
    return known.get(plain) or known.get(ACCENT_ALIASES.get(plain, "")) or name


def plain_accent(name: str) -> str:
    """An accent's name as names are compared: in small letters, without underscores and hyphens."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").removesuffix(" accent").split())


def method_label(name: str) -> str:
    """A method's name as it is shown; the name itself if it is none of `METHOD_NAMES`."""
    return METHOD_NAMES.get(name, name)


def layer_label(name: str) -> str:
    """A layer's short name: `layers.0.q_proj` in the projector, `llm.0.q_proj` in the LLM, say."""
    for part, short in _SHORT.items():
        name = name.replace(part, short)
    return name


_PLACES = {"layers": "Layer", "encoder": "Encoder", "decoder": "Decoder", "llm": "LLM"}
_PARTS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention output", "out_proj": "attention output",
    "relative_k_proj": "position", "fc1": "feed-forward, in", "fc2": "feed-forward, out", "linear1": "feed-forward, in",
    "linear2": "feed-forward, out", "gate_proj": "feed-forward, gate", "up_proj": "feed-forward, in", "down_proj": "feed-forward, out",
    "linear_1": "first layer", "linear_2": "last layer",
}  # fmt: skip


def layer_name(label: str) -> tuple[str, int, str]:
    """A layer in plain words: its place, its number in it from 1, and its part.

    `label` is that of `layer_label`. "layers.0.fc1" is ("Layer", 1, "feed-forward, in"). The place
    is empty, and the number 0, for layers outside of a stack. Parts without a plain name stay as
    they are.
    """
    place, _, rest = label.partition(".")
    number, _, part = rest.partition(".")
    if place in _PLACES and number.isdigit() and part:
        last = part.rpartition(".")[2]
        more = f" {part[2]}" if part[:2] == "ff" and part[2:3].isdigit() else ""  # one of two feed-forward blocks
        return _PLACES[place], int(number) + 1, _PARTS.get(last, part) + more
    return "", 0, _PARTS.get(label, label)


def layer_words(label: str) -> str:
    """`layer_name` as one text: "Layer 1: feed-forward, in"."""
    place, number, part = layer_name(label)
    return f"{place} {number}: {part}" if place else part


def accent_label(name: str) -> str:
    """An accent's name as it is shown: with capital letters and without underscores.

    The shared expert stands beside the accents and is named like them.
    """
    if name == SHARED:
        return "Shared expert"
    if name != GENERAL and name in GENERAL_OF.values():  # general speech of one kind stands beside accents
        return DOMAIN_LABELS[name]
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


# domains of test speech in the order of tables; `real_...` is people and `synthetic_...` a
# synthesiser
DOMAIN_LABELS = {
    "accent": "Accents (mean)",
    "general": "General",
    "real_adults": "Real adults",
    "real_children": "Real children",
    "real_digits": "Real digits",
    "real_general": "Real general speech",
    "synthetic_accents": "Synthetic accents",
    "synthetic_general": "Synthetic general speech",
    "unseen": "Unseen accents",
}
# domain of accented speech -> the general speech that it is shown with, by the same kind of speaker
GENERAL_OF = {"accent": GENERAL, "real_adults": "real_general", "synthetic_accents": "synthetic_general"}
# The first languages that are the accents of real speakers. They are listed here because each needs
# a translation.
FIRST_LANGUAGES = (
    "Arabic", "English", "French", "German", "Greek", "Gujarati", "Hindi", "Kannada", "Korean", "Mandarin", "Marathi", "Spanish",
    "Tamil", "Telugu", "US", "Urdu",
)  # fmt: skip
