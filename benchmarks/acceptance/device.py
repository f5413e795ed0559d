"""All differences between a GPU and the CPU that tests the checks' code: clock, memory limits, switches, processes.

No check asks which device it is on. Lines that a CPU cannot run are therefore those of :class:`Cuda`, and
:func:`lines_of_gpu_alone` lists them.
"""

from __future__ import annotations

import gc
import inspect
import platform
import resource
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Item = TypeVar("Item")
Made = TypeVar("Made")

OVERFLOWING_SCALE, CALM_SCALE = 2.0**40, 2.0**6
"""Loss scales at which every model's float16 gradients overflow, or no model's do."""


class Device(ABC):
    """The interface of the device that checks run on.

    Attributes:
        name: ``cuda`` or ``cpu``, as torch and our flags call it.
        judges_rates: whether rates and memory of this device are what the checks want to know.
        trains_in_fp16: whether smpo-train takes ``--dtype fp16`` here.
        fsdp: environment that has accelerate cut up a denoiser in a single process; empty where it does not.
        profiler_name: as the profiler's times call it.
        rounds, turns, warm_up: of :meth:`seconds`: rounds, and in each turns that count and such before them.
    """

    name: str
    judges_rates: bool
    trains_in_fp16: bool
    fsdp: ClassVar[Mapping[str, str]]
    profiler_name: str
    rounds, turns, warm_up = 2, 3, 1

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the device's name, memory in bytes, and driver."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    @abstractmethod
    def mark(self) -> Any:  # noqa: ANN401  (an event, or seconds)
        """Mark a point in the device's work."""

    @abstractmethod
    def between(self, begin: Any, end: Any) -> float:  # noqa: ANN401
        """Seconds between two marks that the device has passed."""

    @abstractmethod
    def allocated(self) -> int:
        """Bytes allocated in tensors."""

    @abstractmethod
    def peak(self) -> int:
        """Peak bytes allocated in tensors since :meth:`clean`."""

    @abstractmethod
    def clean(self) -> None:
        """Free unused memory and reset :meth:`peak`."""

    @abstractmethod
    def tf32(self) -> Any:  # noqa: ANN401  (a context manager)
        """Use TF32 for float32 products and convolutions inside the context."""

    @abstractmethod
    def short_of_memory(self, spare: int, fitting: int) -> Any:  # noqa: ANN401  (a context manager)
        """Limit the memory inside the context.

        Args:
            spare: bytes that are left beside what is allocated now.
            fitting: where memory is not really short: how many items fit at once.

        Returns:
            A context manager; it gives a function that wraps whatever makes something of some items.
        """

    @abstractmethod
    def begin_scale(self, accelerator: Any) -> None:  # noqa: ANN401
        """Set a loss scale, before the first step, at which nothing overflows."""

    @abstractmethod
    def overflow(self, accelerator: Any, parameter: torch.nn.Parameter) -> float | None:  # noqa: ANN401
        """Make the next backward pass overflow; returns the loss scale that does it, or None without a scaler."""

    @abstractmethod
    def end_overflow(self, accelerator: Any) -> None:  # noqa: ANN401
        """Restore the loss scale."""

    @abstractmethod
    def compiling(self) -> Any:  # noqa: ANN401  (a context manager)
        """Allow compilation inside the context."""

    @abstractmethod
    def activities(self) -> list[ProfilerActivity]:
        """Activities that the profiler records."""

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of one call: the smallest median of several rounds, each after a warm-up call."""
        return min(self._median(work) for _ in range(self.rounds))

    def _median(self, work: Callable[[], object]) -> float:
        found = []
        for turn in range(self.turns + self.warm_up):
            self.synchronize()
            began = self.mark()
            work()
            ended = self.mark()
            self.synchronize()
            if turn >= self.warm_up:
                found.append(self.between(began, ended))
        return median(found)

    def profiled(self, work: Callable[[], object], rows: int = 20) -> tuple[str, float, int]:
        """Return the table of the most expensive operations, the device's busy share of the time, and its kernels."""
        self.synchronize()
        began = time.perf_counter()
        with profile(activities=self.activities()) as found:
            work()
            self.synchronize()
        clock = time.perf_counter() - began
        averages, attribute = found.key_averages(), f"self_{self.profiler_name}_time_total"
        # Of a GPU, an operator's own time is that of the kernels it launches, which are there as well.
        kernels = [
            each
            for each in averages
            if each.device_type.name == self.name.upper() and not each.is_user_annotation and getattr(each, attribute)
        ]
        busy = sum(getattr(each, attribute) for each in kernels) / 1e6 / clock
        return averages.table(sort_by=attribute, row_limit=rows), busy, sum(each.count for each in kernels)


