"""Removes secrets and terminal control characters from everything that raymoe prints, logs or returns.

    RaymoeError, Problem --> safe_message      every message, also one that Ray stores or that Python code prints
    say, console         --> safe_message      lines and tables of the commands
    result.json          --> json_text(scrubbed=True)
    standard streams     --> Scrubbed        whatever else a command or a library prints

A secret is the value of an environment variable that is known to hold one, the credentials and queries of a URL in the
environment or on the command line, and what has the form of a credential. Records and cards are not scrubbed: their
URLs have no credentials by their normal form (object_store/urls.py), and their other text has to stay as it is.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote, unquote

# Variables that hold secrets, by name and by the end of their names, and the shortest values that count as secrets. A
# shorter access key id is that of a test server: not a secret, and often a word.
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
_SECRET_NAME = re.compile(
    r"(?i)((^|_)(token|secret|access_key|access_key_id|secret_key|api_key|account_key|storage_key|connection_string)"
    r"|_(pat|pwd)|passw(or)?d)$"  # PWD itself is the working directory
)
_MIN_CHARACTERS, _MIN_CHARACTERS_BY_NAME, _MIN_CHARACTERS_OF_KEY_ID = 4, 8, 16
# A shorter value may be a word (`test`): it is not a secret within a longer word or a path.
_LONG = 8

# All patterns take time in proportion to the text, since messages quote untrusted text.
#
# `//user:password@` of any scheme, in what has no spaces and no quotes, up to its last '@', which follows: a password
# may hold '/' and '@'. It is told from a port by not being digits before a path, from an address of IPv6 by the
# brackets, and from a second URL (`s3://base+s3://adapter`) by the scheme. In doubt, too much of an address is removed,
# so that no part of a password is shown.
_PASSWORD = re.compile(
    r"//(?!\[[\da-fA-F:.%]*\](?::\d+)?(?:/|\Z))(?![^/@:]*\+[a-z][a-z0-9]*://)(?=[^/@:]*:(?!\d+/(?![\d/]*\Z)))"
)
_WITHOUT_QUOTES = re.compile(r"[^\s'\"]+")
# What follows `hf://org/name@` is a revision.
_USER = re.compile(r"(?<=//)(?<!\bhf://)(?:(?<=://)[^\s/@]+|[^\s/@'\"]+)@")
_QUERY = re.compile(
    r"(?i)((?<![\w-])X-(?:Amz|Goog)-[a-z0-9-]{1,64}|(?<=[?&;])(?:Signature|AWSAccessKeyId|GoogleAccessId|sig|"
    r"[a-z_-]*token|password|secret|api_?key))=[^\s&'\"]+"
)
_AUTHORIZATION = re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic)\s+)?[^\s'\",]+")
_KNOWN_FORMS = re.compile(r"\bhf_[A-Za-z0-9]{30,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")

# Control characters except tab and newline, marks that reorder text, line separators, lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Continuation lines of a message are indented. Others would look like a message of their own.
_NEW_LINE = re.compile(r"\n(?! |$)")

MAX_CHARACTERS = 4_000
"""The maximum length of each text of a problem."""

_remembered_secrets: set[str] = set()


def remember_secrets(arguments: Iterable[str]) -> None:
    """Take note of the secrets in a command line: credentials and queries of its URLs, and the value of `--token`."""
    previous = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if previous == "--token" or (option == "--token" and equals):
            _remembered_secrets.add(value if option == "--token" else argument)
        _remembered_secrets.update(_secrets_of_url(argument))
        previous = argument


def scrub(text: str) -> str:
    """`text` without credentials in URLs, presigned queries, and the secrets known to this process."""
    for secret, name in _known_secrets(_encoded_environment(), frozenset(_remembered_secrets)):
        if secret not in text:
            continue
        if len(secret) >= _LONG:
            text = text.replace(secret, name)
        else:
            text = re.sub(rf"(?<![\w./-]){re.escape(secret)}(?![\w/-]|\.\w)", name.replace("\\", r"\\"), text)
    if "//" in text and "@" in text:
        text = _USER.sub("", _WITHOUT_QUOTES.sub(_remove_password, text))
    text = _QUERY.sub(r"\1=<removed>", text)
    return _KNOWN_FORMS.sub("<removed>", _AUTHORIZATION.sub(r"\1<removed>", text))


def shorten(text: str, most: int = MAX_CHARACTERS) -> str:
    """`text`, without its middle if it is longer than `most`, which is more than messages need."""
    if len(text) <= most:
        return text
    half = (most - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def printable(text: str) -> str:
    """`text` with escapes for control characters and for characters that hide or reorder others."""
    return _UNPRINTABLE.sub(_escape, text)


def has_unprintable(text: str) -> bool:
    return _UNPRINTABLE.search(text) is not None


def safe_message(text: str) -> str:
    """A message that is safe to show anywhere. A line break before a line that is not indented is escaped."""
    return _NEW_LINE.sub(r"\\n", printable(scrub(text)))


def json_text(content: Any, *, scrubbed: bool = False) -> str:
    """JSON with one value per line; with `scrubbed`, without secrets."""
    text = json.dumps(_scrub_content(content) if scrubbed else content, indent=2, ensure_ascii=False)
    # Such characters can be in strings alone, where JSON has an escape for each.
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class ScrubbedStream:
    """A text stream that removes secrets from what is written; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(scrub(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def scrub_streams() -> None:
    """Remove secrets from everything that this process and its libraries print to the standard streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, ScrubbedStream):
            setattr(sys, name, ScrubbedStream(stream))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _scrub_content(content: Any) -> Any:
    """What json.dumps takes, with each text scrubbed."""
    if isinstance(content, str):
        return scrub(content)
    if isinstance(content, dict):
        return {_scrub_content(key): _scrub_value(key, value) for key, value in content.items()}
    return [_scrub_content(each) for each in content] if isinstance(content, (list, tuple)) else content


def _scrub_value(key: Any, value: Any) -> Any:
    is_credential = isinstance(key, str) and isinstance(value, str) and key.lower().endswith("authorization")
    return "<removed>" if is_credential else _scrub_content(value)


def _remove_password(match: re.Match[str]) -> str:
    text = match[0]
    before, at, after = text.rpartition("@")
    found = _PASSWORD.search(before) if at else None
    return before[: found.end()] + after if found else text


def _encoded_environment() -> tuple[tuple[bytes, bytes], ...]:
    """The environment variables as os.environ stores them.

    Reading them through os.environ decodes each one, which takes longer than all else that is done to a short text.
    """
    stored: Mapping[bytes, bytes] = getattr(os.environ, "_data", None) or os.environb
    return tuple(stored.items())


@lru_cache(maxsize=1)
def _known_secrets(environment: tuple[tuple[bytes, bytes], ...], remembered: frozenset[str]) -> list[tuple[str, str]]:
    """Secrets of this process and what is written in their place, longer ones first: one may be a part of another."""
    found = dict.fromkeys(remembered, "<removed>")
    for name, value in ((os.fsdecode(name), os.fsdecode(value)) for name, value in environment):
        if len(value.strip()) >= _min_characters(name):
            found[value.strip()] = f"<{name}>"
        elif "://" in value or name.lower().endswith("_proxy"):
            url = value if "://" in value else f"http://{value}"
            found.update((secret, f"<{name}>") for secret in _secrets_of_url(url))
    # Messages quote values as Python, JSON and URLs write them.
    for secret, name in [*found.items()]:
        for form in (repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")):
            found.setdefault(form, name)
    found.pop("", None)
    return sorted(found.items(), key=lambda item: -len(item[0]))


def _min_characters(name: str) -> float:
    """The shortest value of a variable that counts as a secret."""
    if name in _SECRET_VARIABLES:
        return _MIN_CHARACTERS
    if _SECRET_NAME.search(name) is None:
        return math.inf
    return _MIN_CHARACTERS_OF_KEY_ID if name.lower().endswith("access_key_id") else _MIN_CHARACTERS_BY_NAME


def _secrets_of_url(text: str) -> Iterator[str]:
    """Password, and values of the query, of a URL that a text holds; also as they are when they are unquoted."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return
    found: list[str] = []
    authority, whole = (part.rpartition("@")[0] for part in (rest.partition("/")[0], rest))
    # A password may hold '/' and '@': then it is not in the authority alone.
    holders = [whole] if _PASSWORD.match(f"//{whole}") else []
    if ":" in authority or not scheme.endswith("hf"):
        holders.append(authority)
    for user_info in holders:
        found.append(user_info.partition(":")[2] if ":" in user_info else user_info)
    query = rest.partition("?")[2].partition("#")[0]
    found += [
        value for pair in re.split("[&;]", query) if len(value := pair.partition("=")[2]) >= _MIN_CHARACTERS_BY_NAME
    ]
    for secret in found:
        yield from (each for each in (secret, unquote(secret)) if len(each) >= _MIN_CHARACTERS)
