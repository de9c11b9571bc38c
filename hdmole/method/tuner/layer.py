"""An `nn.Linear`, or GPT-2's `Conv1D`, with a mixture of LoRA experts beside it.

* All experts are stacked: A (N * r, d_in) and B (d_out, N * r). The gate scales the N * r numbers
  between them.
* What does not depend on the frame is in a `_Plan`. Without gradients a plan is made once for a
  call of `generate` or a `route` block, and not again for every token.
* The layer reads one variable of its thread: the active routing, interventions and traces.
* Traces get detached copies. Interventions change what the gate is computed from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hdmole.method.gate import Gates, auxiliary_loss, entropy, gates
from hdmole.method.intervention import Intervention
from hdmole.method.routing import Context, RoutingError, current
from hdmole.method.tuner.config import HDMoLEConfig


@dataclass
class _Plan:
    """What an adapter needs for every frame of a call, and what does not depend on the frame."""

    a: Tensor
    b: Tensor
    router: Tensor | None
    accent: Tensor | None
    posterior: Tensor  # pi, so that it broadcasts against the frames
    thresholds: tuple[Tensor, Tensor] | None  # None where they depend on the frame
    mixing: Tensor
    switches: dict[str, Any]
    kept: bool  # whether the next call uses it again
    size: int  # of the input's first axis
    read: list[Tensor]  # parameters from which thresholds and mixing were computed
    version: int  # how often these were changed
    first: Gates | None = None  # gates of the first frames, whose global branch holds for all


class HDMoLELinear(nn.Module, BaseTunerLayer):
    """The adapted layer.

    Each kind of parameter is a dictionary with one entry for each adapter, under the adapter's
    name.

    | parameter | shape | meaning |
    |---|---|---|
    | `hdmole_A`, `hdmole_B` | (N * r, d_in), (d_out, N * r) | LoRA factors of all experts |
    | `hdmole_router` | (N, d) | local router W_r |
    | `hdmole_accent` | (1,) | c in the local logits + c * log(pi) |
    | `hdmole_threshold` | (2,) | global and local threshold, or their logits |
    | `hdmole_threshold_weight` | (2, d) | how the thresholds depend on the input |
    | `hdmole_lambda` | (1,) | logit of lambda in the convex combination |
    | `hdmole_shared_A`, `hdmole_shared_B` | (s, d_in), (d_out, s) | shared expert of rank s |

    d is N * r where the local router reads A x, d_in where it reads x. A parameter that the
    configuration leaves unused is not created, so that it is not counted as trainable. There is one
    exception: where one router is used alone, the threshold of the other stays.
    """

    adapter_layer_names = (
        "hdmole_A", "hdmole_B", "hdmole_router", "hdmole_threshold", "hdmole_threshold_weight", "hdmole_lambda",
        "hdmole_accent", "hdmole_shared_A", "hdmole_shared_B",
    )  # fmt: skip
    is_hdmole_layer = True
    hdmole_A: nn.ParameterDict
    hdmole_B: nn.ParameterDict
    hdmole_router: nn.ParameterDict
    hdmole_threshold: nn.ParameterDict
    hdmole_threshold_weight: nn.ParameterDict
    hdmole_lambda: nn.ParameterDict
    hdmole_accent: nn.ParameterDict
    hdmole_shared_A: nn.ParameterDict
    hdmole_shared_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Linear | Conv1D, adapter_name: str, config: HDMoLEConfig, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.weight.shape
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.configs: dict[str, HDMoLEConfig] = {}
        self.merged_adapters: list[str] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: HDMoLEConfig) -> None:
        """Add an adapter of this configuration.

        It does not change the layer's output yet, because B starts at zero.
        """
        n, size = config.experts, config.experts * config.r
        self.configs[adapter_name] = config
        a = _started(size, self.in_features, config)
        width = size if config.router_input == "ax" else self.in_features
        share = config.threshold_init / config.threshold_max  # used only by bounded thresholds
        parameters = {
            "hdmole_A": a,
            "hdmole_B": torch.zeros(self.out_features, size),
        }
        if config.routing != "global":
            parameters["hdmole_router"] = torch.randn(n, width) * 0.1 / math.sqrt(width)
            if config.router_accent is not None:
                # (1,), not (): FSDP cannot shard a scalar
                parameters["hdmole_accent"] = torch.full((1,), float(config.router_accent))
        if config.learned:
            start = math.log(share / (1 - share)) if config.bounded else config.threshold_init / n
            start = 0.0 if config.thresholds == "sparsegen" else start
            parameters["hdmole_threshold"] = torch.full((2,), start)
            if config.threshold_parametrisation == "input":
                parameters["hdmole_threshold_weight"] = torch.zeros(2, width)
        if config.combination == "convex" and config.routing == "hierarchical":
            parameters["hdmole_lambda"] = torch.zeros(1)
        if config.shared_expert_rank:
            parameters["hdmole_shared_A"] = _started(config.shared_expert_rank, self.in_features, config)
            parameters["hdmole_shared_B"] = torch.zeros(self.out_features, config.shared_expert_rank)
        for name, value in parameters.items():
            getattr(self, name)[adapter_name] = nn.Parameter(value)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def thresholds(self, adapter: str, read: Tensor) -> tuple[Tensor, Tensor]:
        """tau_g and tau_l: () each, or (...) where they depend on the router's input (..., d)."""
        config, wide = self.configs[adapter], self._wide(adapter)
        if adapter not in self.hdmole_threshold:  # not learned; only an intervention reads them
            tau = torch.full((2,), config.threshold_init / config.experts, dtype=wide, device=read.device)
            return tau[0], tau[1]
        free = self.hdmole_threshold[adapter].to(wide)
        if adapter in self.hdmole_threshold_weight:
            free = free + functional.linear(read, self.hdmole_threshold_weight[adapter]).to(wide)
        if config.thresholds == "sparsegen":
            tau = 1 - torch.exp(-free)  # lambda, below 1
        else:
            tau = config.threshold_max / config.experts * torch.sigmoid(free) if config.bounded else free
        return tau[..., 0], tau[..., 1]

    def _wide(self, adapter: str) -> torch.dtype:
        """The dtype in which gates are computed: float32, or a wider one."""
        return torch.promote_types(self.hdmole_A[adapter].dtype, torch.float32)

    def _plan(self, adapter: str, x: Tensor, context: Context, change: Intervention | None) -> _Plan:
        """The plan for an input `x` (B, ..., d_in)."""
        config, routing = self.configs[adapter], context.routing
        if routing is None:
            raise RoutingError(
                "This HDMoLE layer does not know the accent: give accent_posterior to the model's forward, wrap the call in "
                "hdmole.route(posterior), or use an adapter that carries an accent recogniser, in PEFT's PeftModel, and a model fed input_features. "
                "transformers' Trainer hands accent_posterior on only with remove_unused_columns=False."
            )
        # With gradients each call has its own graph, and compiled code keeps nothing between calls.
        kept = change is None and routing.rows is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if kept:
            plan: _Plan | None = routing.plans.get((self, adapter, x.dim(), x.device))
            if plan is not None and plan.size == x.shape[0] and plan.version == _version(plan.read):
                return plan
        wide, posterior = self._wide(adapter), routing.posterior
        # the classes lack the general domain
        if posterior.shape[1] == config.experts and not config.general_class:
            posterior = functional.pad(posterior, (1, 0))
        if posterior.shape[1] != config.experts + 1:
            raise RoutingError(
                f"The accent posterior has {posterior.shape[1]} classes; adapter {adapter!r} has {config.experts} experts and "
                f"needs {config.experts + 1}, the general domain first."
            )
        pi = routing.of_frames(posterior.to(x.device, wide), x, self.layer_name)
        if change is not None and change.posterior is not None:
            pi = change.posterior.to(pi).expand_as(pi)
        mixing, of_input = self.hdmole_lambda.get(adapter), adapter in self.hdmole_threshold_weight
        read = [named[adapter] for named in (self.hdmole_threshold, self.hdmole_lambda) if kept and adapter in named]
        plan = _Plan(
            self.hdmole_A[adapter], self.hdmole_B[adapter], self.hdmole_router.get(adapter), self.hdmole_accent.get(adapter), pi,
            None if of_input else self.thresholds(adapter, x), pi.new_full((), 0.5) if mixing is None else torch.sigmoid(mixing[0]),
            dict(
                thresholds=config.thresholds, k=config.top_k, p=config.top_p, routing=config.routing,
                combination=config.combination, general_class=config.general_class, scaled=config.thresholds == "dynamic",
            ), kept, x.shape[0], read, _version(read),
        )  # fmt: skip
        if kept:
            routing.plans[self, adapter, x.dim(), x.device] = plan
        return plan

    def _added(self, y: Tensor, x: Tensor, adapter: str, context: Context) -> Tensor:
        """The base layer's output `y` (..., d_out) for `x` (..., d_in), plus what the adapter adds."""
        config, change = self.configs[adapter], None
        if context.interventions:
            change = next((i for i in reversed(context.interventions) if i.adapter == adapter and id(self) in i.layers), None)
        plan = self._plan(adapter, x, context, change)
        pi, switches = plan.posterior, plan.switches
        if x.dtype != plan.a.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(plan.a.dtype)
        heard = functional.dropout(x, config.dropout, self.training) if config.dropout else x
        ax = functional.linear(heard, plan.a)  # (..., N * r)
        read = ax if config.router_input == "ax" else x
        # (..., N); with global routing there is no local router
        logits = pi.new_zeros((*read.shape[:-1], config.experts)) if plan.router is None else functional.linear(read, plan.router)
        if plan.accent is not None:
            logits = logits + plan.accent * pi[..., 1:].clamp_min(1e-6).log()
        tau_global, tau_local = plan.thresholds or self.thresholds(adapter, read)
        if change is not None:
            tau_global, tau_local = change.change_thresholds(tau_global, tau_local)
            switches = {**switches, **change.switches}
        result = gates(pi, logits, tau_global, tau_local, plan.mixing, **switches, known=plan.first)
        if plan.kept and plan.thresholds is not None:
            plan.first = plan.first or result
        if context.losses is not None and config.auxiliary_loss:
            context.losses.append(auxiliary_loss(result, config.auxiliary_loss))
        if change is not None:
            result = change.change_gate(result, _most(result, switches))
        # the scale goes into the gate, which is small (torch.compile of torch 2.13 loses the alpha
        # of torch.add)
        weight = result.gate if config.scale == 1 else config.scale * result.gate
        each = ax.view(*ax.shape[:-1], config.experts, config.r) * weight.unsqueeze(-1).to(ax.dtype)  # (..., N, r)
        added, shared = functional.linear(each.view(ax.shape), plan.b), None
        y = y + added.to(y.dtype)
        if config.shared_expert_rank and (change is None or change.shared):
            shared = functional.linear(functional.linear(heard, self.hdmole_shared_A[adapter]), self.hdmole_shared_B[adapter])
            weight = result.mass if config.shared_expert_weight == "mass" else entropy(result.accents)
            shared = shared * (config.scale * weight[..., None]).to(shared.dtype)
            y = y + shared.to(y.dtype)
        recorders = [r for r in context.recorders if r.adapter == adapter and id(self) in r.layers]
        if recorders:
            assert context.routing is not None
            rows, beams = context.routing.of_rows(x, self.layer_name), context.routing.copies(x, self.layer_name)
            carried = _carried(each, plan.b, added, shared)
            for recorder in recorders:
                recorder.record(id(self), result, rows, x, carried, beams)
        return y

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output (..., d_out) for `x` (..., d_in), plus what each adapter adds.

        Raises RoutingError if the accent posterior, or the utterance of a row, is not known.
        """
        y: Tensor = self.base_layer(x, *args, **kwargs)
        context = current()
        if self.disable_adapters or context.frozen:
            return y
        routing = context.routing
        cut = routing.cut(x, self.layer_name) if routing is not None and routing.cuts else None
        if cut is not None:
            x, y = x.unflatten(0, cut), y.unflatten(0, cut)
        for adapter in self.active_adapters:
            if adapter in self.hdmole_A:
                y = self._added(y, x, adapter, context)
        return y if cut is None else y.flatten(0, 1)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its configuration."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises ValueError: there is no single matrix to merge."""
        raise ValueError(
            "An HDMoLE adapter cannot be merged: its weights depend on the utterance and the frame. For global routing only, "
            "export_lora gives one accent as a plain LoRA adapter, and that can be merged."
        )

    def unmerge(self) -> None:
        """Always raises ValueError, as no adapter is ever merged."""
        raise ValueError("An HDMoLE adapter is never merged, so there is nothing to unmerge.")


