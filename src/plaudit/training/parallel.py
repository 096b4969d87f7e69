"""A model shared by several processes: DDP or FSDP2 around it, and whole tensors out of and into its shards."""

import copy
import inspect
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from plaudit.core.layout import PackedBatch
from plaudit.training.processes import Processes

Model = TypeVar("Model", bound=nn.Module)
BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two averages in float32."""


class _Forward(nn.Module):
    """One method of a model as the forward of a module, which is what DDP and FSDP wrap."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, batch: PackedBatch) -> Any:
        called = self.model if self.method == "forward" else getattr(self.model, self.method)
        return called(batch)


class Network:
    """The model as a training loop calls it, by one process or by many.

    With several processes every one has to call it equally often in a step. Gradients are **summed** over processes,
    not averaged: the loop divides by the weight sum of the whole step already. DDP adds them up in the last backward
    of a step (`no_sync` before it); FSDP in every one, because whole gradients in between would cost the memory that
    it is there to save.

    Attributes:
        model: the model itself; under FSDP its parameters are `DTensor`s.
        strategy: `ddp`, `fsdp` or None.
    """

    def __init__(
        self, model: nn.Module, processes: Processes, *, method: str = "forward", precision: str = "float32"
    ) -> None:
        """Move the model to its device (under FSDP only this process's part of it) and wrap it.

        Args:
            model: the same in every process, whole.
            processes: who shares it.
            method: what to call: `forward` or another method of one packed batch.
            precision: `bf16` gathers the weights of FSDP's blocks in bfloat16; heads, embeddings and the sums of
                gradients stay in float32.
        """
        self.model, self.processes, self._left = model, processes, 0
        self._plain = _Forward(model, method)
        self._wrapped: Any = self._plain
        self.strategy = choose_strategy(model, processes)
        processes.require_same(initial_weights=weights_sum(model) if processes.several else None)
        self._skeleton: nn.Module | None = None
        if self.strategy != "fsdp":
            model.to(processes.device)
        if self.strategy == "fsdp":
            self._skeleton = skeleton(model)
            _shard(self._plain, processes, precision)
        elif self.strategy == "ddp":
            # Poolers that nothing reads, experts that no token chose: a gradient may be missing.
            # Buffers are the same everywhere and stay so; the option's name depends on torch's version.
            known = inspect.signature(DistributedDataParallel.__init__).parameters
            sync: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
            self._wrapped = DistributedDataParallel(self._plain, find_unused_parameters=True, **sync)
            self._wrapped.register_comm_hook(None, _sum_hook)

    def begin_step(self, passes: int) -> None:
        """Say how many forwards with a graph this step takes, in every process alike."""
        self._left = passes

    def __call__(self, batch: PackedBatch) -> Any:
        """What the method returns for this batch."""
        if self.strategy != "ddp" or not torch.is_grad_enabled():
            return self._plain(batch)
        self._left -= 1
        with self._wrapped.no_sync() if self._left > 0 else nullcontext():
            return self._wrapped(batch)

    def sum_gradients(self, loose: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of parameters outside the network (a tie parameter) over the processes."""
        if not self.processes.several:
            return
        for parameter in loose:
            used = parameter.grad is not None
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            both = self.processes.sum(torch.cat([gradient.flatten(), gradient.new_full((1,), float(used))]))
            parameter.grad = both[:-1].view_as(parameter) if both[-1] > 0 else None

    def reshard(self) -> None:
        """After an evaluation: give back the outermost weights that FSDP leaves gathered after a forward."""
        if self.strategy == "fsdp":
            self._plain.reshard()  # type: ignore[operator]

    def whole(self, model: Model) -> Model:
        """The model with all of its weights: itself; under FSDP, in the first process, a copy on the CPU.

        Every process has to call it; under FSDP the others get back what they gave, in shards.
        """
        if self._skeleton is None:
            return model
        values = {name: whole(value, keep=self.processes.first) for name, value in self.model.state_dict().items()}
        if not self.processes.first:
            return model
        return cast(Model, fill_skeleton(self._skeleton, values))


def choose_strategy(model: nn.Module, processes: Processes) -> str | None:
    """`ddp` or `fsdp`; `auto` is DDP unless training would take more than half of the GPU's memory."""
    if processes.strategy != "auto":
        return processes.strategy
    if processes.device.type != "cuda":
        return "ddp"
    needed = sum(
        each.numel() * (BYTES_PER_PARAMETER if each.requires_grad else each.element_size())
        for each in model.parameters()
    )
    return "fsdp" if needed > torch.cuda.get_device_properties(processes.device).total_memory / 2 else "ddp"


@torch.no_grad()
def weights_sum(model: nn.Module) -> list[tuple[str, float]]:
    """A sum over every parameter, to tell whether two processes start from the same ones."""
    return [(name, parameter.double().sum().item()) for name, parameter in model.named_parameters()]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer layers: the children of the module list that holds most parameters; none where there is none."""
    lists: list[nn.ModuleList] = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def _shard(forward: _Forward, processes: Processes, precision: str) -> None:
    """FSDP2: every transformer layer gathered by itself, heads in float32, what is left with the outermost module."""
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = torch.bfloat16 if precision == "bf16" else None
    coarse = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = blocks_of(forward.model)
    heads = [getattr(forward.model, name, None) for name in ("head", "aggregation")]
    own = [each for each in heads if isinstance(each, nn.Module) and any(True for _ in each.parameters())]
    for module, policy in [*((block, coarse) for block in blocks), *((each, exact) for each in own), (forward, exact)]:
        shard: Any = fully_shard(module, mesh=mesh, mp_policy=policy)
        if not hasattr(shard, "set_force_sum_reduction_for_comms"):
            raise ValueError(f"parallel: fsdp needs a newer torch than {torch.__version__} (2.8 or later); use ddp")
        shard.set_force_sum_reduction_for_comms(True)
        shard.set_gradient_divide_factor(1.0)


def _sum_hook(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication of one bucket, as a sum instead of its mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters take no memory; buffers and everything else are copied."""
    empty = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=each.requires_grad)
        for each in model.parameters()
    }
    return copy.deepcopy(model, dict(empty))


