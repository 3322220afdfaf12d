"""A program that builds a chain of three steps.

python -m tests.pipeline_driver CACHE WITNESS SECONDS [ray]
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgedistill.cache import Cache
from edgedistill.content import ContentHashes
from edgedistill.pipeline import Pipeline, Step
from tests.pipeline_tasks import Write


def chain(witness: str, seconds: float) -> list[Step]:
    """Three steps, each after the one before; the second takes ``seconds``."""
    hashes = ContentHashes()
    first = Step("first", Write(text="one ", witness=witness), {}, hashes)
    middle = Write(text="two ", witness=witness, seconds=seconds)
    second = Step("second", middle, {"a": first}, hashes)
    return [Step("third", Write(text="three ", witness=witness), {"a": second}, hashes)]


if __name__ == "__main__":
    root, witness_file, sleep_seconds, *executor = sys.argv[1:]
    pipeline = Pipeline(Cache(Path(root)))
    if executor:
        from edgedistill.ray_cluster import Asked
        from edgedistill.ray_executor import RayPipeline

        pipeline = RayPipeline(Path(root), asked=Asked(), peak_bytes={})
    pipeline.run(chain(witness_file, float(sleep_seconds)))
