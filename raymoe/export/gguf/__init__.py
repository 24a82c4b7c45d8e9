"""Writes a merge as one GGUF file, for llama.cpp and programs built on it. Modules import the package `gguf` where they
use it.

    checkpoint or config --input_model--> InputModel   its tensors by dense names, where each one's bytes come from
    InputModel --choose_target--> Target               llama.cpp's architecture that computes the same, or why none
    both           --tensor_layout--> GgufTensor, ...      names, shapes and types of the file, before a weight is read
    tokenizer      --vocabulary--> Vocabulary
    all            --convert--> the file                   header first, then tensor by tensor

Source of names, keys and meanings: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the architectures in
llama.cpp's `src/models`.
"""

from __future__ import annotations

from raymoe.export.gguf.convert import GgufFile, write_gguf
from raymoe.export.gguf.options import GgufOptions

__all__ = ["GgufFile", "GgufOptions", "write_gguf"]
