"""How long the values of a program live, and which states may be updated in place."""

from __future__ import annotations

from edgedistill.mil_ops import KERNELS
from edgedistill.mil_package import Operation, Package


def last_uses(package: Package) -> dict[str, int]:
    """Value of the run -> index of the last op that uses it; results and states never end."""
    last: dict[str, int] = {}
    lasting = {*package.outputs, *package.states, *package.constants}
    for index, op in enumerate(package.operations):
        if op.kind.startswith("constexpr_"):
            lasting.update(op.outputs)
            continue
        last |= dict.fromkeys(op.outputs, index)
        last |= {
            s: index for arguments in op.inputs.values() for s in arguments if isinstance(s, str)
        }
    return {name: index for name, index in last.items() if name not in lasting}


def state_name(op: Operation) -> str:
    """The state that a ``read_state`` or ``write_state`` names."""
    name = op.inputs["input"][0]
    if not isinstance(name, str):
        raise TypeError(f"{op.kind} reads a constant")
    return name


def states_in_place(package: Package) -> frozenset[str]:
    """The states, and the results of ``slice_update``, that may share the state's memory.

    Reading a state copies it, by the specification.  Sharing cannot be told from copying if every
    update of what was read goes straight back into the state, and nothing that was read before an
    update is used after it.
    """
    last = last_uses(package) | dict.fromkeys(package.outputs, len(package.operations))
    safe: set[str] = set()
    for state in package.states:
        updates = _updates_in_place(package, state, last)
        if updates is not None:
            safe |= {state, *updates}
    return frozenset(safe)


def _updates_in_place(package: Package, state: str, last: dict[str, int]) -> list[str] | None:
    """The names of the state's updates, or None if they cannot be made in place."""
    whole: set[str] = set()  # values that are the state itself
    shared: set[str] = set()  # values that may lie in the state's memory
    pending: str | None = None  # an update that is not written back yet
    updates: list[str] = []
    for index, op in enumerate(package.operations):
        if op.kind in ("read_state", "write_state") and state_name(op) == state:
            if op.kind == "write_state":
                if op.inputs["data"][0] != pending or pending is None:
                    return None
                pending = None
            elif pending is not None:
                return None
            whole.update(op.outputs)
            shared.update(op.outputs)
        elif op.kind == "slice_update" and op.inputs["x"][0] in shared:
            overlapping = any(last.get(name, index) > index for name in shared)
            if pending is not None or overlapping or op.inputs["x"][0] not in whole:
                return None
            pending = op.outputs[0]
            updates.append(pending)
            shared.add(pending)
        elif op.kind in KERNELS and KERNELS[op.kind].views:
            sources = {
                s for arguments in op.inputs.values() for s in arguments if isinstance(s, str)
            }
            if sources & shared:
                shared.update(op.outputs)
    return updates if pending is None else None
