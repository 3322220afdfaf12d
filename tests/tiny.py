"""Tiny real models: random weights with peaked logits, a real BPE tokenizer, a chat template."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tests.tiny_sentencepiece import write_sentencepiece

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and 1234567890 is a number.",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    "I love this film! It was terrible, though; the plot made no sense at all :(",
    "Größe, naïve café, 你好世界, emoji 🙂🎉 and    many   spaces.",
] * 8

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None},
    "mistral_sliding": {
        "model_type": "mistral",
        "tie_word_embeddings": False,
        "sliding_window": 16,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_yarn": {
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32},
    "qwen3_sliding": {
        "model_type": "qwen3",
        "tie_word_embeddings": True,
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,  # the first attends to all
    },
    "smollm3": {
        "model_type": "smollm3",
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,  # of which the last is not rotated
    },
    "granite": {
        "model_type": "granite",
        "tie_word_embeddings": True,
        "attention_multiplier": 0.75,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "gemma2": {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 16,  # of the first layer, and every second from there
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 16,
        "sliding_window_pattern": 2,  # every second layer attends to all
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "phi3_sliding": {"model_type": "phi3", "tie_word_embeddings": False, "sliding_window": 16},
    "phi4_mini": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "sliding_window": 4096,  # beyond its context, so it is none
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 256,
        "partial_rotary_factor": 0.75,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
            "long_factor": [1.5, 2.5, 4.0, 6.0, 8.0, 9.0],
        },
    },
}
# A module of transformers' Phi3Attention and Phi3MLP -> what is in its rows, in their order.
FUSED_MODULES = {
    "self_attn.qkv_proj": [f"self_attn.{short}_proj" for short in "qkv"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
}
# Those that llama.cpp runs: its architectures of Mistral, Qwen and Phi-3 have no sliding windows.
GGUF_FAMILIES = [family for family in FAMILY_CONFIGS if not family.endswith("_sliding")]
# Those that ONNX Runtime runs: it rotates multiples of 16 dimensions, and that one has 12.
ONNX_FAMILIES = [family for family in FAMILY_CONFIGS if family != "phi4_mini"]
HELD = {"gguf": GGUF_FAMILIES, "onnx": ONNX_FAMILIES, "coreml": list(FAMILY_CONFIGS)}
EXPORTS = [(family, name) for family in FAMILY_CONFIGS for name in HELD if family in HELD[name]]


def parts_of(parameter: str) -> list[str]:
    """The student's tensors, in order, of which a parameter of transformers has the rows."""
    for fused, modules in FUSED_MODULES.items():
        if fused in parameter:
            return [parameter.replace(fused, module) for module in modules]
    return [parameter]


def write_tokenizer(directory: Path, vocab_size: int = 512) -> None:
    """A byte-level BPE tokenizer of SmolLM's kind: digits one by one, then bytes."""
    _write_byte_level(directory, vocab_size)
    _write_side_files(directory)


def _write_byte_level(directory: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    filler = [f"<|unused_{i}|>" for i in range(vocab_size - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens(filler)
    tokenizer.save(str(directory / "tokenizer.json"))


def _write_side_files(directory: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "add_bos_token": False,
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_student(directory: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random student of a family that ``transformers`` opens; returns the directory.

    The embedding is large enough for the logits to be peaked: a fault has to show.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
    }
    # transformers fills in what rope_parameters leave out, in the dictionary that it is given.
    fields |= copy.deepcopy(FAMILY_CONFIGS[family] | changes)
    gemma = fields["model_type"] in ("gemma2", "gemma3_text")
    if gemma:
        del fields["hidden_act"]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(*(_gemma_norm(name) if gemma else (0.5, 1.5)))
            elif parameter.ndim == 2:
                parameter.normal_(0.0, 0.35 if "embed" in name or "lm_head" in name else 0.12)
            else:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    if gemma:
        write_sentencepiece(directory, CORPUS, fields["vocab_size"])
        _write_side_files(directory)
    else:
        write_tokenizer(directory, fields["vocab_size"])
    return directory


def _gemma_norm(name: str) -> tuple[float, float]:
    """Of weights w where 1 + w multiplies; those behind a half let it count beside embeddings."""
    behind = "post_attention" in name or "post_feedforward" in name
    return (1.5, 3.5) if behind else (-0.5, 0.5)
