"""How far a model moves by the rounding of activations alone: what a runtime's arithmetic costs it.

Some models answer rounding more than others.  The judge reads its texts again with activations
rounded as runtimes round them, everything else in float32; what a correct artifact differs by is
foretold by that to a small factor (``Agreement.times``), whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedistill.session import Agreement, RoundingCost
from edgedistill.student import read_json, write_json
from edgedistill.verify.divergence import Divergence

if TYPE_CHECKING:
    from torch import Tensor

COSTS_FILE = "rounding.json"
# Of each text; a mean over some hundred positions is enough for a limit.
TOKENS = 200
INT8_BLOCK = 32  # activations of one scale in llama.cpp (Q8_0)
# Nats a token.  A model that rounding moves by more cannot be told from another one, and fails.
LARGEST_LIMIT = 0.2
# So many may be expected where none was seen (the rule of three).
FLIPS_UNSEEN = 3


def write_rounding_costs(model: Any, texts: Mapping[str, list[int]], judge: Path) -> None:
    """Measure every rounding and write ``rounding.json``.

    Args:
        model: of ``transformers``, in float32.
        texts: name -> token ids.
        judge: directory with the exact log-probabilities, ``<text>.npy`` [tokens, vocab] each.
    """
    costs = {}
    for name, rounded in (("float16", _in_float16), ("int8", _in_int8)):
        with rounded(model):
            costs[name] = _cost(model, texts, judge)._asdict()
    write_json(judge / COSTS_FILE, costs)


def fit_agreement(agreement: Agreement, judge: Path) -> Agreement:
    """The agreement of a runtime for one model: never closer, wider if rounding moves it more.

    Args:
        agreement: of the runtime.
        judge: what :func:`write_rounding_costs` wrote beside the judge's log-probabilities.
    """
    if agreement.rounding is None:
        return agreement
    cost = RoundingCost(**read_json(judge / COSTS_FILE)[agreement.rounding])
    kl_mean = min(agreement.times * cost.kl_mean, LARGEST_LIMIT)
    if kl_mean <= agreement.kl_mean:
        return agreement
    share = (cost.flips + FLIPS_UNSEEN) / cost.tokens
    top1 = min(agreement.top1, max(0.5, 1 - agreement.times * share))
    return agreement._replace(kl_mean=kl_mean, top1=top1)


def _cost(model: Any, texts: Mapping[str, list[int]], judge: Path) -> RoundingCost:
    import torch

    found = Divergence("all")
    for name, ids in texts.items():
        exact = np.load(judge / f"{name}.npy", mmap_mode="r")[:TOKENS]
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:TOKENS]])).logits[0]
        found.add(exact, torch.log_softmax(logits.double(), dim=-1).numpy())
    summary = found.summary()
    return RoundingCost(summary.kl_mean, round((1 - summary.top1) * summary.tokens), summary.tokens)


@contextmanager
def _in_float16(model: Any) -> Iterator[None]:
    """What goes into and comes out of every layer is a float16 number, weights are as they are."""
    with ExitStack() as hooks:
        for module in model.modules():
            # The model as a whole and its rotary tables stay exact, as they do in runtimes.
            if _holds_layers(module) or "Rotary" in type(module).__name__:
                continue
            hooks.callback(module.register_forward_pre_hook(_round_inputs(_to_float16)).remove)
            hooks.callback(module.register_forward_hook(_round_outputs).remove)
        yield


@contextmanager
def _in_int8(model: Any) -> Iterator[None]:
    """What goes into every matrix has 8 bits, with a scale for each block."""
    from torch import nn

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_pre_hook(_round_inputs(_to_int8)).remove)
        yield


def _holds_layers(module: Any) -> bool:
    from torch import nn

    return any(isinstance(m, nn.ModuleList) for m in module.modules())


def _round_inputs(rounded: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def hook(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_each(value, rounded) for value in inputs)

    return hook


def _round_outputs(_module: Any, _inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(_each(value, _to_float16) for value in outputs)
    return _each(outputs, _to_float16)


def _each(value: Any, rounded: Callable[[Tensor], Tensor]) -> Any:
    import torch

    return rounded(value) if torch.is_tensor(value) and value.is_floating_point() else value


def _to_float16(values: Tensor) -> Tensor:
    return values.half().float()


def _to_int8(values: Tensor) -> Tensor:
    """Codes -127..127 with a float16 scale for each block of a row, as ggml's Q8_0."""
    import torch

    width = values.shape[-1]
    block = INT8_BLOCK if width % INT8_BLOCK == 0 else width
    blocks = values.reshape(-1, block)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    codes = torch.round(blocks / torch.where(scales > 0, scales, 1)).clamp(-127, 127)
    return (codes * scales).reshape(values.shape)
