"""The method: gate, routing, trace, intervention, accent recogniser and the PEFT tuner.

It knows no audio, files or pages.
"""
