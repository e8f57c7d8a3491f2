"""The state of an optimizer as plain data keyed by parameter names, and back, bit by bit.

torch numbers parameters in the order in which an optimizer received them; names remain valid when code, sharding or
the number of ranks changes, and named tensors need no pickle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# State that torch.optim shapes like its parameter; other state (of Adafactor, say) has shapes of its own.
_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")
# Hyper-parameters that say how a device computes, not what: a run may continue on another kind.
_OF_A_DEVICE = ("fused", "foreach", "capturable")
Named = Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's state as plain data.

    Attributes:
        tensors: "<parameter name>.<state>", such as "head.0.weight.exp_avg"; hyper-parameters that are
            tensors are "#<group>.<name>".
        groups: per parameter group its hyper-parameters, JSON-able, and under "params" its parameters'
            names.
        scalars: state that is not a tensor, JSON-able, named like the tensors.
    """

    tensors: dict[str, Tensor]
    groups: list[dict[str, Any]]
    scalars: dict[str, Any]


def optimizer_to_tensors(optimizer: torch.optim.Optimizer, named_parameters: Named) -> OptimizerState:
    """The state of `optimizer` by parameter names; tensors are those of the optimizer, not copies.

    Args:
        optimizer: any of torch.optim whose state is one level deep (not LBFGS).
        named_parameters: of the module that is trained, without a wrapper's prefix; parameters that the
            optimizer does not have are ignored.

    Raises:
        ValueError: for a parameter without a name, or state that is neither a tensor nor JSON-able.
    """
    names = {id(p): name for name, p in _pairs(named_parameters)}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        unnamed = sum(id(p) not in names for p in group["params"])
        if unnamed:
            raise ValueError(f"{unnamed} of {len(group['params'])} parameters in group {number} have no name")
        plain: dict[str, Any] = {"params": [names[id(p)] for p in group["params"]]}
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"#{number}.{key}"] = value
            elif key != "params":
                plain[key] = _json_able(value, f"hyper-parameter {key}")
        groups.append(plain)
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                name = f"{names[id(parameter)]}.{key}"
                if isinstance(value, Tensor):
                    tensors[name] = value
                else:
                    scalars[name] = _json_able(value, f"state {name}")
    return OptimizerState(tensors, groups, scalars)


def tensors_to_optimizer(saved: OptimizerState, optimizer: torch.optim.Optimizer, named_parameters: Named) -> None:
    """Give `optimizer` the saved state and hyper-parameters, bit by bit, on its parameters' devices.

    How it computes there (fused, foreach, capturable) stays its own.

    Args:
        saved: from `optimizer_to_tensors`.
        optimizer: of the same kind, with the same parameters in the same groups, in any order.
        named_parameters: as for `optimizer_to_tensors`.

    Raises:
        ValueError: if groups or parameters differ, or a state's shape does not fit; nothing is changed
            then.
    """
    parameters = dict(_pairs(named_parameters))
    names = {id(p): name for name, p in parameters.items()}
    theirs = [sorted(group["params"]) for group in saved.groups]
    ours = [sorted(names.get(id(p), "?") for p in group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        differing = sorted({n for g in theirs for n in g} ^ {n for g in ours for n in g})
        what = f"parameters differ, the first is {differing[0]}" if differing else "parameter groups differ"
        raise ValueError(f"the saved optimizer does not match: {what}")
    group_of = {name: group for group in optimizer.param_groups for name in (names[id(p)] for p in group["params"])}
    state: dict[str, dict[str, Any]] = {}
    for name, value in {**saved.tensors, **saved.scalars}.items():
        if name.startswith("#"):
            continue
        owner, _, key = name.rpartition(".")
        if owner not in group_of:
            raise ValueError(f"the saved optimizer does not match: state {name} belongs to no parameter")
        if isinstance(value, Tensor):
            value = _placed(value, key, name, parameters[owner], group_of[owner])
        state.setdefault(owner, {})[key] = value
    for number, (group, plain) in enumerate(zip(optimizer.param_groups, saved.groups, strict=True)):
        for key, value in plain.items():
            if key != "params" and key not in _OF_A_DEVICE:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        prefix = f"#{number}."
        group.update({n.removeprefix(prefix): t.clone() for n, t in saved.tensors.items() if n.startswith(prefix)})
    for name in group_of:
        optimizer.state.pop(parameters[name], None)
        if name in state:
            optimizer.state[parameters[name]] = state[name]


def _placed(value: Tensor, key: str, name: str, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A copy of a saved state where torch keeps it: with its parameter, but step counters mostly on the CPU."""
    if key in _SHAPED and value.shape != parameter.shape:
        raise ValueError(
            f"the saved optimizer does not match: {name} has shape {tuple(value.shape)}, "
            f"its parameter {tuple(parameter.shape)}"
        )
    on_cpu = key == "step" and not group.get("capturable") and not group.get("fused")
    device = "cpu" if on_cpu else parameter.device
    if value.shape != parameter.shape:
        return value.detach().clone().to(device)
    # Laid out as the parameter (channels last, say), as the optimizer itself does.
    return torch.empty_like(parameter, dtype=value.dtype, device=device).copy_(value)


def _pairs(named: Named) -> list[tuple[str, nn.Parameter]]:
    return list(named.items() if isinstance(named, Mapping) else named)


def _json_able(value: Any, what: str) -> Any:
    """`value` with tuples as lists, if that is all that JSON would change."""
    if isinstance(value, list | tuple):
        return [_json_able(v, what) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"the optimizer's {what} is a {type(value).__name__}, which a checkpoint cannot hold")
