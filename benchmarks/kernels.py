"""Where a step's time goes: a profile's kernels by class, the gaps between them, and the longest by name."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LONGEST = 10
MOST = 4
"""Kernels that are named for each class."""
PAIRS = 5
"""Pairs of kernels that are named for the time in which nothing runs between them."""
WIDTH = 100
"""Characters of a kernel's name that are printed."""

LAYOUT = {"clone", "convolution", "cat", "view", "transpose", "permute", "copy", "slice", "stack", "unsafe"}
"""What generated kernels are named after that only move values, or add a bias on the way."""

COMPILED: tuple[tuple[str, str], ...] = (
    ("8 bits made of inputs (and what is fused)", r"amax|_abs_"),
    ("8-bit products' scales (and what is fused)", r"int_mm|scaled_mm"),
    ("norms (and what is fused)", r"norm|rsqrt|var_mean"),
    ("elementwise, compiled", r""),
)
"""Of the kernels that the compiler made: the first whose pattern is found in the name, whatever its case."""
ENGINES = "Memcpy (PtoP|DtoD|HtoD|DtoH)"
"""Names of copies that need no multiprocessors, or may not."""
BETWEEN = "between ranks (NCCL)"
CLASSES: tuple[tuple[str, str], ...] = (
    (BETWEEN, r"nccl|c10d::|gloo"),
    ("copies", r"memcpy|memset|direct_copy|CatArrayBatchedCopy|aten::(copy_|cat|clone|contiguous)$"),
    ("attention", r"fmha|flash|sdpa|attention|efficient_attn"),
    ("norms", r"(layer|group|rms)_?norm|RowwiseMoments"),
    ("layout of convolutions", r"nchwto|nhwcto|tonchw|tonhwc"),
    ("convolutions", r"conv|fprop|wgrad|dgrad|winograd"),
    ("products, float8", r"(gemm|nvjet|cutlass|cublas).*(e4m3|f8)|nvjet_q|aten::_scaled_mm"),
    ("products, int8", r"imma|gemm.*(s8|i8|int8)|(s8|i8|int8).*gemm|aten::_int_mm"),
    ("products", r"nvjet|gemm|cutlass|gemv|splitk|cublas|triton_tem|aten::(addmm|mm|bmm|linear)$"),
    ("elementwise", r""),
)
"""Of all others."""


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel (or of an operator of a CPU); times in microseconds."""

    name: str
    began: float
    ended: float
    launch: int = 0
    """What launched it: one number for all of a replayed graph; 0 where it is not known."""


@dataclass(frozen=True)
class Gap:
    """Microseconds in which nothing runs, and the kernels at its two ends."""

    took: float
    before: Kernel
    after: Kernel


def class_of(name: str) -> str:
    """What kind of work a kernel does, told by its name."""
    generated = re.match(r"triton_(poi|red|per|split_scan)_fused_(.*?)_?\d*$", name)
    if generated and set(filter(None, generated[2].split("_"))) <= LAYOUT | {"to"}:
        return "layout and biases, compiled"
    classes = COMPILED if generated else CLASSES
    return next(label for label, pattern in classes if re.search(pattern, name, re.IGNORECASE))


def busy(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of them runs."""
    total, until = 0.0, 0.0
    for kernel in sorted(kernels, key=lambda one: one.began):
        total += max(kernel.ended - max(kernel.began, until), 0.0)
        until = max(until, kernel.ended)
    return total


def gaps_between(kernels: Iterable[Kernel]) -> list[Gap]:
    """When nothing runs between the first kernel and the last, in that order."""
    found: list[Gap] = []
    last: Kernel | None = None
    for kernel in sorted(kernels, key=lambda one: one.began):
        if last is not None and kernel.began > last.ended:
            found.append(Gap(kernel.began - last.ended, last, kernel))
        if last is None or kernel.ended > last.ended:
            last = kernel
    return found


def recorded(run: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels of one run, those of replayed CUDA graphs too."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.events() or []
    if not on_gpu:  # operators contain each other
        begun = [(event.name, event.time_range.start, event.self_cpu_time_total) for event in events]
        return [Kernel(name, start, start + own) for name, start, own in begun]
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end, event.id)
        for event in events
        # NCCL's ranges look like kernels, and contain the kernels.
        if event.device_type == DeviceType.CUDA
        and not (event.is_user_annotation or event.name.startswith("nccl:"))
    ]


