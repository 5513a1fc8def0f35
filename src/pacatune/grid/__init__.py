"""Weights of quantised files: what their elements can be, and the file that is trained and served.

`formats` is the table of formats, `gguf` the file of llama.cpp; `patch/packed.py` writes adapters
into it.
"""
