"""Names that every room shares: the general domain, the methods, layers and accents as people read them."""

from __future__ import annotations

GENERAL = "general"
METHOD_NAMES = {"base": "Frozen base", "lora": "LoRA", "full": "Full fine-tuning", "hdmole": "HDMoLE"}
_SHORT = {  # of layers' names, in this order
    "base_model.model.": "",
    "multi_modal_projector.": "",
    "audio_tower.": "",
    "language_model.model.": "llm.",
    "encoder.layers.": "encoder.",
    "llm.layers.": "llm.",
    "feed_forward": "ff",
    "self_attn.": "",
    "mlp.": "",
}


def layer_label(name: str) -> str:
    """A layer's short name: `layers.0.q_proj` in the projector, `encoder.0.ff1.linear1`, `llm.0.q_proj`."""
    for part, short in _SHORT.items():
        name = name.replace(part, short)
    return name


def accent_label(name: str) -> str:
    """An accent's name as it is shown: with capital letters, and without underscores."""
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


DOMAIN_LABELS = {"accent": "Accents (mean)", "general": "General", "real_digits": "Real digits", "unseen": "Unseen accents"}
# The accents of the real digits are first languages; named here for their texts.
FIRST_LANGUAGES = ("English", "Hindi", "Kannada", "Marathi", "Tamil")