def fill_skeleton(bones: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Give a skeleton its weights, on the CPU; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in bones.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                value = values[f"{prefix}.{name}" if prefix else name]
                made[id(parameter)] = nn.Parameter(value.cpu().clone(), requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            stored = values.get(f"{prefix}.{name}" if prefix else name)
            module.register_buffer(name, (buffer if stored is None else stored).cpu(), stored is not None)
    return bones


def whole(value: Any, *, keep: bool = True) -> Any:
    """Nested values with every `DTensor` put together; all processes have to call it.

    Args:
        value: nested dicts, lists and tuples of tensors and plain values.
        keep: False where only the others need the result: tensors become None, so that no memory is kept.

    Returns:
        The same nesting; tensors that were in shards are on the CPU.
    """
    if isinstance(value, dict):
        return {key: whole(inner, keep=keep) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(inner, keep=keep) for inner in value)
    if isinstance(value, DTensor):
        full = value.full_tensor().detach()
        return full.cpu() if keep else None
    return value if keep or not isinstance(value, Tensor) else None


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, or this process's rows of it where FSDP has sharded the first dimension."""
    if not isinstance(target, DTensor):
        target.copy_(value)
        return
    mesh = target.device_mesh
    rows = value.chunk(mesh.size(), 0)
    mine = mesh.get_local_rank()
    if mine < len(rows):
        target.to_local().copy_(rows[mine])


def put_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole tensors by name into a module that may be sharded."""
    own = module.state_dict()
    for name, value in state.items():
        put(own[name], value)


def put_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state of whole tensors, sharded as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        number: {name: _like(value, parameters[number]) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _like(value: Any, parameter: Tensor) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    sharded = torch.zeros_like(parameter, dtype=value.dtype)
    put(sharded, value)
    return sharded
