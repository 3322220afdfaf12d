"""Train the sentiment adapter: a rank-8 LoRA on every linear layer of the student.

    python recipes/train_sentiment_adapter.py --student DIR            # train, keep the best
    python recipes/train_sentiment_adapter.py --student DIR --evaluate # score it on the suite

The loss is at one position only, the one that answers: cross-entropy of the full-vocabulary
softmax against the raters' distribution over the five label tokens. That teaches the raters'
doubt and, since the softmax is over all 49,152 tokens, moves the mass onto the labels as well.

What makes it fit two CPU cores: batches of one length have next to no padding, the LM head (a
fifth of this student) runs at the last position alone, and the tokens that every prompt starts
with are computed once a batch and shared. Float32: bfloat16 autocast pays only on CPUs with
native bfloat16 (on one without, a step took at least five times as long). On a shared machine set
OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0, or two threads mostly wait for each other.

The best checkpoint is chosen on a held-out part of the training split, never on the suite.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from sentiment_data import CHOICES, SYSTEM_PROMPT, score
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK, ALPHA = 8, 16
HELD_OUT = 320
SEED = 7


@dataclass(frozen=True)
class Example:
    """One tokenized prompt without the shared prefix, and what to answer."""

    ids: list[int]
    answer: int
    soft_label: list[float]
    weight: float
    slices: list[str]


@dataclass(frozen=True)
class Task:
    """What all prompts share: their first tokens, and the five tokens that answer."""

    prefix: list[int]
    labels: list[int]
    pad: int


def load_examples(path: Path, tokenizer: Any) -> tuple[Task, list[Example]]:
    """Render every case with the student's own chat template and cut off the common prefix."""
    cases = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    system = {"role": "system", "content": SYSTEM_PROMPT}

    def render(messages: list[dict[str, str]]) -> str:
        text = tokenizer.apply_chat_template(
            [system, *messages], tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts = [encode(render(case["messages"])) for case in cases]
    shortest = min(map(len, prompts)) - 1
    same = [len({prompt[i] for prompt in prompts}) == 1 for i in range(shortest)]
    cut = same.index(False) if False in same else shortest
    sample = render(cases[0]["messages"])
    labels = []
    for choice in CHOICES:
        *head, label = encode(sample + choice)
        if head != prompts[0]:
            raise SystemExit(f"{choice!r} is not a single token after the generation prompt")
        labels.append(label)
    examples = [
        Example(ids[cut:], c["answer"], c["soft_label"], c.get("weight", 1.0), c.get("slices", []))
        for ids, c in zip(prompts, cases, strict=True)
    ]
    return Task(prompts[0][:cut], labels, tokenizer.pad_token_id), examples


def batches(examples: Sequence[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """Batches of nearly one length, in random order; ties of length are shuffled too."""
    order = sorted(examples, key=lambda e: (len(e.ids), rng.random()))
    rows = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(rows)
    return rows


def answer_logits(model: Any, task: Task, batch: Sequence[Example]) -> torch.Tensor:
    """Logits of the whole vocabulary at each prompt's last position.

    The shared prefix runs once, with a batch of one, and its keys and values are expanded over
    the batch: the same function and the same gradient as running it for every row.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    width = max(len(e.ids) for e in batch)
    ids = torch.full((len(batch), width), task.pad)
    mask = torch.zeros((len(batch), len(task.prefix) + width), dtype=torch.long)
    for row, example in enumerate(batch):  # padded on the right: positions stay as they are
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(task.prefix) + len(example.ids)] = 1
    cache = causal.model(input_ids=torch.tensor([task.prefix]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(batch))
    positions = torch.arange(len(task.prefix), len(task.prefix) + width).expand(len(batch), -1)
    hidden = causal.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
    ).last_hidden_state
    last = torch.tensor([len(e.ids) - 1 for e in batch])
    logits = causal.lm_head(hidden[torch.arange(len(batch)), last])
    assert isinstance(logits, torch.Tensor)
    return logits


def soft_loss(logits: torch.Tensor, task: Task, batch: Sequence[Example]) -> torch.Tensor:
    """Cross-entropy of the full softmax against the raters' distribution over the labels."""
    target = torch.tensor([e.soft_label for e in batch])
    target = target / target.sum(dim=1, keepdim=True)
    return -(target * logits.float().log_softmax(-1)[:, task.labels]).sum(dim=1).mean()


@torch.inference_mode()
def predict(model: Any, task: Task, examples: Sequence[Example]) -> list[list[float]]:
    """Each example's distribution over the five labels, in the order given."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    rows: dict[int, list[float]] = {}
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        logits = answer_logits(model, task, [examples[i] for i in chosen])
        rows.update(zip(chosen, logits[:, task.labels].softmax(-1).tolist(), strict=True))
    return [rows[i] for i in range(len(examples))]


def score_examples(
    examples: Sequence[Example], rows: Sequence[Sequence[float]], weighted: bool = True
) -> dict[str, float]:
    """sentiment_data.score for examples."""
    weights = [e.weight if weighted else 1.0 for e in examples]
    return score([e.answer for e in examples], [e.soft_label for e in examples], rows, weights)


def save_adapter(model: PeftModel, out: Path) -> None:
    """Write the two adapter files in float16, without this machine's paths in them."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        config = json.loads((Path(scratch) / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(Path(scratch) / "adapter_model.safetensors")
        config["base_model_name_or_path"] = BASE_MODEL
        config["target_modules"] = sorted(config["target_modules"])  # peft keeps a set
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2, sort_keys=True)
        (out / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        half = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        part = Path(scratch) / "half.safetensors"
        save_file(half, part, metadata={"format": "pt"})
        shutil.copyfile(part, out / "adapter_model.safetensors.part")  # not its private mode
        (out / "adapter_model.safetensors.part").replace(out / "adapter_model.safetensors")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5% of steps, then a cosine down to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def epochs(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Batches without end, reshuffled each epoch."""
    rng = random.Random(SEED)
    while True:
        yield from batches(examples, size, rng)


def train(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    """Train, score the held-out part every `--every` steps, keep the best adapter in `--out`."""
    task, examples = load_examples(arguments.data / "train.jsonl", tokenizer)
    random.Random(SEED).shuffle(examples)
    held_out, examples = examples[:HELD_OUT], examples[HELD_OUT:]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    steps, best, recent = arguments.steps, -1.0, 0.0
    source = epochs(examples, arguments.batch)
    with Progress() as progress:
        bar = progress.add_task("training", total=steps)
        for step in range(steps):
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, arguments.learning_rate)
            batch = next(source)
            loss = soft_loss(answer_logits(model, task, batch), task, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
            progress.update(bar, advance=1, description=f"loss {recent:.3f}")
            if (step + 1) % arguments.every == 0 or step + 1 == steps:
                scores = score_examples(held_out, predict(model, task, held_out))
                progress.console.print(f"step {step + 1}: loss {recent:.3f}, held out {scores}")
                if scores["macro_f1"] > best:
                    best = scores["macro_f1"]
                    save_adapter(model, arguments.out)


def evaluate(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    """Score the saved adapter (or, with `--out none`, the bare student) on the suite."""
    task, examples = load_examples(arguments.data / "suite.jsonl", tokenizer)
    if str(arguments.out) != "none":
        model = PeftModel.from_pretrained(model, str(arguments.out)).merge_and_unload()
    rows = predict(model, task, examples)
    results = {
        "weighted": score_examples(examples, rows),
        "unweighted": score_examples(examples, rows, weighted=False),
    }
    for name in sorted({name for e in examples for name in e.slices}):
        chosen = [i for i, e in enumerate(examples) if name in e.slices]
        results[name] = score_examples([examples[i] for i in chosen], [rows[i] for i in chosen])
    print(json.dumps(results, indent=2))


def main() -> None:
    """Train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--student", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "sentiment")
    parser.add_argument("--out", type=Path, default=HERE / "data" / "sentiment" / "adapter")
    parser.add_argument("--evaluate", action="store_true", help="score --out on the suite")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--every", type=int, default=50, help="steps between held-out scores")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    model = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
    (evaluate if arguments.evaluate else train)(arguments, model, tokenizer)


if __name__ == "__main__":
    main()
