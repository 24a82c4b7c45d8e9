"""Types, shapes and orders of tensors, as numbers; and what a reader other than llama.cpp finds in a file."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from raymoe.architectures import DenseSpec, read_spec
from raymoe.export.gguf import GgufOptions, write_gguf
from raymoe.export.gguf.encode import TensorEncoder
from raymoe.export.gguf.options import TYPES, TensorType
from raymoe.export.gguf.tensor_layout import GgufTensor, rope_factors
from raymoe.export.gguf.tensor_ops import TensorOp, interleave_order
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from tests.export.gguf.test_same_as_transformers import LLAMA3
from tests.pico import make_config, tensors_of


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_types_are_those_of_the_gguf_package(kind: TensorType) -> None:
    number = gguf.GGMLQuantizationType[kind.name.upper()]
    assert (kind.number, (kind.block, kind.block_bytes)) == (number, gguf.GGML_QUANT_SIZES[number])
    name = f"MOSTLY_{kind.name.upper()}" if kind.name != "f32" else "ALL_F32"
    assert kind.file_type == gguf.LlamaFileType[name]


def test_pairs_that_are_turned_together_become_neighbours() -> None:
    rows = np.arange(2 * 6, dtype=np.float32)[:, None] + np.zeros((1, 3), np.float32)
    turned = TensorOp(unit=6, rows=interleave_order(6))
    assert turned(rows)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    some = TensorOp(unit=6, rows=interleave_order(4, before=2))
    assert some(rows)[:, 0].tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]


def test_rope_factors_are_those_of_transformers() -> None:
    config = make_config("llama", rope_scaling=LLAMA3, head_dim=32)
    spec = read_spec(config.to_dict(), "")
    assert isinstance(spec, DenseSpec)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = spec.rope_theta ** -(np.arange(0, 32, 2) / 32)
    factors = rope_factors(spec)
    assert factors is not None and len(set(factors.tolist())) == 4  # kept, two blends, stretched
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)


def test_the_original_context_is_the_models_own_where_none_is_named() -> None:
    keys = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    named = make_config("llama", max_position_embeddings=32).to_dict() | {"rope_parameters": None}
    specs = [read_spec(named | {"rope_scaling": scaling}, "") for scaling in (LLAMA3, keys)]
    factors = [rope_factors(spec) for spec in specs if isinstance(spec, DenseSpec)]
    assert factors[0] is not None and factors[1] is not None
    np.testing.assert_array_equal(factors[0], factors[1])


def test_what_a_quantized_file_holds(merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = merged("llama", "mixtral")
    written = write_gguf(folder, tmp_path / "a-name.gguf", GgufOptions(type="q4_0"))
    reader = gguf.GGUFReader(written.path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert len(types) == written.tensors and written.size == written.path.stat().st_size
    assert {types["token_embd.weight"], types["output.weight"]} == {"Q8_0"}
    assert {types["blk.1.ffn_gate_inp.weight"], types["blk.2.attn_norm.weight"], types["output_norm.weight"]} == {"F32"}
    assert {types["blk.0.attn_k.weight"], types["blk.2.ffn_down_exps.weight"]} == {"Q4_0"}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.name"] == "a-name"
    assert (fields["llama.expert_count"], fields["llama.expert_used_count"]) == (3, 2)
    assert fields["general.size_label"].startswith("3x")
    assert len(fields["tokenizer.ggml.tokens"]) == fields["llama.vocab_size"] == 416
    assert fields["tokenizer.ggml.tokens"][400:402] == ["[PAD400]", "[PAD401]"]


def test_experts_are_stacked_in_their_order(merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = merged("llama", "mixtral")
    reader = gguf.GGUFReader(write_gguf(folder, tmp_path / "model.gguf").path)
    stacked = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    held = tensors_of(folder)
    for expert in range(3):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        np.testing.assert_array_equal(stacked[expert], held[name].numpy())


def test_rows_that_are_no_whole_blocks_stay_f16(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """32 numbers are a block: rows of 80 have to be kept in another type, rows of 64 do not."""
    written = write_gguf(zoo("llama", intermediate_size=80), tmp_path / "model.gguf", GgufOptions(type="q8_0"))
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(written.path).tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert written.warnings == ("3 tensors are f16: their rows are no multiple of 32 (blk.0.ffn_down.weight, ...)",)


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 MB pass through blocks of 1 MB."""
    monkeypatch.setattr("raymoe.export.gguf.encode._BLOCK_ELEMENTS", 1 << 18)
    shape = (4_096, 4_096)
    size = shape[0] * shape[1] * 2
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(size)
    source = SourceFile(location=str(tmp_path / "weights"), size=size)
    entry = TensorEntry(name="w", dtype="BF16", shape=shape, file=source, start=0, end=size)
    change = TensorOp(unit=64, rows=interleave_order(64))
    tensor = GgufTensor(name="w", shape=shape, type=TYPES["f16"], sources=(entry,), op=change)
    tracemalloc.start()
    with (
        SourceReader(HubOptions()) as reader,
        TensorEncoder(lambda entry: reader.chunks(entry.file, entry.start, entry.end)) as encoder,
    ):
        assert sum(len(piece) for piece in encoder.bytes_of(tensor)) == tensor.nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000_000
