"""Options that several commands share, and the values that they give."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import parse_size

if TYPE_CHECKING:
    from raymoe.planning import MergeOptions

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Merge config (mergekit-moe's YAML schema).")]
AllSame = Annotated[
    bool,
    typer.Option(
        "--i-understand-this-is-not-useful-without-training",
        help="Allow all experts to be the same model.",
    ),
]
AllowCrimes = Annotated[
    bool,
    typer.Option("--allow-crimes/--no-allow-crimes", help="Allow experts of another model type of equal shape."),
]
TransformersCache = Annotated[
    str | None, typer.Option("--transformers-cache", help="Folder for models downloaded from the Hub.")
]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Print more; repeat for Ray's own logs.")]
Quiet = Annotated[bool, typer.Option("--quiet/--no-quiet", help="Print only warnings and errors.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster. Default: RAY_ADDRESS, else one is started here.")
]
Actors = Annotated[int | None, typer.Option("--actors", min=1, help="Most expert actors at once.")]
StallTimeout = Annotated[
    float,
    typer.Option(
        "--stall-timeout",
        metavar="MINUTES",
        min=0.05,
        help="Minutes without any progress after which a job is given to another actor.",
    ),
]
KeepUploads = Annotated[
    bool,
    typer.Option(
        "--keep-uploads/--no-keep-uploads",
        help="If the merge stops, keep the uploaded parts of unfinished shards in S3 for the run that resumes it.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu or cuda: where gates are computed. Default: on GPUs, if Ray has any."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code/--no-trust-remote-code", help="Allow a tokenizer's own code to run."),
]
TrustRecord = Annotated[
    bool,
    typer.Option(
        "--trust-record",
        help="Use the S3 endpoint and profile in the merge's record. Default: those of your environment.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class PlanArgs:
    """Options that a plan depends on: those of `raymoe plan`, which `raymoe merge` has too."""

    copy_tokenizer: Annotated[
        bool,
        typer.Option("--copy-tokenizer/--no-copy-tokenizer", help="Copy the base model's tokenizer to the output."),
    ] = True
    allow_crimes: AllowCrimes = False
    out_shard_size: Annotated[
        str, typer.Option("--out-shard-size", help="Largest shard: bytes, or 5B, 500M, 2GiB.")
    ] = "5B"
    random_seed: Annotated[int, typer.Option("--random-seed", help="Seed of random gates and of noise.")] = 0
    all_same: AllSame = False
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="Read prompts with 8-bit weights (bitsandbytes, GPU).")
    ] = False
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Read prompts with 4-bit weights (bitsandbytes, GPU).")
    ] = False
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse NaN and infinity in weights and configs; this reads every number."),
    ] = False

    def merge_options(self, *, model_card: bool = True) -> MergeOptions:
        """These options as a plan takes them. Raises ProblemReport."""
        from raymoe.planning import MergeOptions

        problems = []
        try:
            max_shard_bytes = parse_size(self.out_shard_size)
        except ValueError as error:
            problems.append(Problem(where="--out-shard-size", what=str(error)))
        if self.load_in_8bit and self.load_in_4bit:
            problems.append(Problem(where="--load-in-8bit", what="can't go with --load-in-4bit", remedy="choose one"))
        if problems:
            raise ProblemReport(problems)
        return MergeOptions(
            max_shard_bytes=max_shard_bytes,
            seed=self.random_seed,
            allow_crimes=self.allow_crimes,
            copy_tokenizer=self.copy_tokenizer,
            model_card=model_card,
            quantize_gates="8bit" if self.load_in_8bit else "4bit" if self.load_in_4bit else None,
            strict=self.strict,
        )


def parse_shard_size(size: str) -> int:
    """Bytes. Raises ProblemReport."""
    try:
        return parse_size(size)
    except ValueError as error:
        raise ProblemReport([Problem(where="--out-shard-size", what=str(error))]) from None


def parse_extracted_expert(expert: str) -> int | str:
    """The number of an expert, or the word for the shared expert. Other words are refused with the mixture."""
    return int(expert) if expert.isdecimal() else expert


def parse_device(device: str | None, *, numbered: bool = False) -> str | None:
    """`cpu`, `cuda` or None (chosen automatically). Raises ProblemReport for an unknown device and, unless `numbered`,
    for any GPU but the first visible one."""
    if device is None:
        return None
    name, colon, number = device.strip().lower().partition(":")
    if name not in ("auto", "cpu", "cuda") or (colon and (name != "cuda" or not number.isdecimal())):
        remedy = "give cpu, cuda or auto"
        raise ProblemReport([Problem(where="--device", what=f"there is no device {device!r}", remedy=remedy)])
    if colon and int(number) and not numbered:
        what = f"{device}: the first GPU that is visible is used"
        remedy = f"set CUDA_VISIBLE_DEVICES={int(number)}, and give cuda"
        raise ProblemReport([Problem(where="--device", what=what, remedy=remedy)])
    return None if name == "auto" else name


def parse_actor_device(device: str | None) -> str | None:
    """As `parse_device`, for actors. Ray assigns GPUs to actors, so a number, as in cuda:1, has no meaning here."""
    return parse_device(device, numbered=True)


def set_log_level(verbose: int) -> None:
    logging.basicConfig(level=[logging.WARNING, logging.INFO][min(verbose, 1)], format="%(message)s")
