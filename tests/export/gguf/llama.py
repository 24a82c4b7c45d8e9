"""llama.cpp itself, in this process (PyPI package xllamacpp): what it makes of a text, and what it predicts.

Attention is computed without shortcuts and with its cache in float32, on one thread, so that what differs from
transformers is the file's doing.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp


class LlamaCpp:
    """A model loaded from a GGUF file. Fails if llama.cpp does not load it."""

    def __init__(self, path: Path, context: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = 1
        params.cpuparams_batch.n_threads = 1
        params.warmup = False
        params.fit_params = False
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.use_jinja = True
        params.verbosity = 0
        self._server = xllamacpp.Server(params)
        # It answers before its loop has begun, and a server that is closed before that waits for its loop for ever.
        self._complete([0], 1, 1)

    def greedy(self, prompt: str | Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, the likeliest each time; fewer where the model ends the text."""
        return [token["id"] for token in self._complete(prompt, count, 1)]

    def log_probs(self, prompt: Sequence[int], vocab: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Log-probabilities of every token as the next one, (vocabulary,)."""
        # The server only reports on a token that it can print, which the end of the text and half a character are not.
        # So one is forced; the probabilities that are told are those without this.
        (token,) = self._complete(prompt, 1, vocab, logit_bias=[[self.tokens("a")[-1], 1000]])
        found = np.full(vocab, np.nan)
        for other in token["top_logprobs"]:
            found[other["id"]] = other["logprob"]
        assert not np.isnan(found).any()
        return found

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text; with `special`, with what the tokenizer puts around it."""
        answer = self._post("/tokenize", {"content": text, "add_special": special, "parse_special": True})
        return list(answer["tokens"])

    def chat(self, text: str) -> str:
        """A user's turn in the file's chat template, as the model reads it."""
        return str(self._post("/apply-template", {"messages": [{"role": "user", "content": text}]})["prompt"])

    def props(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self._server.listening_address}/props") as answer:
            return dict(json.load(answer))

    def _complete(
        self, prompt: str | Sequence[int], count: int, probabilities: int, **options: Any
    ) -> list[dict[str, Any]]:
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": count,
            "temperature": 0,
            "n_probs": probabilities,
            "cache_prompt": False,
            **options,
        }
        answer = self._server.handle_completions(request)
        assert "choices" in answer, answer
        found = answer["choices"][0]["logprobs"]
        return list(found["content"]) if found else []

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return dict(json.load(answer))
