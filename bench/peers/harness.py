"""Times GPU work fairly: one process, one CUDA graph each, interleaved rounds, the clock logged.

A *contender* is a list of calls, each on inputs of its own; they are captured into one CUDA graph,
so that weights and inputs rotate past L2. A round replays every contender's graph once, every
second round backwards. Before each sample a short spin keeps the GPU busy while the host queues
the graph, so that a launch is never part of a time.

The SM clock of a sample is clock64 over globaltimer, read on every SM before and after it: at
prefill INT8 kernels make the chip clock down, so a time without its clock says little.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

SPIN_CYCLES = 200_000  # about 0.1 ms: longer than the host needs to queue a graph of 128 nodes


@triton.jit
def _stamp(out):
    """out[sm] = (clock64, globaltimer); several programs may share an SM, the last one stays."""
    pid = tl.program_id(0)
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r,r", [pid], tl.int32, False, 1)
    clock = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l,r", [pid], tl.int64, False, 1)
    time = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,r", [pid], tl.int64, False, 1)
    tl.store(out + 2 * sm, clock)
    tl.store(out + 2 * sm + 1, time)


@triton.jit
def _read(source, sink, blocks, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """A plain read: what the memory gives."""
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for block in range(pid, blocks, PROGRAMS):
        total += tl.load(source + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    if tl.sum(total) == 123456789:  # never, but the compiler cannot know
        tl.store(sink, 1)


def capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls. Everything is called once before, outside of it."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


@dataclasses.dataclass
class Sample:
    """Microseconds of one call: statistics over the rounds."""

    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    rounds: int
    calls_per_round: int
    clock_mhz: float

    @classmethod
    def of(cls, times: list[float], calls: int, clocks: list[float]) -> Sample:
        ordered = sorted(times)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

        return cls(
            median_us=statistics.median(ordered),
            p10_us=at(0.1),
            p90_us=at(0.9),
            min_us=ordered[0],
            rounds=len(ordered),
            calls_per_round=calls,
            clock_mhz=statistics.median(clocks) if clocks else float("nan"),
        )


class Harness:
    """Interleaved rounds over named graphs.

    Args:
        seconds: GPU time that the timed rounds of one problem should take together.
        warmup: seconds of untimed rounds before them.
        min_rounds, max_rounds: limits to the number of timed rounds.
    """

    def __init__(
        self,
        seconds: float = 0.6,
        warmup: float = 0.2,
        min_rounds: int = 15,
        max_rounds: int = 200,
    ) -> None:
        self.seconds, self.warmup = seconds, warmup
        self.min_rounds, self.max_rounds = min_rounds, max_rounds
        properties = torch.cuda.get_device_properties(0)
        self.multiprocessors = properties.multi_processor_count

    def _stamps(self, count: int) -> torch.Tensor:
        return torch.zeros((count, self.multiprocessors, 2), dtype=torch.int64, device="cuda")

    def _mark(self, row: torch.Tensor) -> None:
        _stamp[(4 * self.multiprocessors,)](row, num_warps=1)

    def _clock_mhz(self, before: torch.Tensor, after: torch.Tensor) -> float:
        cycles = (after[:, 0] - before[:, 0]).double()
        nanoseconds = (after[:, 1] - before[:, 1]).double()
        seen = (before[:, 1] > 0) & (after[:, 1] > 0) & (nanoseconds > 0)
        return float((cycles[seen] / nanoseconds[seen]).median()) * 1e3

    def run(self, graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]]) -> dict[str, Sample]:
        """graphs: name -> (graph, calls in it)."""
        names = list(graphs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for name in names:
            graphs[name][0].replay()
        end.record()
        torch.cuda.synchronize()
        begin.record()
        for name in names:
            graphs[name][0].replay()
        end.record()
        torch.cuda.synchronize()
        round_s = max(begin.elapsed_time(end) * 1e-3, 1e-5)
        for _ in range(max(2, min(500, int(self.warmup / round_s)))):
            for name in names:
                graphs[name][0].replay()
        rounds = max(self.min_rounds, min(self.max_rounds, int(self.seconds / round_s)))
        events = {
            name: [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(rounds)
            ]
            for name in names
        }
        stamps = {name: self._stamps(2 * rounds) for name in names}
        for index in range(rounds):
            for name in names if index % 2 == 0 else reversed(names):
                torch.cuda._sleep(SPIN_CYCLES)
                self._mark(stamps[name][2 * index])
                first, last = events[name][index]
                first.record()
                graphs[name][0].replay()
                last.record()
                self._mark(stamps[name][2 * index + 1])
            torch.cuda.synchronize()
        results = {}
        for name in names:
            calls = graphs[name][1]
            times = [1e3 * first.elapsed_time(last) / calls for first, last in events[name]]
            marks = stamps[name].cpu()
            clocks = [
                self._clock_mhz(marks[2 * index], marks[2 * index + 1]) for index in range(rounds)
            ]
            results[name] = Sample.of(times, calls, clocks)
        return results

    def ceilings(self) -> dict[str, float]:
        """Read bandwidth over 1 GiB, and the sustained rate of the best 8192^3 8-bit product."""
        block = 4096
        source = torch.randint(-9, 9, (1 << 28,), dtype=torch.int32, device="cuda")
        sink = torch.zeros(1, dtype=torch.int32, device="cuda")
        blocks = source.numel() // block

        def read(programs: int) -> None:
            _read[(programs,)](source, sink, blocks, block, programs, num_warps=8)

        # How many programs read fastest differs between GPUs. Alone: products cost clock.
        grids = [each * self.multiprocessors for each in (2, 4, 8, 16)]
        readers = {str(n): (capture([functools.partial(read, n)]), 1) for n in grids}
        fastest = min(sample.median_us for sample in self.run(readers).values())
        contenders, size = {}, 8192
        a = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
        b = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda").t()
        contenders["int8"] = capture([lambda: torch._int_mm(a, b)]), 1
        if torch.cuda.get_device_capability() >= (8, 9):
            fa = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn)
            fb = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn).t()
            one = torch.ones((), device="cuda")

            def scaled() -> torch.Tensor:
                return torch._scaled_mm(
                    fa, fb, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
                )

            contenders["fp8"] = capture([scaled]), 1
        results = self.run(contenders)
        rates = {
            f"{name}_ops_per_s": 2.0 * size**3 / (1e-6 * sample.median_us)
            for name, sample in results.items()
        }
        return {
            "read_bytes_per_s": source.numel() * 4 / (1e-6 * fastest),
            **rates,
            "ops_per_s": max(rates.values()),
        }


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| in float64; a NaN stays one."""
    reference = reference.double()
    return float((out.double() - reference).norm() / reference.norm())
