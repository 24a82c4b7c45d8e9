"""What leaves raymoe: messages, logs and results, without secrets and without anything that a terminal would act on.

    RaymoeError, Problem --> for_people      every message, also one that Ray stores or that Python code prints
    say, console         --> for_people      lines and tables of the commands
    result.json          --> json_text(scrub=True)
    standard streams     --> Scrubbed        whatever else a command or a library prints

A secret is the value of an environment variable that is known to hold one, the credentials and queries of a URL in the
environment or on the command line, and what has the form of a credential. Records and cards are not scrubbed: their
URLs have no credentials by their normal form (objects/urls.py), and their other text has to stay as it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO
from urllib.parse import unquote

__all__ = ["Scrubbed", "for_people", "has_unprintable", "json_text", "printable", "remember_secrets", "scrub"]

# Variables by name, and by the end of their names; the latter with values of that many characters at least.
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ACCESS_KEY_ID")
_SECRET_NAME = re.compile(
    r"(?i)(^|_)(token|secret|passw(or)?d|access_key|access_key_id|secret_key|api_key|account_key|connection_string)$"
)
_LEAST_CHARACTERS, _LEAST_BY_NAME = 4, 8

# `//user:password@` of any scheme. A password may hold '/' and '@', so that it ends with the last '@' before a space;
# it is told from a port by not being all digits. Rather too much of an address is left out than a part of a password
# shown.
_USER_INFO = re.compile(r"(?<=//)(?:[^\s/@:]*:(?!\d+(?:[/\s]|$))[^\s'\"]*|[^\s/@]+)@")
_QUERY = re.compile(
    r"(?i)(\bX-Amz-[A-Za-z-]+|(?<=[?&;])(?:Signature|AWSAccessKeyId|GoogleAccessId|sig|[a-z_-]*token|password|secret|"
    r"api_?key))=[^\s&'\"]+"
)
_AUTHORIZATION = re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic)\s+)?[^\s'\",]+")
_KNOWN_FORMS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")

# Control characters but tab and newline, marks that reorder text, line separators, halves of characters.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# A line of a message that goes on is indented. One that is not would be taken for a message of its own.
_NEW_LINE = re.compile(r"\n(?! |$)")

_remembered: set[str] = set()


def remember_secrets(arguments: Iterable[str]) -> None:
    """Take note of the secrets in a command line: credentials and queries of its URLs, and the value of `--token`."""
    previous = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if previous == "--token" or (option == "--token" and equals):
            _remembered.add(value if option == "--token" else argument)
        _remembered.update(_secrets_of_url(argument))
        previous = argument


def scrub(text: str) -> str:
    """`text` without credentials in URLs, presigned queries, and the secrets that this process knows of."""
    for secret, name in _known_secrets():
        text = text.replace(secret, name)
    text = _QUERY.sub(r"\1=<removed>", _USER_INFO.sub("", text))
    return _KNOWN_FORMS.sub("<removed>", _AUTHORIZATION.sub(r"\1<removed>", text))


def printable(text: str) -> str:
    """`text` with the characters that a terminal acts on, or that hide or reorder others, as escapes."""
    return _UNPRINTABLE.sub(_escape, text)


def has_unprintable(text: str) -> bool:
    return _UNPRINTABLE.search(text) is not None


def for_people(text: str) -> str:
    """A message as it may be shown anywhere; a line in it that is not indented is no line of its own."""
    return _NEW_LINE.sub(r"\\n", printable(scrub(text)))


def json_text(content: Any, *, scrubbed: bool = False) -> str:
    """JSON for people and programs, one value a line; with `scrubbed`, without secrets."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    text = scrub(text) if scrubbed else text
    # Such characters can be in strings alone, where JSON has an escape for each.
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class Scrubbed:
    """A text stream that is written to without secrets; all else is the stream's own."""

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


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _known_secrets() -> list[tuple[str, str]]:
    """Secrets of this process and what is written in their place, longer ones first: one may be a part of another."""
    found = dict.fromkeys(_remembered, "<removed>")
    for name, value in os.environ.items():
        by_name = _SECRET_NAME.search(name) is not None and len(value.strip()) >= _LEAST_BY_NAME
        if by_name or (name in _SECRET_VARIABLES and len(value) >= _LEAST_CHARACTERS):
            found[value.strip()] = f"<{name}>"
        elif "://" in value:
            found.update((secret, f"<{name}>") for secret in _secrets_of_url(value))
    return sorted(found.items(), key=lambda item: -len(item[0]))


def _secrets_of_url(text: str) -> Iterator[str]:
    """Password, and values of the query, of a URL that a text holds; also as they are when they are unquoted."""
    _, scheme, rest = text.partition("://")
    if not scheme:
        return
    found: list[str] = []
    authority = rest.partition("/")[0]
    _, colon, start = authority.partition(":")
    # A password may hold '/' and '@': then it is not the authority alone that holds it.
    holders = [authority, *([rest] if colon and not start.isdigit() else [])]
    for user_info in (holder.rpartition("@")[0] for holder in holders if "@" in holder):
        found.append(user_info.partition(":")[2] if ":" in user_info else user_info)
    query = rest.partition("?")[2].partition("#")[0]
    found += [value for pair in re.split("[&;]", query) if len(value := pair.partition("=")[2]) >= _LEAST_BY_NAME]
    for secret in found:
        yield from (each for each in (secret, unquote(secret)) if len(each) >= _LEAST_CHARACTERS)
