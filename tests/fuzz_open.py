"""Open damaged artifacts one after the other, in a process of its own, which a crash may end.

``python -m tests.fuzz_open FORMAT ARTIFACT COUNT SEED`` damages one file of the artifact (a copy
that it may write to), opens it through the runtime, reads a few tokens, and puts the file back.
It prints how many were refused and how many were read; anything but an ``EdgedistillError`` ends it
with a traceback, and the damage stays in the artifact.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgedistill.errors import EdgedistillError
from edgedistill.plugins import load_plugin
from edgedistill.session import Runtime
from edgedistill.verify.lint import read_stated
from tests.artifact_tensors import CORE_ML
from tests.damage import KINDS, NUMBERS, Blow, damage

CONTEXT = 64
SECONDS_EACH = 30
MEMORY_BYTES = 4 << 30
# The file that says most is damaged most.
FILES = {
    "gguf": ["model.gguf"],
    "onnx": ["model.onnx"] * 6 + ["genai_config.json", "model.onnx.data"],
    "coreml": [f"{CORE_ML}/model.mlmodel"] * 6
    + ["model.mlpackage/Manifest.json", f"{CORE_ML}/weights/weight.bin"],
}
WORDS = ("", "x", "\0", "../x", "input_ids", "float16", "ä" * 300)


def main(format_name: str, artifact: Path, count: int, seed: int) -> None:
    runtime = load_plugin("runtimes", load_plugin("exporters", format_name).runtime)()
    kept = {name: (artifact / name).read_bytes() for name in set(FILES[format_name])}
    source, refused = random.Random(seed), 0
    with runtime.open(artifact, context_tokens=CONTEXT, threads=1) as session:
        session.prefill([1, 2, 3])
    _limit_memory()
    for number in range(count):
        name = source.choice(FILES[format_name])
        (artifact / name).write_bytes(_damaged(name, kept[name], source))
        faulthandler.dump_traceback_later(SECONDS_EACH, exit=True)
        try:
            refused += _is_refused(runtime, format_name, artifact)
        except BaseException:
            print(f"input {number}, {name}", file=sys.stderr)
            raise
        faulthandler.cancel_dump_traceback_later()
        (artifact / name).write_bytes(kept[name])
    print(refused, count - refused)


def _is_refused(runtime: Runtime, format_name: str, artifact: Path) -> bool:
    """Whether the runtime refuses it; the lint may, too, or read what the runtime does not."""
    with suppress(EdgedistillError):
        read_stated(artifact, format_name)
    try:
        with runtime.open(artifact, context_tokens=CONTEXT, threads=1) as session:
            session.prefill([1, 2, 3])
            session.step(4)
    except EdgedistillError:
        return True
    return False


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _damaged(name: str, whole: bytes, source: random.Random) -> bytes:
    message = _message(name)
    if message is None or source.random() < 0.3:
        blows = [
            Blow(source.choice(KINDS), source.random(), source.randrange(2**16))
            for _ in range(source.randint(1, 3))
        ]
        return damage(whole, blows)
    message.ParseFromString(whole)
    for _ in range(source.randint(1, 2)):
        _damage_message(message, source)
    changed: bytes = message.SerializePartialToString()
    return changed


def _message(name: str) -> Any:
    """The empty protobuf message of a file, if it is one."""
    if name.endswith(".onnx"):
        import onnx

        return onnx.ModelProto()
    if name.endswith(".mlmodel"):
        from edgedistill.quiet_coremltools import import_coremltools

        return import_coremltools("coremltools.proto.Model_pb2").Model()
    return None


def _damage_message(message: Any, source: random.Random) -> None:
    """Change one field, anywhere in the message."""
    parent, field, value = source.choice(list(_places(message)))
    if hasattr(value, "items"):
        del value[source.choice(list(value))]
    elif hasattr(value, "append"):
        place = source.randrange(len(value))
        if hasattr(value[place], "ListFields"):
            if source.random() < 0.5:
                del value[place]
            else:
                value.add().CopyFrom(value[source.randrange(len(value))])
        elif source.random() < 0.3:
            del value[place]
        else:
            value[place] = _junk(value[place], source)
    elif hasattr(value, "ListFields"):
        parent.ClearField(field)
    else:
        with suppress(ValueError):  # an enumerator that protobuf does not let in
            setattr(parent, field, _junk(value, source))


def _places(message: Any) -> Iterator[tuple[Any, str, Any]]:
    """(message, field, value) of all that is set."""
    for descriptor, value in message.ListFields():
        yield message, descriptor.name, value
        if hasattr(value, "items"):
            inner = list(value.values())
        elif hasattr(value, "append"):
            inner = list(value)
        else:
            inner = [value]
        for part in inner:
            if hasattr(part, "ListFields"):
                yield from _places(part)


def _junk(value: Any, source: random.Random) -> Any:
    """Another value of the same type, which a 32-bit field holds too."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        number = source.choice((*NUMBERS, value + 1, value - 1, 7))
        return number if -(2**31) <= number < 2**31 and (number >= 0 or value < 0) else value + 1
    if isinstance(value, float):
        return source.choice((0.0, -1.0, float("nan"), float("inf")))
    word = source.choice(WORDS)
    return word.encode() if isinstance(value, bytes) else word


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