class Cuda(Device):
    """One NVIDIA GPU."""

    name = "cuda"
    judges_rates = True
    trains_in_fp16 = True
    fsdp: ClassVar[Mapping[str, str]] = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    profiler_name = "device"

    def __init__(self) -> None:
        torch.cuda.init()
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False

    def describe(self) -> dict[str, Any]:  # noqa: D102  (as all of these, see the base class)
        free, total = torch.cuda.mem_get_info()
        driver = "unknown"
        with suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        return {
            "device": torch.cuda.get_device_name(),
            "memory": total,
            "free": free,
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "driver, clock, power": driver,
        }

    def synchronize(self) -> None:  # noqa: D102
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:  # noqa: D102
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:  # noqa: D102
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def allocated(self) -> int:  # noqa: D102
        return torch.cuda.memory_allocated()

    def peak(self) -> int:  # noqa: D102
        return torch.cuda.max_memory_allocated()

    def clean(self) -> None:  # noqa: D102
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def tf32(self) -> Iterator[None]:  # noqa: D102
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    @contextmanager
    def short_of_memory(self, spare: int, fitting: int) -> Iterator[Callable[[Any], Any]]:  # noqa: ARG002, D102
        self.clean()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + spare) / total))
        try:
            yield lambda work: work
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def begin_scale(self, accelerator: Any) -> None:  # noqa: ANN401, D102
        accelerator.scaler.load_state_dict({**accelerator.scaler.state_dict(), "scale": CALM_SCALE})

    def overflow(self, accelerator: Any, parameter: torch.nn.Parameter) -> float | None:  # noqa: ANN401, ARG002, D102
        accelerator.scaler.update(OVERFLOWING_SCALE)
        return OVERFLOWING_SCALE

    def end_overflow(self, accelerator: Any) -> None:  # noqa: ANN401, D102
        accelerator.scaler.update(CALM_SCALE)

    def compiling(self) -> Any:  # noqa: ANN401, D102
        return nullcontext()

    def activities(self) -> list[ProfilerActivity]:  # noqa: D102
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]


class Cpu(Device):
    """The CPU, which tests the checks' code and imitates what it lacks."""

    name = "cpu"
    judges_rates = False
    trains_in_fp16 = False
    fsdp: ClassVar[Mapping[str, str]] = {}
    profiler_name = "cpu"
    rounds, turns, warm_up = 1, 1, 0

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {"device": f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"}

    def synchronize(self) -> None:  # noqa: D102
        pass

    def mark(self) -> float:  # noqa: D102
        return time.perf_counter()

    def between(self, begin: float, end: float) -> float:  # noqa: D102
        return end - begin

    def allocated(self) -> int:  # noqa: D102
        return resident()

    def peak(self) -> int:  # noqa: D102
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def clean(self) -> None:  # noqa: D102
        gc.collect()

    def tf32(self) -> Any:  # noqa: ANN401, D102
        return nullcontext()

    @contextmanager
    def short_of_memory(self, spare: int, fitting: int) -> Iterator[Callable[[Any], Any]]:  # noqa: ARG002, D102
        def short(work: Callable[[Sequence[Item]], Made]) -> Callable[[Sequence[Item]], Made]:
            def run(items: Sequence[Item]) -> Made:
                if len(items) > fitting:
                    raise torch.OutOfMemoryError("out of memory, imitated")
                return work(items)

            return run

        yield short

    def begin_scale(self, accelerator: Any) -> None:  # noqa: ANN401, D102
        pass

    def overflow(self, accelerator: Any, parameter: torch.nn.Parameter) -> float | None:  # noqa: ANN401, ARG002, D102
        self._hook = parameter.register_hook(lambda gradient: gradient * torch.inf)
        return None

    def end_overflow(self, accelerator: Any) -> None:  # noqa: ANN401, ARG002, D102
        self._hook.remove()

    def compiling(self) -> Any:  # noqa: ANN401, D102
        return torch.compiler.set_stance("force_eager")

    def activities(self) -> list[ProfilerActivity]:  # noqa: D102
        return [ProfilerActivity.CPU]


DEVICES: dict[str, type[Device]] = {"cuda": Cuda, "cpu": Cpu}


def resident() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def lines_of_gpu_alone() -> list[str]:
    """List file, first line and name of the code that a CPU does not run."""
    methods = [each for each in vars(Cuda).values() if inspect.isfunction(each)]
    places = [(inspect.unwrap(each), inspect.getsourcelines(each)) for each in methods]
    return [f"device.py:{first}-{first + len(lines) - 1} Cuda.{each.__name__}" for each, (lines, first) in places]