def _started(rank: int, size: int, config: HDMoLEConfig) -> Tensor:
    """The initial A (rank, size).

    It is PEFT's "gaussian", with standard deviation 1 / r, or PEFT's default.
    """
    if config.init_weights == "gaussian":
        return torch.randn(rank, size) / config.r
    a = torch.empty(rank, size)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a


@torch.no_grad()
def _carried(each: Tensor, b: Tensor, added: Tensor, shared: Tensor | None) -> Tensor:
    """What each expert carries of the change of a layer's output, (..., N + 1); the shared expert
    is the last.

    Of the change D (..., d_out), the sum of what the experts add, expert i carries (what it adds) .
    D. All of them sum to |D|^2.

    Args:
        each: (..., N, r), what B is multiplied with.
        b: (d_out, N * r).
        added: (..., d_out), what the experts of accents add.
        shared: (..., d_out), what the shared expert adds, if there is one.
    """
    change = (added if shared is None else added + shared).float()
    back = functional.linear(change, b.float().T).view(each.shape)  # so no expert's output has to be computed
    own = (each.float() * back).sum(-1)
    rest = own.new_zeros(own.shape[:-1]) if shared is None else (shared.float() * change).sum(-1)
    return torch.cat([own, rest[..., None]], -1)


def _version(parameters: list[Tensor]) -> int:
    """How often the parameters were changed in place; PyTorch does not count this in inference
    mode.
    """
    return sum(p._version for p in parameters if not p.is_inference())


def _most(gates: Gates, switches: dict[str, Any]) -> Tensor:
    """The sum (...) of a gate whose branches all have experts on. Forced experts share it."""
    both = switches["combination"] == "sum" and switches["routing"] == "hierarchical"
    if not switches["scaled"]:
        return gates.gate.new_tensor(2.0 if both else 1.0)
    of = {"global": gates.tau_global, "local": gates.tau_local}.get(switches["routing"])
    if of is not None:
        return of
    if switches["combination"] == "convex":
        return gates.mixing * gates.tau_global + (1 - gates.mixing) * gates.tau_local
    return gates.tau_global + gates.tau_local if both else gates.gate.new_tensor(1.0)