def table(kernels: list[Kernel], seconds: float, steps: int, gaps: bool = True) -> str:
    """Milliseconds and calls a step by class, and the longest by name.

    Args:
        seconds: what the same work took without a profiler.
        gaps: whether the kernels' times say when nothing runs. An operator's own time on a CPU does not.
    """
    spent: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    names: defaultdict[str, float] = defaultdict(float)
    each: Counter[str] = Counter()
    for kernel in kernels:
        kind, took = class_of(kernel.name), (kernel.ended - kernel.began) / 1e3 / steps
        spent[kind] += took
        calls[kind] += 1
        names[kernel.name] += took
        each[kernel.name] += 1
    compute = busy(kernel for kernel in kernels if class_of(kernel.name) != BETWEEN) / 1e3 / steps
    whole, some = seconds * 1e3 / steps, busy(kernels) / 1e3 / steps
    lines = ["| class | ms a step | calls a step | most of it |", "|---|---|---|---|"]
    for kind in sorted(spent, key=lambda kind: -spent[kind]):
        own = sorted((name for name in names if class_of(name) == kind), key=lambda name: -names[name])
        most = "; ".join(f"{_short(name)} {names[name]:.2f}" for name in own[:MOST])
        lines.append(f"| {kind} | {spent[kind]:.2f} | {calls[kind] / steps:.0f} | {most} |")
    if gaps and BETWEEN in spent:
        lines.append(f"| of that, with nothing else running | {some - compute:.2f} | | |")
    if gaps:
        lines.append(f"| nothing runs | {whole - some:.2f} | | |")
    lines.append(f"| a step | {whole:.2f} | {len(kernels) / steps:.0f} | |")
    lines += ["", "| longest | ms a step | calls a step | us each |", "|---|---|---|---|"]
    for name in sorted(names, key=lambda name: -names[name])[:LONGEST]:
        count, short = each[name], _short(name, WIDTH)
        lines.append(
            f"| {short} | {names[name]:.2f} | {count / steps:.1f} | {names[name] * 1e3 * steps / count:.1f} |"
        )
    lines += ["", *_copies(kernels, steps)]
    if gaps:
        lines += ["", *_idle(kernels, steps, "Nothing runs")]
        computing = [kernel for kernel in kernels if not re.match(ENGINES, kernel.name)]
        if 0 < len(computing) < len(kernels):
            lines += ["", *_idle(computing, steps, "Nothing but copies by copy engines runs")]
    return "\n".join(lines) + "\n"


def _copies(kernels: list[Kernel], steps: int) -> list[str]:
    """Copies by the kernels before and after them, which tell where they come from."""
    ordered = sorted(kernels, key=lambda one: one.began)
    around: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
    for before, copy, after in zip(ordered, ordered[1:], ordered[2:], strict=False):
        if class_of(copy.name) == "copies":
            around[before.name, copy.name, after.name].append(copy.ended - copy.began)
    lines = ["| copy | after | before | calls a step | us each |", "|---|---|---|---|---|"]
    for (first, copied, then), took in sorted(around.items(), key=lambda item: -sum(item[1]))[:LONGEST]:
        names = " | ".join(_short(name) for name in (copied, first, then))
        lines.append(f"| {names} | {len(took) / steps:.1f} | {sum(took) / len(took):.1f} |")
    return lines


def _idle(kernels: list[Kernel], steps: int, what: str) -> list[str]:
    """Where none of these runs: within replayed graphs or around them, and between which of them."""
    of_launch = Counter(kernel.launch for kernel in kernels if kernel.launch)
    graphs = sum(count > 1 for count in of_launch.values())

    def place(gap: Gap) -> str:
        if gap.before.launch and gap.before.launch == gap.after.launch:
            return "within a graph"
        ends = ("a graph" if of_launch[end.launch] > 1 else "a kernel" for end in (gap.before, gap.after))
        return "from {} to {}".format(*ends)

    found = gaps_between(kernels)
    places: defaultdict[str, list[float]] = defaultdict(list)
    pairs: defaultdict[str, list[float]] = defaultdict(list)
    for gap in found:
        where = place(gap)
        places[where].append(gap.took)
        pairs[f"{_short(gap.before.name)} -> {_short(gap.after.name)} ({where})"].append(gap.took)
    span = max(one.ended for one in kernels) - min(one.began for one in kernels)
    lines = [
        f"While profiled a step takes {span / 1e3 / steps:.2f} ms, with {graphs / steps:.1f} graphs and "
        f"{(len(of_launch) - graphs) / steps:.1f} kernels launched one by one. {what}:",
        "",
        "| where | ms a step | times a step | us each |",
        "|---|---|---|---|",
    ]
    most = sorted(pairs, key=lambda pair: -sum(pairs[pair]))[:PAIRS]
    for label, took in [
        ("anywhere", [gap.took for gap in found]),
        *sorted(places.items(), key=lambda item: -sum(item[1])),
        *((pair, pairs[pair]) for pair in most),
    ]:
        whole, times = sum(took), len(took)
        each = whole / times if times else 0.0
        lines.append(f"| {label} | {whole / 1e3 / steps:.3f} | {times / steps:.1f} | {each:.1f} |")
    return lines


def _short(name: str, width: int = 60) -> str:
    """Without what every name of a kind has, and as the cell of a table."""
    return re.sub(r"^(void )?(at::native::)*|\(anonymous namespace\)::", "", name).replace("|", "/")[:width]
