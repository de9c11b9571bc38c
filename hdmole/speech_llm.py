"""The module that adapters saved before version 0.2 name in their configuration (`auto_mapping.parent_library`)."""

from hdmole.models.speech_llm import SpeechLLM as SpeechLLM
