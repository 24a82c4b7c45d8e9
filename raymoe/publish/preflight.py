"""Checks with the Hub before anything is sent: whether it accepts the card, and whether it accepts every file.

Otherwise both would fail only after the weights are sent: a refused card stops the commit, and a file that the
repository's .gitignore names is silently left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import short_list
from raymoe.publish.errors import translate_preflight_errors
from raymoe.publish.manifest import ManifestFile
from raymoe.storage.file_names import CARD_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_FILES_AT_ONCE = 256  # as many as the library sends per request
_SHOWN_CHARACTERS = 200


def check_card(card: str, api: HfApi) -> None:
    """Raise ProblemReport if the Hub refuses the card's metadata."""
    with translate_preflight_errors(CARD_NAME):
        url, payload = f"{api.endpoint}/api/validate-yaml", {"content": card, "repoType": "model"}
        status, answer, text = _post(url, payload, refusal=400)
    if status == 400:
        errors = answer.get("errors")
        listed = errors if isinstance(errors, list) else []
        reasons = [str(each.get("message")) for each in listed if isinstance(each, Mapping)]
        what = f"the Hub refuses its metadata: {'; '.join(reasons) or text or 'it does not say why'}"
        remedy = "correct the lines between '---' at its head, in the output; a merge takes them from its models' cards"
        raise ProblemReport([Problem(where=CARD_NAME, what=what, remedy=remedy)])


def check_ignored(repo: str, branch: str, files: Sequence[ManifestFile], api: HfApi) -> None:
    """Raise ProblemReport if a commit on the branch would leave out some of these files."""
    url, ignored = f"{api.endpoint}/api/models/{repo}/preupload/{quote(branch, safe='')}", []
    for start in range(0, len(files), _FILES_AT_ONCE):
        # From `sample`, the Hub tells text from weights; ignored files are found by name alone.
        payload = [{"path": f.name, "size": f.size, "sample": ""} for f in files[start : start + _FILES_AT_ONCE]]
        with translate_preflight_errors(repo):
            _, answer, _ = _post(url, {"files": payload})
        ignored += [str(by_name["path"]) for by_name in answer.get("files", ()) if by_name.get("shouldIgnore")]
    if ignored:
        what = f"the .gitignore of its branch {branch} keeps files out of a commit: {short_list(ignored, most=3)}"
        remedy = "remove the lines that match them from that file on the Hub, or push to another repository"
        raise ProblemReport([Problem(where=repo, what=what, remedy=remedy)])


def _post(url: str, payload: Mapping[str, Any], refusal: int | None = None) -> tuple[int, Mapping[str, Any], str]:
    """Status, answer and the beginning of its text; the answer is empty if it is not a JSON object. `refusal` is an
    error status that is returned too; for others, the library's errors are raised."""
    # Documented (package_reference/utilities), but not re-exported for type checkers.
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    response = http_backoff("POST", url, json=payload, headers=build_hf_headers())
    if response.status_code != refusal:
        hf_raise_for_status(response)
    try:
        answer = response.json()
    except ValueError:
        answer = {}
    text = " ".join(response.text.split())
    return response.status_code, answer if isinstance(answer, dict) else {}, text[:_SHOWN_CHARACTERS]
