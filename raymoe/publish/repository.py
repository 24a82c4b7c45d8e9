"""Where a merge is pushed to: the repository and its branch, checked and made before anything is sent.

    whoami, the card --refused--> nothing is made
    repository, branch            made where they are missing, or only looked for

The check is done before a merge that is to be pushed, so it asks for all that can be known without sending weights: who
the token belongs to, whether it may write there, whether the repository is what the command says.
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
# What git refuses (git-check-ref-format).
_INVALID_BRANCH = re.compile(r"^$|[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|^@$|//|^[/.-]|/\.|[/.]$|\.lock(/|$)")
_READ_ONLY_ROLES = ("read", "no_access")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushTarget:
    """`repo` is org/name. `private` makes a new repository private, and refuses one that is public. `revision` is the
    branch (None: main), `message` the commit's first line (None: one that says what was made)."""

    repo: str
    private: bool = False
    revision: str | None = None
    message: str | None = None

    @property
    def branch(self) -> str:
        return (self.revision or _MAIN).removeprefix("refs/heads/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository of the Hub that can be pushed to. `url` is its page; `is_new`: this call has made it, or would.

    `base` is the branch that a push finds there: the target's, or main where that would yet be made from it."""

    target: PushTarget
    api: HfApi
    url: str
    is_new: bool
    base: str

    @property
    def lacks_branch(self) -> bool:
        """Whether the branch would yet be made."""
        return self.base != self.target.branch


def push_target(
    repo: str | None, *, private: bool, revision: str | None = None, message: str | None = None
) -> PushTarget | None:
    """What `--push-to-hub` and the options that go with it ask for. Raises ProblemReport."""
    if repo is None:
        given = {"--private": private, "--branch": revision is not None, "--message": message is not None}
        if lost := [option for option, is_given in given.items() if is_given]:
            what, remedy = "nothing is pushed", "name the repository with --push-to-hub org/name"
            raise ProblemReport([Problem(where=", ".join(lost), what=what, remedy=remedy)])
        return None
    return PushTarget(repo=repo, private=private, revision=revision, message=message)


def target_problems(target: PushTarget) -> list[Problem]:
    """What is wrong with a target by itself; asks nobody."""
    problems = []
    if target.repo.count("/") != 1 or not is_hub_id(target.repo):
        what = f"{target.repo!r} is no name of a repository"
        remedy = "write org/name: letters, digits, '-', '_' and '.', at most 96 characters"
        problems.append(Problem(where="push", what=what, remedy=remedy))
    if target.revision is not None and (_COMMIT.fullmatch(target.revision) or _INVALID_BRANCH.search(target.revision)):
        what = f"{target.revision!r} is no branch that could be pushed to"
        problems.append(Problem(where="push", what=what, remedy="name a branch, or leave it out for main"))
    if target.message is not None and not target.message.strip():
        what = "the commit's message is empty"
        problems.append(Problem(where="push", what=what, remedy="write one, or leave it out"))
    return problems


def source_problem(target: PushTarget, sources: Iterable[str | None], head: str | None = None) -> Problem | None:
    """The problem of a target that is one of the models of the Hub (`org/name@<commit>`) that a merge is made of: their
    files would be replaced. `head` is the commit that is there: a repository may have another name now."""
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
    """The repository, made if it is not there (or only looked for), and the branch too. Raises ProblemReport, and has
    made nothing where the token or the `card` is refused."""
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
            what = "the repository is there already, and public"
            remedy = "make it private in its settings on the Hub, leave out --private, or push to another one"
            raise ProblemReport([Problem(where=target.repo, what=what, remedy=remedy)])
        base = _base(api, target, is_new=is_new, make=make)
    return Repository(target=target, api=api, url=scrub(f"{api.endpoint}/{target.repo}"), is_new=is_new, base=base)


def _base(api: HfApi, target: PushTarget, *, is_new: bool, make: bool) -> str:
    """The branch that a push finds: the target's, made if it is missing; main where it is missing and not made."""
    if target.branch == _MAIN or target.branch.startswith("refs/"):
        return target.branch
    if make:
        api.create_branch(target.repo, branch=target.branch, exist_ok=True)
        return target.branch
    is_there = not is_new and api.revision_exists(target.repo, target.branch)
    return target.branch if is_there else _MAIN


def _account_problem(target: PushTarget, account: Mapping[str, Any], api: HfApi) -> Problem | None:
    """Why the token's account can't write there, as far as the Hub tells: fine-grained tokens are not judged here."""
    token = TOKEN_REMEDY.format(endpoint=api.endpoint)
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role in _READ_ONLY_ROLES:
        return Problem(where="push", what="the token in use is for reading only", remedy=f"use another: {token}")
    namespace = target.repo.partition("/")[0]
    name, organizations = str(account.get("name")), account.get("orgs") or []
    # The Hub takes names in any case.
    roles = {str(each.get("name")).casefold(): each.get("roleInOrg") for each in organizations}
    if role != "write" or namespace.casefold() == name.casefold():
        return None
    if namespace.casefold() not in roles:
        what = f"the token is of {name}, who is not a member of {namespace!r}"
        remedy = f"push to {name}/{target.repo.partition('/')[2]}, or use a token of a member"
        return Problem(where=target.repo, what=what, remedy=remedy)
    if roles[namespace.casefold()] in _READ_ONLY_ROLES:
        what = f"{name} may only read in {namespace!r}"
        remedy = "ask the organisation for the role 'contributor' or more"
        return Problem(where=target.repo, what=what, remedy=remedy)
    return None


def _create(api: HfApi, target: PushTarget) -> bool:
    """Make the repository; whether it was not there. Raises what the library raises."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # `private=False` would make a repository public that an organisation makes private by default.
        api.create_repo(target.repo, private=True if target.private else None, exist_ok=False)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 409:
            return False
        if status in (401, 402, 403) and api.repo_exists(target.repo):
            return False  # a token for this one repository may write to it and make no other
        raise
    return True
