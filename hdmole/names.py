"""Names that all rooms share: the general domain, and labels of methods, layers and accents."""

from __future__ import annotations

GENERAL = "general"
METHOD_NAMES = {"base": "Frozen base", "lora": "LoRA", "full": "Full fine-tuning", "hdmole": "HDMoLE"}
_SHORT = {  # parts of layer names -> what labels have instead; replaced in this order
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
    """A layer's short name: `layers.0.q_proj` in the projector, `llm.0.q_proj` in the LLM, say."""
    for part, short in _SHORT.items():
        name = name.replace(part, short)
    return name


def accent_label(name: str) -> str:
    """An accent's name as it is shown: with capital letters and without underscores."""
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


DOMAIN_LABELS = {"accent": "Accents (mean)", "general": "General", "real_digits": "Real digits", "unseen": "Unseen accents"}
# The first languages that are the accents of the real digits. They are listed here because each
# needs a translation.
FIRST_LANGUAGES = ("English", "Hindi", "Kannada", "Marathi", "Tamil")
