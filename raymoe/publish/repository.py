"""The target of a push: the repository and its branch, checked and created before anything is sent.

    whoami, the card --refused--> nothing is created
    repository, branch            created if they are missing, or only looked up

The check is done before a merge that is to be pushed, so it covers all that can be known without sending weights: the
account of the token, its write access, and whether the repository is what the command says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymoe.errors import Problem, ProblemReport
from raymoe.publish.errors import TOKEN_REMEDY, translate_preflight_errors
from raymoe.publish.preflight import check_card
from raymoe.safe_text import scrub
from raymoe.sources.hub import HubOptions, is_hub_id

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Names that git refuses (git-check-ref-format).
_INVALID_BRANCH = re.compile(r"^$|[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|^@$|//|^[/.-]|/\.|[/.]$|\.lock(/|$)")
_READ_ONLY_ROLES = ("read", "no_access")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushTarget:
    """`repo` is org/name. `private` makes a new repository private, and refuses one that is public. `revision` is the
    branch (None: main), `message` the commit's first line (None: a default that describes the merge)."""

    repo: str
    private: bool = False
    revision: str | None = None
    message: str | None = None

    @property
    def branch(self) -> str:
        return (self.revision or _MAIN).removeprefix("refs/heads/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository of the Hub that can be pushed to. `url` is its page; `is_new`: this call has created it, or would.

    `base` is the branch that a push compares with: the target's, or main if the target's would be created from it."""

    target: PushTarget
    api: HfApi
    url: str
    is_new: bool
    base: str

    @property
    def lacks_branch(self) -> bool:
        """Whether the branch is still to be created."""
        return self.base != self.target.branch


def push_target(
    repo: str | None, *, private: bool, revision: str | None = None, message: str | None = None
) -> PushTarget | None:
    """The target of `--push-to-hub` and its options. Raises ProblemReport."""
    if repo is None:
        given = {"--private": private, "--branch": revision is not None, "--message": message is not None}
        if lost := [option for option, is_given in given.items() if is_given]:
            what, remedy = "nothing is pushed", "name the repository with --push-to-hub org/name"
            raise ProblemReport([Problem(where=", ".join(lost), what=what, remedy=remedy)])
        return None
    return PushTarget(repo=repo, private=private, revision=revision, message=message)


def target_problems(target: PushTarget) -> list[Problem]:
    """Problems of a target that are found without a request to the Hub."""
    problems = []
    if target.repo.count("/") != 1 or not is_hub_id(target.repo):
        what = f"{target.repo!r} is not a repository name"
        remedy = "write org/name: letters, digits, '-', '_' and '.', at most 96 characters"
        problems.append(Problem(where="push", what=what, remedy=remedy))
    if target.revision is not None and (_COMMIT.fullmatch(target.revision) or _INVALID_BRANCH.search(target.revision)):
        what = f"{target.revision!r} is not a valid branch name"
        problems.append(Problem(where="push", what=what, remedy="name a branch, or leave it out for main"))
    if target.message is not None and not target.message.strip():
        what = "the commit's message is empty"
        problems.append(Problem(where="push", what=what, remedy="write one, or leave it out"))
    return problems


def source_problem(target: PushTarget, sources: Iterable[str | None], head: str | None = None) -> Problem | None:
    """The problem of a target that is also a source of the merge (`org/name@<commit>`), since its files would be
    replaced. `head` is the target's commit: it finds a source repository that was renamed."""
    if target.branch != _MAIN:
        return None
    for source in sources:
        repo, _, commit = (source or "").partition("@")
        if _COMMIT.fullmatch(commit) and (repo.casefold() == target.repo.casefold() or commit == head):
            what = f"this is the repository of {repo}, which the merge is made of: its files would be replaced"
            remedy = "push to another one, or with --branch to a branch of this one"
            return Problem(where=target.repo, what=what, remedy=remedy)
    return None


def open_repository(target: PushTarget, hub: HubOptions, *, make: bool = True, card: str | None = None) -> Repository:
    """The repository and its branch, created if they are missing (or only looked up, without `make`). Raises
    ProblemReport; if the token or the `card` is refused, nothing has been created."""
    from huggingface_hub import HfApi

    if problems := target_problems(target):
        raise ProblemReport(problems)
    api = HfApi(endpoint=hub.endpoint)
    with translate_preflight_errors("push"):
        account = api.whoami()
    if problem := _account_problem(target, account, api):
        raise ProblemReport([problem])
    if card is not None:
        check_card(card, api)
    with translate_preflight_errors(target.repo):
        is_new = _create(api, target) if make else not api.repo_exists(target.repo)
        if target.private and not (is_new or api.model_info(target.repo).private):
            what = "the repository exists already, and is public"
            remedy = "make it private in its settings on the Hub, leave out --private, or push to another one"
            raise ProblemReport([Problem(where=target.repo, what=what, remedy=remedy)])
        base = _base(api, target, is_new=is_new, make=make)
    return Repository(target=target, api=api, url=scrub(f"{api.endpoint}/{target.repo}"), is_new=is_new, base=base)


def _base(api: HfApi, target: PushTarget, *, is_new: bool, make: bool) -> str:
    """The branch that a push compares with: the target's, created if it is missing; main if it is missing and not
    created."""
    if target.branch == _MAIN or target.branch.startswith("refs/"):
        return target.branch
    if make:
        api.create_branch(target.repo, branch=target.branch, exist_ok=True)
        return target.branch
    is_there = not is_new and api.revision_exists(target.repo, target.branch)
    return target.branch if is_there else _MAIN


def _account_problem(target: PushTarget, account: Mapping[str, Any], api: HfApi) -> Problem | None:
    """Why the token's account can't write there, as far as the Hub says. Fine-grained tokens are not checked here."""
    token = TOKEN_REMEDY.format(endpoint=api.endpoint)
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role in _READ_ONLY_ROLES:
        return Problem(where="push", what="the token in use is read-only", remedy=f"use another: {token}")
    namespace = target.repo.partition("/")[0]
    name, organizations = str(account.get("name")), account.get("orgs") or []
    # The Hub ignores the case of names.
    roles = {str(each.get("name")).casefold(): each.get("roleInOrg") for each in organizations}
    if role != "write" or namespace.casefold() == name.casefold():
        return None
    if namespace.casefold() not in roles:
        what = f"the token belongs to {name}, which is not a member of {namespace!r}"
        remedy = f"push to {name}/{target.repo.partition('/')[2]}, or use a token of a member"
        return Problem(where=target.repo, what=what, remedy=remedy)
    if roles[namespace.casefold()] in _READ_ONLY_ROLES:
        what = f"{name} may only read in {namespace!r}"
        remedy = "ask the organization for the role 'contributor' or more"
        return Problem(where=target.repo, what=what, remedy=remedy)
    return None


def _create(api: HfApi, target: PushTarget) -> bool:
    """Create the repository. Returns whether it was missing. Raises the library's errors."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # `private=False` would make a repository public even if the organization's default is private.
        api.create_repo(target.repo, private=True if target.private else None, exist_ok=False)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 409:
            return False
        if status in (401, 402, 403) and api.repo_exists(target.repo):
            return False  # a token for only this repository may write to it, but not create repositories
        raise
    return True
