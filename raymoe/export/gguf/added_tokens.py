"""Added tokens, which are found in a text before it is split: special tokens, and tokens that were added later.

A tokenizer.json contains them. With a tokenizer.model, they are listed in two more files. Both are read, and must agree
on the text of each id. transformers may strip spaces around them; llama.cpp does so only for models with certain names
(`strip_warnings`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.errors import Problem, ProblemReport, first_few
from raymoe.formatting import short_list
from raymoe.untrusted_files import check_size, read_json

TOKENIZER_FILES_REMEDY = "add the tokenizer files of the base model to the checkpoint's folder"
_BY_TEXT = "added_tokens.json"
_BY_ID = "added_tokens_decoder"
_NAMED = 5  # of many problems
# If the model's name contains one of these, llama.cpp strips the space after all special tokens but three, and does not
# load a file that lacks one of the four tokens below. Source: "set attributes by model/tokenizer/architecture name" in
# its src/llama-vocab.cpp.
_PHI3 = ("phi-3", "phi3")
_PHI3_KEPT_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_PHI3_NEEDS = frozenset({*_PHI3_KEPT_SPACES, "</s>"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """`lstrip` and `rstrip`: the space before or after it is stripped."""

    number: int
    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


def read_added_tokens(tokenizer: Mapping[str, Any]) -> list[AddedToken]:
    """Those of a tokenizer.json."""
    return [_token(added["id"], added) for added in tokenizer.get("added_tokens") or ()]


def read_added_token_files(files: Mapping[str, Path], config: Mapping[str, Any]) -> list[AddedToken]:
    """Those of a folder without tokenizer.json: `added_tokens.json`, and `added_tokens_decoder` of the tokenizer's
    config, which has more details. Raises ProblemReport for invalid entries, and for two texts under one id.
    """
    found: dict[int, AddedToken] = {}
    problems: list[Problem] = []
    special = set(_special_texts(config))
    for where, token in _read_entries(files, config, special):
        if len(problems) > _NAMED:
            break
        if token is None:
            what = f"{_BY_TEXT if where.endswith(_BY_TEXT) else _BY_ID} has an entry that is not a token with an id"
            problems.append(Problem(where=where, what=what, remedy=TOKENIZER_FILES_REMEDY))
            continue
        known = found.get(token.number)
        if known is not None and known.text != token.text:
            problems.append(conflicting_texts_problem(where, token.number, known.text, token.text))
        found[token.number] = token
    if problems:
        raise ProblemReport(first_few(problems, _NAMED))
    return list(found.values())


def conflicting_texts_problem(where: str, number: int, first: str, second: str) -> Problem:
    remedy = "leave the right one: the files are of two tokenizers, or one of them was edited"
    return Problem(where=where, what=f"token {number} is both {first!r} and {second!r}", remedy=remedy)


def _read_entries(
    files: Mapping[str, Path], config: Mapping[str, Any], special: Collection[str]
) -> Iterator[tuple[str, AddedToken | None]]:
    """(file, token) of all entries; None for one that is not a token."""
    if path := files.get(_BY_TEXT):
        for text, number in read_object(path).items():
            yield str(path), _parse_entry(number, {"content": text}, special)
    by_id = config.get(_BY_ID) or {}
    for number, entry in by_id.items() if isinstance(by_id, Mapping) else [(None, by_id)]:
        whole = int(number) if isinstance(number, str) and number.isdecimal() else None
        yield str(files["tokenizer_config.json"]), _parse_entry(whole, entry, special)


def _parse_entry(number: Any, entry: Any, special: Collection[str]) -> AddedToken | None:
    is_token = isinstance(entry, Mapping) and isinstance(entry.get("content"), str)
    if not is_token or not isinstance(number, int) or isinstance(number, bool) or number < 0:
        return None
    return _token(number, {**entry, "special": entry.get("special") or entry["content"] in special})


def _token(number: int, entry: Mapping[str, Any]) -> AddedToken:
    flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip")}
    return AddedToken(number=number, text=entry["content"], **flags)


def _special_texts(config: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens in the tokenizer's config: `bos_token` and similar keys, and lists of others."""
    for key, value in config.items():
        if not key.endswith(("_token", "_special_tokens")):
            continue
        for entry in value if isinstance(value, list) else [value]:
            text = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(text, str):
                yield text


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; raises ProblemReport for any other file."""
    try:
        check_size(path.stat().st_size)
        content = read_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ProblemReport(
            [Problem(where=str(path), what=f"can't be read: {error}", remedy=TOKENIZER_FILES_REMEDY)]
        ) from None
    if not isinstance(content, dict):
        raise ProblemReport([Problem(where=str(path), what=f"this is no {path.name}", remedy=TOKENIZER_FILES_REMEDY)])
    return content


# --- how llama.cpp treats the space around them


def name_problems(name: str, texts: Collection[str], label: str) -> list[Problem]:
    """Problems if llama.cpp would not load a file with this name. `texts` are those of all tokens."""
    missing = sorted(_PHI3_NEEDS - set(texts))
    if not _is_phi3(name) or not missing:
        return []
    what = f"llama.cpp takes the name {name!r} for Phi-3's, and loads no such file without {', '.join(missing)}"
    return [Problem(where=label, what=what, remedy="give it a name without phi-3: --name NAME, or another file name")]


def strip_warnings(
    added: Sequence[AddedToken], special: Collection[str], texts: Collection[str], name: str
) -> list[str]:
    """Tokens around which transformers and llama.cpp differ. `special` are the texts of all added tokens."""
    left = [token.text for token in added if token.lstrip]
    right = {token.text for token in added if token.rstrip}
    phi3 = (set(special) | {"</s>"}) - _PHI3_KEPT_SPACES
    warnings = []
    if left:
        warnings.append(f"space before {short_list(left)} is stripped in transformers, and kept in llama.cpp")
    if stays := right - (phi3 if _is_phi3(name) else set()):
        text = f"space after {short_list(sorted(stays))} is stripped in transformers, and kept in llama.cpp"
        if right == phi3 and set(texts) >= _PHI3_NEEDS:
            text += "; a --name with phi-3 in it makes llama.cpp do the same"
        warnings.append(text)
    if _is_phi3(name) and (goes := phi3 - right):
        warnings.append(
            f"the name {name!r} makes llama.cpp strip the space after {short_list(sorted(goes))}, which "
            "transformers keeps: use a --name without phi-3 in it"
        )
    return warnings


def _is_phi3(name: str) -> bool:
    return any(part in name.lower() for part in _PHI3)
