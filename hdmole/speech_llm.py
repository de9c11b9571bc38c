"""The former place of `SpeechLLM`.

Adapters saved before version 0.2 name this module in their configuration
(`auto_mapping.parent_library`).
"""

from hdmole.models.speech_llm import SpeechLLM as SpeechLLM
