"""The engine: devices, processes, precision and compilation. The only file that knows Lightning Fabric.

Processes are started by Fabric itself (``--devices 2``), by torchrun or by SLURM; each holds a replica of the
network, and gradients are averaged over them.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from torch import Tensor, nn

from feedbackpath.errors import ConfigError
from feedbackpath.train.config import TrainConfig
from feedbackpath.train.devices import usable_device
from feedbackpath.train.processes import Processes

Value = TypeVar("Value")
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # else it tells of each process that joins


class Engine:
    """This process's part of a job, alone or among others.

    Args:
        config: Of which devices, processes, precision, compilation and memory format count.

    Attributes:
        device: Where this process computes.
        dtype: Type of parameters and inputs.

    Raises:
        ConfigError: The device is not there, or another number of processes was started than asked for.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        device = usable_device(config.device)
        kind, index = device.type, device.index
        devices, nodes = _count_processes(config)
        is_started = "LOCAL_RANK" in os.environ or SLURMEnvironment.detect()
        self._others = Processes(devices, nodes) if devices > 1 and not is_started else None
        self._fabric = Fabric(
            accelerator=kind,
            devices=[index] if index is not None and devices == 1 else devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else "auto",
            precision=cast(Any, config.precision),
        )
        _join_group_of_torchrun(kind)
        self._fabric.launch()
        self.device = self._fabric.device
        self.dtype = torch.float64 if config.precision == "64-true" else torch.float32

    @property
    def rank(self) -> int:
        """Which of the processes this is, counted from 0."""
        return int(self._fabric.global_rank)

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return int(self._fabric.world_size)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return bool(self._fabric.is_global_zero)

    def place_model(self, model: nn.Module) -> nn.Module:
        """Move a network to this process's device, in its type and memory format."""
        model = model.to(self.device, self.dtype)
        if self._config.sync_batchnorm and self.world_size > 1:
            model = cast(Any, nn.SyncBatchNorm).convert_sync_batchnorm(model)
        return cast(nn.Module, cast(Any, model).to(memory_format=self._memory_format))

    def place(self, x: Tensor) -> Tensor:
        """Move a batch to this process's device: numbers in the network's type, images in its format."""
        if not x.is_floating_point():
            return x.to(self.device)
        if x.dim() != 4:
            return x.to(self.device, self.dtype)
        return x.to(self.device, self.dtype, memory_format=self._memory_format)

    def set_up(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Return what trains in place of a network and its optimizer: wrapped for replicas and compiled."""
        trained = torch.compile(model) if self._config.compile else model
        wrapped, wrapped_optimizer = self._fabric.setup(cast(nn.Module, trained), optimizer)
        return wrapped, wrapped_optimizer

    def autocast(self) -> Any:
        """Return the context in which the plain network computes in the config's precision."""
        return self._fabric.autocast()

    @contextmanager
    def accumulating(self, model: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Average gradients over the replicas only in the last backward pass of a step."""
        with self._fabric.no_backward_sync(cast(Any, model), enabled=not is_last and self.world_size > 1):
            yield

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        self._fabric.backward(loss)

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Sum numbers over the processes, with one small message."""
        numbers = torch.stack([torch.as_tensor(value, device=self.device).double() for value in values])
        if self.world_size > 1:
            torch.distributed.all_reduce(numbers)
        return numbers.tolist()

    def gather(self, value: Value) -> list[Value]:
        """Return every process's value, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give every replica the main process's buffers: BatchNorm's running statistics are its own."""
        if self.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def rng_state(self) -> list[Tensor]:
        """Return the state of this process's random numbers, the CPU's and the device's."""
        on_device = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def set_rng_state(self, states: list[Tensor]) -> None:
        """Take up the state that ``rng_state`` returned."""
        torch.set_rng_state(states[0])
        if self.device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)

    @contextmanager
    def naming_lost(self) -> Iterator[None]:
        """Say it where another process has ended, and this one fails for that.

        Raises:
            LostProcessError: Instead of what PyTorch raises then.
        """
        try:
            yield
        except RuntimeError as error:
            lost = None if self._others is None else self._others.find_lost(patience_s=1.0)
            if lost is None:
                raise
            raise lost from error

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self._config.channels_last else torch.contiguous_format


def _join_group_of_torchrun(kind: str) -> None:
    """Meet the other processes that torchrun started, apart from those of an attempt that crashed.

    Its store outlives a restart and still holds the addresses of processes that are gone: whoever reads them
    before they are written anew waits for the dead. Fabric goes on with the group that is there.
    """
    if not torch.distributed.is_torchelastic_launched() or torch.distributed.is_initialized():
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ["WORLD_SIZE"] == "1":
        return
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world_size, port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    distributed = cast(Any, torch.distributed)  # its stubs leave the stores out
    store = distributed.TCPStore(os.environ["MASTER_ADDR"], port, world_size, is_master=False)
    torch.distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=distributed.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store),
        rank=int(os.environ["RANK"]),
        world_size=world_size,
    )


def _count_processes(config: TrainConfig) -> tuple[int, int]:
    """Return devices a machine and machines: torchrun says how many it started, else the config does."""
    if not torch.distributed.is_torchelastic_launched():
        by_hand = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys()
        if config.num_nodes > 1 and not by_hand and not SLURMEnvironment.detect():
            raise ConfigError(
                f"num_nodes is {config.num_nodes}, but the program was not started on the other machines: "
                "start it on each by srun or torchrun"
            )
        return config.devices, config.num_nodes
    devices, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if config.devices not in (1, devices):
        raise ConfigError(f"devices is {config.devices}, but torchrun started {devices} here: leave it out")
    return devices, world // devices
