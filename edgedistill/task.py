"""What a step of the pipeline is: a frozen description of work, directories in, a directory out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from edgedistill.code_version import CodeVersion, code_version
from edgedistill.content import ContentHashes, plain
from edgedistill.plugins import Kind, plugin_module

# The name among the inputs of the directory that outlives a killed run.
WORK = "work"


class Task(BaseModel, ABC):
    """A pure function of its fields, its inputs and its code; it runs in a process of its own.

    Whatever ``run`` needs is imported inside it: the imports of a task's own class are what its
    code version follows.

    Attributes:
        threads: that its libraries may use.  They decide how sums are split, so they are part of
            the key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int = Field(default=1, ge=1)

    @abstractmethod
    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Read the outputs of earlier steps, write into the empty directory ``dst``."""

    def keeps_work(self) -> bool:
        """Whether ``run`` is given a directory, as the input ``work``, that outlives a killed run.

        What lies there may save work; it decides no byte of the output.
        """
        return False

    def plugins(self) -> list[tuple[Kind, str]]:
        """The plug-ins that ``run`` loads by name; their code is part of the key."""
        return []

    def fingerprint(self, hashes: ContentHashes) -> dict[str, Any]:
        """The fields as JSON data, each input file replaced by the hash of its contents."""
        fields: dict[str, Any] = plain(self, hashes)
        return fields

    def code(self) -> CodeVersion:
        """The version of all code that the task runs."""
        modules = tuple(plugin_module(kind, name) for kind, name in self.plugins())
        return code_version(modules, (type(self).__module__, type(self).__name__))
