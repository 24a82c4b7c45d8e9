"""`raymoe eval OUT --tasks ...`: runs lm-evaluation-harness on a merge, with its tasks or the user's own.

The harness loads the whole model with transformers. So unlike `evaluate_merge`, this needs memory for it: on the GPU,
if there is one. All possible checks are done before it is loaded.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from raymoe.checkpoints.open_checkpoint import open_checkpoint, read_object
from raymoe.compute import choose_device, device_problems
from raymoe.errors import Problem, ProblemReport, RaymoeError, install_remedy
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions

FORMAT = 1


class HarnessFailed(RaymoeError):
    """The harness could not finish; the message has its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """`tasks` are names of tasks, groups or tags, with * and ?, or paths of task files, separated by commas.
    `include_path` is a folder with further task files. `limit`: use only the first examples of each task (0: all).
    `fewshot`: examples before each question (None: the task's own number). `device`: `cpu`, `cuda` or None (a GPU if
    there is one)."""

    tasks: str
    include_path: Path | None = None
    limit: int = 0
    fewshot: int | None = None
    batch_size: int = 1
    device: str | None = None
    trust_remote_code: bool = False

    @property
    def task_names(self) -> list[str]:
        return [name for part in self.tasks.split(",") if (name := part.strip())]


def check_data_or_tasks(
    data: Path | None, tasks: str | None, of_texts: Mapping[str, Any], of_tasks: Mapping[str, Any]
) -> Path | None:
    """The file of texts to evaluate on; None if tasks are given instead.

    `of_texts` and `of_tasks` are options, by name, that have an effect only with texts or tasks. Raises ProblemReport.
    """
    if (data is None) == (tasks is None):
        what = "nothing to evaluate on" if data is None else "--data and --tasks are two evaluations"
        remedy = "give --data FILE with labeled texts, or --tasks NAMES of lm-evaluation-harness"
        raise ProblemReport([Problem(where="raymoe eval", what=what, remedy=remedy)])
    given, other, options = ("--tasks", "--data", of_texts) if data is None else ("--data", "--tasks", of_tasks)
    if lost := [option for option, value in options.items() if value is not None]:
        what = f"has no effect with {given}"
        raise ProblemReport([Problem(where=", ".join(lost), what=what, remedy=f"leave it out, or use {other}")])
    return data


def run_harness(place: str | Path, options: HarnessOptions) -> dict[str, Any]:
    """Run tasks on the finished merge in a folder; the result is what `--json` writes.

    Raises ProblemReport before the model is loaded, and HarnessFailed afterwards.
    """
    location = _model_folder(place)
    _check_options(options)
    names, manager = _known_tasks(options)
    from lm_eval import simple_evaluate

    try:
        result: Any = simple_evaluate(
            model="hf",
            model_args={"pretrained": location, "dtype": "auto", "trust_remote_code": options.trust_remote_code},
            tasks=names,
            num_fewshot=options.fewshot,
            batch_size=options.batch_size,
            device=choose_device(options.device),
            limit=options.limit or None,
            log_samples=False,
            task_manager=manager,
        )
    except Exception as error:  # whatever a task's own code raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HarnessFailed(f"the harness stopped at tasks {', '.join(names)}: {reason}") from error
    return {
        "format": FORMAT,
        "model": str(place),
        "tasks": {
            name: {
                "version": result["versions"].get(name),
                "fewshot": result["n-shot"].get(name),
                "samples": result["n-samples"].get(name, {}).get("effective"),
                "metrics": _metrics(metrics),
            }
            for name, metrics in result["results"].items()
        },
    }


def _model_folder(place: str | Path) -> str:
    folder = open_checkpoint(place, StorageOptions())
    read_object(folder, "config.json", "there is no config.json here", "name the output of `raymoe merge`")
    location = Location.parse(place)
    if not location.kind.is_local:
        what, remedy = (
            "the harness loads models from folders on this machine",
            "copy the merge to a folder, and name that",
        )
        raise ProblemReport([Problem(where=location.text, what=what, remedy=remedy)])
    return location.text


def _check_options(options: HarnessOptions) -> None:
    problems = list(device_problems(options.device))
    if find_spec("lm_eval") is None:
        what = "lm-evaluation-harness is not installed"
        problems.append(Problem(where="--tasks", what=what, remedy=install_remedy("lm-eval")))
    if not options.task_names:
        remedy = "name tasks, such as arc_easy,hellaswag, or task files"
        problems.append(Problem(where="--tasks", what="no task is named", remedy=remedy))
    if options.include_path is not None and not options.include_path.is_dir():
        what = "there is no such folder"
        problems.append(Problem(where=f"--include-path {options.include_path}", what=what, remedy="name one"))
    problems += [
        problem for name in options.task_names if _is_file_name(name) for problem in _file_problems(Path(name))
    ]
    numbers = (
        ("--limit", options.limit, 0),
        ("--fewshot", options.fewshot, 0),
        ("--batch-size", options.batch_size, 1),
    )
    for option, number, least in numbers:
        if number is not None and number < least:
            problems.append(Problem(where=option, what=f"{number} is too small", remedy=f"give {least} or more"))
    if problems:
        raise ProblemReport(problems)


def _file_problems(path: Path) -> Iterator[Problem]:
    """Problems of a task file that can be found without the harness, which loads the model first."""
    if not path.is_file():
        yield Problem(where="--tasks", what=f"there is no file {path}", remedy="correct the path, or name a task")
        return
    try:
        content = yaml.load(path.read_text(), _TaskLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        what = f"{path} can't be read: {' '.join(str(error).split())[:200]}"
        yield Problem(where="--tasks", what=what, remedy="name a task file of lm-evaluation-harness")
        return
    if not isinstance(content, Mapping) or not {"task", "group", "tag", "include"} & content.keys():
        what = f"{path} is not a task file: it has neither the key 'task' nor 'group'"
        yield Problem(where="--tasks", what=what, remedy="name a task file of lm-evaluation-harness")


class _TaskLoader(yaml.SafeLoader):
    """Task files name functions by tags, which are ignored here."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: suffix)


def _is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _known_tasks(options: HarnessOptions) -> tuple[list[str], Any]:
    """The names of the tasks, with patterns resolved, and the harness's task manager. Raises ProblemReport."""
    from lm_eval.tasks import TaskManager

    files = [name for name in options.task_names if _is_file_name(name)]
    wanted = [name for name in options.task_names if not _is_file_name(name)]
    folder = str(options.include_path) if options.include_path else None
    # The harness's own tasks are thousands of files: they are read only if a task is not found without them.
    manager = TaskManager(include_path=folder, include_defaults=False)
    if any(not manager.match_tasks([name]) for name in wanted):
        manager = TaskManager(include_path=folder)
    problems, names = [], []
    for name in wanted:
        found = manager.match_tasks([name])
        names += found
        if not found:
            close = [] if glob.has_magic(name) else get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            remedy = f"{hint}`lm-eval ls tasks` lists them; tasks of your own need --include-path"
            problems.append(Problem(where="--tasks", what=f"there is no task {name!r}", remedy=remedy))
    if problems:
        raise ProblemReport(problems)
    return [*dict.fromkeys(names), *files], manager


def _metrics(plain: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """'acc,none' and 'acc_stderr,none' as one entry. Values that are not numbers (aliases, names) are left out."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in plain.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = plain.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        found[name] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return found
