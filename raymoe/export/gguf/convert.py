"""`write_gguf`: checks everything first, then writes the file from front to back."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raymoe.architectures.moe_architecture import EMPTY_SHARED_WIDTH
from raymoe.errors import Problem, ProblemCollector, ProblemReport
from raymoe.export.gguf.choose_target import Target, choose_target
from raymoe.export.gguf.encode import TensorEncoder
from raymoe.export.gguf.input_model import InputModel, open_model
from raymoe.export.gguf.metadata import add_metadata
from raymoe.export.gguf.mixture_checks import is_zero
from raymoe.export.gguf.options import TYPES, GgufOptions, TensorType, has_gguf, option_problems
from raymoe.export.gguf.pretokenizer import KNOWN
from raymoe.export.gguf.staging_file import StagingFile, disk_space_problems, open_staging_file, output_path
from raymoe.export.gguf.tensor_layout import GgufTensor, file_tensors
from raymoe.export.gguf.vocabulary import Vocabulary, read_vocabulary
from raymoe.formatting import human_bytes
from raymoe.progress_line import ProgressLine
from raymoe.storage.locations import replaced_input
from raymoe.tensor_names import EMBEDDING

_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT: every tensor begins at a multiple
_NO_DTYPE = np.dtype(np.float32)  # the writer requires it, but uses `raw_dtype`


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A file that was written: `size` in bytes, `parameters` the numbers in its tensors."""

    path: Path
    size: int
    architecture: str
    type: str
    tensors: int
    parameters: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Conversion:
    """All that is known before the first byte is written."""

    model: InputModel
    target: Target
    vocabulary: Vocabulary
    tensors: tuple[GgufTensor, ...]
    type: TensorType
    name: str

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes + -tensor.nbytes % _ALIGNMENT for tensor in self.tensors)


def write_gguf(source: str | Path, output: str | Path, options: GgufOptions | None = None) -> GgufFile:
    """Write the checkpoint, or the merge of the config (.yaml), `source` as the GGUF file `output`.

    Raises ProblemReport with everything that is wrong, and then leaves no file.
    """
    options = options or GgufOptions()
    collector = ProblemCollector(option_problems(options))
    path = collector.run(output_path, output)
    with ExitStack() as stack:
        opened = path and open_staging_file(path, overwrite=options.overwrite)
        file = collector.run(stack.enter_context, opened) if opened else None
        model = collector.run(lambda: stack.enter_context(open_model(source, options)))
        if path is None or model is None or not has_gguf():
            raise collector.report()
        conversion = _plan_conversion(model, path, options, collector)
        assert file is not None
        model.prepare()
        progress = stack.enter_context(ProgressLine(human_bytes, total=conversion.data_bytes, quiet=options.quiet))
        with file.writing():
            _write(conversion, file, progress)
            model.check_unchanged()
            progress.stage("syncing to disk")
            file.commit()
    return GgufFile(
        path=path,
        size=path.stat().st_size,
        architecture=conversion.target.architecture.name,
        type=conversion.type.name,
        tensors=len(conversion.tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in conversion.tensors),
        warnings=(
            *model.warnings,
            *conversion.target.warnings,
            *conversion.vocabulary.warnings,
            *_pretokenizer_warnings(options),
            *_type_warnings(conversion),
        ),
    )


def _plan_conversion(model: InputModel, path: Path, options: GgufOptions, collector: ProblemCollector) -> _Conversion:
    """Raises ProblemReport with the collected problems and all others."""
    spec, name = model.spec, options.name or path.stem
    if owner := replaced_input(str(path), model.inputs):
        what = f"this is {owner}, which is read"
        collector.problems.append(Problem(where=str(path), what=what, remedy="name another file"))
    target = collector.run(
        lambda: choose_target(spec, model.rule, shared_is_empty=_shared_is_empty(model), label=model.label)
    )
    vocabulary = collector.run(
        read_vocabulary, model.files, model.config, spec.vocab, pre=options.pre, name=name, label=model.label
    )
    if collector.problems or target is None or vocabulary is None:
        raise collector.report()
    # ggml has no matrices of F64.
    own = model.weights[EMBEDDING].dtype.lower()
    kind = TYPES[(options.type or own.replace("f64", "f32")).lower()]
    conversion = _Conversion(
        model=model,
        target=target,
        vocabulary=vocabulary,
        tensors=file_tensors(spec, target, model.weights, kind),
        type=kind,
        name=name,
    )
    if problems := disk_space_problems(path, conversion.data_bytes):
        raise ProblemReport(problems)
    return conversion


def _shared_is_empty(model: InputModel) -> bool:
    """Whether the shared expert is the one of zeros that some MoE architectures need. Reads its last matrices."""
    ending = f".{model.spec.family.ffn}.shared.down"
    downs = [entry for name, entry in model.weights.items() if name.endswith(ending)]
    if not downs or any(entry.shape[-1] != EMPTY_SHARED_WIDTH for entry in downs):
        return False
    return all(is_zero(entry, model.chunks) for entry in downs)


def _pretokenizer_warnings(options: GgufOptions) -> list[str]:
    if options.pre is None or options.pre in KNOWN:
        return []
    return [
        f"--pre {options.pre}: this is not one that raymoe can detect ({', '.join(KNOWN)}); a file with a name "
        "that llama.cpp does not know can't be loaded"
    ]


def _type_warnings(conversion: _Conversion) -> list[str]:
    mismatched = [t for t in conversion.tensors if conversion.type.is_quantized and t.type.name == "f16"]
    if not mismatched:
        return []
    return [
        f"{len(mismatched)} tensors are f16: their rows are no multiple of {conversion.type.block} "
        f"({mismatched[0].name}, ...)"
    ]


def _write(conversion: _Conversion, file: StagingFile, progress: ProgressLine) -> None:
    _write_header(conversion, file.part)
    file.continue_after_header(conversion.data_bytes)
    file.append(bytes(-file.size % _ALIGNMENT))
    progress.stage("writing", conversion.data_bytes)
    with TensorEncoder(conversion.model.chunks) as encoder:
        for tensor in conversion.tensors:
            start = file.size
            for piece in encoder.bytes_of(tensor):
                file.append(piece)
                progress.add(len(piece))
            assert file.size - start == tensor.nbytes, f"{tensor.name}: {file.size - start} bytes"
            file.append(bytes(-file.size % _ALIGNMENT))


def _write_header(conversion: _Conversion, part: Path) -> None:
    """Everything before the tensors' bytes, by the gguf package."""
    import gguf

    writer = gguf.GGUFWriter(part, conversion.target.architecture.name)
    try:
        for tensor in conversion.tensors:
            number = gguf.GGMLQuantizationType(tensor.type.number)
            writer.add_tensor_info(tensor.name, tensor.shape, _NO_DTYPE, tensor.nbytes, raw_dtype=number)
        add_metadata(
            writer,
            name=conversion.name,
            spec=conversion.model.spec,
            card=conversion.model.card,
            target=conversion.target,
            tensors=conversion.tensors,
            vocabulary=conversion.vocabulary,
            kind=conversion.type,
        )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
