"""Times of calls that take turns, their quotients, and what a call holds.

Chapter: :doc:`/book/speed`
"""

import functools
import time

import torch
from scipy.stats import quantile_test
from torch.distributed._tools.mem_tracker import MemTracker


def interleaved(calls, rounds=30, warmup=3, device="cpu", clock=time.perf_counter):
    """Seconds that each call takes: all of them in turn, round after round, in a new order each round.

    Args:
        calls: dict: name → function without arguments.
        rounds: how often each is called.
        warmup: how often each is called before that.
        device: where they compute; any but a CPU is waited for.
        clock: gives seconds; `time.process_time` counts only those in which a processor worked for this process.

    Returns:
        dict: name → (rounds,) float64 seconds, in the order of the rounds.
    """
    device = torch.device(device)
    wait = (lambda: None) if device.type == "cpu" else functools.partial(torch.accelerator.synchronize, device)
    names, taken = list(calls), {name: [] for name in calls}
    order = torch.Generator().manual_seed(0)
    for r in range(warmup + rounds):
        for i in torch.randperm(len(names), generator=order).tolist():
            wait()
            begun = clock()
            calls[names[i]]()
            wait()
            if r >= warmup:
                taken[names[i]].append(clock() - begun)
    return {name: torch.tensor(seconds, dtype=torch.float64) for name, seconds in taken.items()}


def times(seconds, of):
    """How many times as fast: the quotients of two calls, round by round.

    Args:
        seconds: (rounds,) of a call.
        of: (rounds,) of the call that it is compared to.

    Returns:
        list: median of `of` / `seconds`, and the lower and upper end of its 95 % interval; None for both where five
        rounds or fewer give none.
    """
    quotients = of / seconds
    median = quotients.quantile(0.5).item()
    interval = quantile_test(quotients.numpy(), p=0.5).confidence_interval(0.95)
    return [median, *(None if end != end else float(end) for end in (interval.low, interval.high))]


def said(ratio):
    """What `times` found, for a table: 1.52 [1.49, 1.55]; 1.52 where there is no interval."""
    median, low, high = ratio
    return f"{median:.2f}" if low is None else f"{median:.2f} [{low:.2f}, {high:.2f}]"


def live(ratio):
    """What `times` found just now, for a Run page: "1.52 [1.49, 1.55]", or "not measurable here".

    The machine that runs a notebook may have other work. So nothing is said where the interval holds 1, is wider than a
    third of the median, or is not there. What the book says of speed comes from committed runs.

    Args:
        ratio: [median, low, high], as `times` gives it.
    """
    median, low, high = ratio
    if low is None or low <= 1 <= high or high - low > median / 3:
        return "not measurable here"
    return said(ratio)


def peak_memory(call, device="cpu"):
    """The most bytes that a call holds at once, beyond what was held before it; of tensors, in eager mode."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with MemTracker() as tracker:
        call()
    peaks = tracker.get_tracker_snapshot("peak")
    return sum(
        held for place, peak in peaks.items() if place.type == device.type
        for kind, held in peak.items() if getattr(kind, "value", "") in ("Activation", "Temp", "Other")
    )  # fmt: skip
