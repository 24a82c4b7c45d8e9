"""Reads the small files of a tokenizer without transformers, which would import torch.

    tokenizer_config.json   auto_map: modules of the same folder, which travel with the tokenizer, and what they import
    tokenizer.json          tokens by id: whether any is past the embedding's rows; the tokens of a prompt

A tokenizer with its own code is useless without that code, so the code is copied with the tokenizer's other files.
Copying does not run it; only --trust-remote-code does.
"""

from __future__ import annotations

import collections
import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from raymoe.errors import CheckpointError, Problem, ProblemReport
from raymoe.sources.facts import ModelFacts, SideFile, SourceFile
from raymoe.untrusted_files import read_json

ReadFile = Callable[[SourceFile], bytes]

_CONFIG, _TOKENIZER, _SPECIAL = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"
_CLASSES_WITHOUT_BOS = ("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_RELATIVE_IMPORT = re.compile(r"^[ \t]*(?:from|import)[ \t]+\.(\w+)", re.MULTILINE)
_MAX_CODE_BYTES = 1 << 20
_CHECK_TOKENIZER = "check the tokenizer files of base_model"
_NAMED = 5  # how many missing modules a message names


def with_tokenizer_code(facts: ModelFacts, read: ReadFile) -> ModelFacts:
    """The facts with the tokenizer's own code among the side files, and warnings about code in other places."""
    modules, repositories = tokenizer_code(_json(facts.side_files, _CONFIG, read))
    beside = {side.name.removesuffix(".py"): side for side in facts.python_files}
    found: dict[str, SideFile] = {}
    missing: dict[str, None] = {}
    waiting = collections.deque(modules)
    while waiting:
        name = waiting.popleft()
        if name in found or name in missing:
            continue
        if name not in beside:
            missing[name] = None
            continue
        found[name] = beside[name]
        waiting += dict.fromkeys(_RELATIVE_IMPORT.findall(_code(beside[name].file, read)))
    where = f"{facts.label}: its tokenizer (tokenizer_config.json: auto_map)"
    warnings = [
        f"{where} needs {name}.py, which is not there: its own code can't be loaded" for name in [*missing][:_NAMED]
    ]
    if len(missing) > _NAMED:
        warnings.append(f"{where} needs {len(missing) - _NAMED} more modules, which are not there")
    warnings += [f"{where} has code of {name} on the Hub, which trust_remote_code=True runs" for name in repositories]
    return replace(
        facts,
        side_files=tuple(sorted((*facts.side_files, *found.values()), key=lambda side: side.name)),
        warnings=(*facts.warnings, *warnings),
    )


@contextlib.contextmanager
def tokenizer_folder(files: Mapping[str, Path]) -> Iterator[Path]:
    """A temporary folder with links to a tokenizer's files, by their names in the folder of its model."""
    with tempfile.TemporaryDirectory(prefix="raymoe-tokenizer-") as root:
        # transformers keeps a copy of the code that it runs, named by the folder that the code came from.
        code = xxhash.xxh3_64()
        for name in sorted(name for name in files if name.endswith(".py")):
            code.update(files[name].read_bytes())
        folder = Path(root) / f"tokenizer_{code.hexdigest()}"
        folder.mkdir()
        for name, path in files.items():
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        yield folder


def with_bos(text: str, bos: str) -> str:
    """A prompt with the BOS token before it, unless it already begins with it."""
    return text if text.startswith(bos) else bos + text


def with_one_bos(text: str, bos: str) -> str:
    """A template's text with exactly one BOS token, at its start: the template may write it after blanks, twice, or not
    at all."""
    rest = text
    while bos and (stripped := rest.lstrip()).startswith(bos):
        rest = stripped.removeprefix(bos)
    return bos + rest


def tokenizer_code(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(modules next to the tokenizer, repositories of the Hub) with code that a tokenizer_config.json names."""
    auto_map = settings.get("auto_map")
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, Mapping) else auto_map
    modules, repositories = [], []
    for reference in named if isinstance(named, list) else [named]:
        if not isinstance(reference, str):
            continue
        repository, is_elsewhere, name = reference.rpartition("--")
        if is_elsewhere:
            repositories.append(repository)
        elif re.fullmatch(r"\w+", name.partition(".")[0]):
            modules.append(name.partition(".")[0])
    return list(dict.fromkeys(modules)), list(dict.fromkeys(repositories))


@contextlib.contextmanager
def tokenizer_guard(where: str, what: str, remedy: str = "") -> Iterator[None]:
    """Raise ProblemReport for any exception that a tokenizer raises in the block.

    A tokenizer's files may hold anything, and tokenizers and transformers trust them: they raise bare Exceptions. A
    panic in the Rust code of tokenizers is not an Exception: it derives from BaseException, like KeyboardInterrupt.

    Args:
        where: The file or the model that the message names.
        what: What could not be done. The message adds the library's own text.
        remedy: What to do about it.

    Raises:
        ProblemReport: For any Exception and any panic. A ProblemReport of the block stays as it is.

    Example:
        >>> with tokenizer_guard("model/tokenizer.json", "it can't read a text", "check the file"):
        ...     tokenizer.encode(text)
    """
    try:
        yield
    except ProblemReport:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ProblemReport([Problem(where=where, what=f"{what}: {text}", remedy=remedy)]) from error


@dataclass(frozen=True)
class TokenizerFacts:
    """`tokens` are texts by id, None if the files do not show them all. `content` is tokenizer.json at `where`.

    `has_code`: the tokenizer's own code decides how a text is tokenized. `bos` is the BOS token, "" if there is none,
    None if only the tokenizer's class knows it.
    """

    tokens: Mapping[int, str] | None
    has_code: bool
    bos: str | None
    content: bytes
    where: str = "base_model"

    def may_exceed(self, rows: int) -> bool:
        """Whether a text can have token ids beyond this many rows of an embedding, as far as the files show it."""
        return self.tokens is None or self.has_code or self._largest_id >= rows

    @cached_property
    def _largest_id(self) -> int:
        return max(self.tokens or (), default=0)

    def encoder(self) -> Callable[[str], list[int]] | None:
        """A function that gives the token ids of a text, with BOS first; None if only transformers can tokenize it.

        Raises ProblemReport if tokenizer.json can't be read. The function raises it for a text that can't be read.
        """
        if self.has_code or not self.content:
            return None
        tokenizer = plain_tokenizer(self.content, self.where)
        if self.tokens is None:
            return None

        def encode(text: str) -> list[int]:
            with tokenizer_guard(self.where, f"the tokenizer can't read the text {text[:40]!r}", _CHECK_TOKENIZER):
                return list(tokenizer.encode(text, add_special_tokens=False).ids)

        return encode


def plain_tokenizer(content: bytes, where: str) -> Any:
    """The tokenizer of a tokenizer.json, without truncation and padding, whatever the file says: transformers uses them
    only on request. Raises ProblemReport if the tokenizers library can't read the file at `where`."""
    with tokenizer_guard(where, "the tokenizer can't be read", _CHECK_TOKENIZER):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(content.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def tokenizer_facts(files: Sequence[SideFile], read: ReadFile) -> TokenizerFacts:
    """The facts from a tokenizer's files. Raises CheckpointError if a file can't be read; a damaged file shows
    nothing."""
    settings = _json(files, _CONFIG, read)
    side = next((side for side in files if side.name == _TOKENIZER), None)
    content, where = (read(side.file), side.file.location) if side is not None else (b"", "base_model")
    tokens: dict[int, str] | None = None
    try:
        parsed = read_json(content) if content else {}
        tokens = dict(_tokens(parsed, settings)) if parsed else None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        pass
    has_code = any(tokenizer_code(settings))
    bos = _bos(settings, _json(files, _SPECIAL, read))
    return TokenizerFacts(tokens, has_code, bos or None if has_code else bos, content, where)


def _bos(settings: Mapping[str, Any], special: Mapping[str, Any]) -> str | None:
    """The BOS token as in `TokenizerFacts`. A class may have one that the files do not name, such as Llama's."""
    named = [settings.get("bos_token"), special.get("bos_token")]  # older tokenizers have a separate file
    for token in named:
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            return text
    return "" if "bos_token" in settings or settings.get("tokenizer_class") in _CLASSES_WITHOUT_BOS else None


def _tokens(parsed: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    vocab = parsed["model"]["vocab"]
    if isinstance(vocab, Mapping):
        yield from ((int(number), str(text)) for text, number in vocab.items())
    else:  # a unigram model: pairs of text and score
        yield from ((number, str(piece[0])) for number, piece in enumerate(vocab))
    yield from ((int(token["id"]), str(token["content"])) for token in parsed.get("added_tokens") or ())
    added = settings.get("added_tokens_decoder") or {}
    yield from ((int(number), str(token["content"])) for number, token in added.items())


def _json(files: Sequence[SideFile], name: str, read: ReadFile) -> Mapping[str, Any]:
    """A JSON object among the files; empty if it is missing or damaged, which loading the tokenizer reports."""
    side = next((side for side in files if side.name == name), None)
    try:
        content = read_json(read(side.file)) if side is not None else {}
    except ValueError:
        return {}
    return content if isinstance(content, Mapping) else {}


def _code(file: SourceFile, read: ReadFile) -> str:
    if file.size > _MAX_CODE_BYTES:
        return ""
    try:
        return read(file).decode(errors="replace")
    except CheckpointError:
        return ""
