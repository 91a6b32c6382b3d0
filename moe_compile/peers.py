"""Peers' memory of a group (`ops.summed`, `ops.peer_rows`): agreed upon by its ranks when a model is placed, or left to collectives.

torch's symmetric memory of kind "CUDA": pointers into the other cards of one host, without NVSHMEM and without NVLink's multicast.
Left to collectives where a rank has `MOE_COMPILE_PEERS=0`, and, without `MOE_COMPILE_PEERS=1`, among more than two ranks or where memory is
slower than NVLink's.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import agreement
from .ops import summed
from .ops.summed import FLAGS, MESSAGE, MOST, Peers, Sum

T = TypeVar("T")
log = logging.getLogger("moe_compile")
TIMED = 2  # ranks among which this was timed: what is not measured is no default
NVLINK = 8e10  # bytes/s: PCIe 5 has at most 6.4e10
TRIAL = 1 << 24  # bytes from each peer, by which the speed is measured
OFTEN = 0.05  # seconds between two looks for a lost rank: NCCL's watchdog may end the process soon
_met: set[str] = set()  # names of groups whose ranks have met: torch keeps the store of a name's first group


def join(group: Any, device_type: str, memory: int = summed.memory_of(summed.SUMS)) -> bool:
    """Whether what the group exchanges goes through peers' memory; every rank calls this, and all are told the same.

    memory: bytes on each rank, where the group has none yet. Words go through the group's store. What one rank lacks, or what fails on it,
    leaves all of them with collectives.
    """
    talk = agreement.join(group) if device_type == "cuda" else None
    if talk is None:
        return False
    if summed.of_group(group.group_name) is not None:
        return True
    can = talk.round("peers", {"lacks": lacks(group), "host": socket.gethostname()}, talk.timeout)
    why = [word["lacks"] for word in can if word is not None and word["lacks"]]
    if why or None in can or len({word["host"] for word in can if word is not None}) > 1:
        log.info("%s exchanges by collectives: %s", group.group_name, why or "several hosts, or a rank that does not answer")
        return False
    own = _agreed(talk, "peers hold", group, functools.partial(_own, group, memory))
    found = None if own is None else _agreed(talk, "peers met", group, functools.partial(_meet, group, talk.timeout, own))
    if found is None:
        return False
    summed.set_peers(found)
    return True


def _agreed(talk: agreement.Talk, topic: str, group: Any, make: Callable[[], T]) -> T | None:
    """What `make` makes on this rank; None, on all of them, where it raises on one."""
    made, failed = None, ""
    try:
        made = make()
    except Exception as e:  # whatever torch, the driver or the cards object to
        failed = f"{type(e).__name__}: {e}"[:300]
    told = talk.round(topic, {"failed": failed}, talk.timeout)
    if made is None or any(word is None or word["failed"] for word in told):
        log.info("%s exchanges by collectives: %s", group.group_name, [word and word["failed"] for word in told])
        return None
    return made


def lacks(group: Any) -> str:
    """What keeps this process from peers' memory for a group; "" for nothing."""
    wanted = os.environ.get("MOE_COMPILE_PEERS")
    if wanted == "0":
        return "MOE_COMPILE_PEERS=0"
    if wanted != "1" and (told := _no_peer_access()):
        return f"{told} (MOE_COMPILE_PEERS=1 on every rank takes peers' memory nevertheless)"
    if group.size() > (MOST if wanted == "1" else TIMED):
        return f"{group.size()} ranks: more than {TIMED} want MOE_COMPILE_PEERS=1 on every rank, and {MOST} are the most"
    if group.group_name in _met:
        return "the ranks of this group, or of another one of its name, have met before"
    if torch.version.hip or not torch.cuda.is_available():
        return "no CUDA"
    try:
        import torch.distributed._symmetric_memory as symm

        importlib.import_module("moe_compile.lowering.triton.peers")
        kind = symm.get_backend(torch.device("cuda"))
    except Exception as e:  # the other ranks wait for this one's word
        return f"torch {torch.__version__} has no symmetric memory here, or no Triton ({type(e).__name__})"
    return "" if kind in ("CUDA", None) else f"symmetric memory is of kind {kind}"  # None: nobody has chosen, torch does


def _no_peer_access() -> str:
    """What tells NCCL to keep from other cards' memory; "" for nothing. Whoever says so may have cards whose writes to each other do not
    arrive, where ranks that meet would wait for each other until the group's timeout ends them."""
    disabled, level = os.environ.get("NCCL_P2P_DISABLE", "0"), os.environ.get("NCCL_P2P_LEVEL", "")
    if disabled not in ("", "0"):
        return f"NCCL_P2P_DISABLE={disabled}"
    return f"NCCL_P2P_LEVEL={level}" if level in ("0", "LOC") else ""


def _own(group: Any, size: int) -> Tensor:
    """This rank's memory. Raises where there is none: before ranks wait for each other on their cards, where waiting in vain is an error
    that ends a process. What the trial takes besides is left to torch's allocator."""
    import torch.distributed._symmetric_memory as symm

    device = torch.device("cuda", torch.cuda.current_device())
    torch.empty((group.size() + 1) * TRIAL, dtype=torch.uint8, device=device)
    return symm.empty(size, dtype=torch.uint8, device=device)  # type: ignore[no-any-return]


def _meet(group: Any, timeout: float, memory: Tensor) -> Peers:
    """Every rank comes here. Raises where memory cannot be shared, or does not hold what the peers put there."""
    import torch.distributed._symmetric_memory as symm

    from .lowering.triton import peers as kernels

    _met.add(group.group_name)
    size = len(memory)
    handle = symm.rendezvous(memory, group)
    memory[:FLAGS] = 0
    handle.barrier(0, int(timeout * 1000))  # nobody raises a flag before all flags are down
    each = [memory if r == group.rank() else handle.get_buffer(r, [size], torch.uint8) for r in range(group.size())]
    found = Peers(weakref.ref(group), group.group_name, group.rank(), group.size(), each, int(timeout * 1000), kernels)
    wrong, speed = _try(found, memory.device), _speed(found)  # on every rank, whatever is wrong or set on one of them
    if wrong := wrong or slow(speed):
        raise RuntimeError(wrong)
    threading.Thread(target=_watch, args=(weakref.ref(found),), name="moe_compile peers", daemon=True).start()
    return found


def slow(speed: float) -> str:
    """What speaks against memory of so many bytes a second; "" for nothing. Ranks may find another speed each: they choose alike all the
    same (`_agreed`)."""
    if speed >= NVLINK or os.environ.get("MOE_COMPILE_PEERS") == "1":
        return ""
    return f"{speed / 1e9:.0f} GB/s from card to card: no NVLink? (MOE_COMPILE_PEERS=1 on every rank takes it nevertheless)"


def _try(found: Peers, device: torch.device) -> str:
    """What is wrong with an exchange of small numbers; "" for nothing. All calls are made whatever is wrong: the other ranks make them too.

    They are five (a two-shot sum is two), an odd number, and made twice: each is in either half of the memory."""
    size, rank, wrong = found.size, found.rank, []
    ones = torch.full((size, 64), rank + 1.0, device=device)
    every = torch.arange(1.0, size + 1, device=device)
    for _ in range(2):
        for how in (Sum.ONE_SHOT, Sum.TWO_SHOT):
            if not bool((found.sum(ones, how) == every.sum()).all()):
                wrong.append(f"a sum ({how.value})")
        rows, ids, weights, told, even = found.gather(ones, ones[:, 0].int(), ones[0], rank)
        alike = [bool((t.view(size, -1) == every[:, None]).all()) for t in (rows, ids, weights)]
        if not all(alike) or told.tolist() != list(range(size)) or bool(even):
            wrong.append("what is read")
        if not bool((found.scatter(torch.cat([ones] * size)) == every.sum()).all()):
            wrong.append("sums of what is read")
    return f"wrong in peers' memory: {', '.join(dict.fromkeys(wrong))}" if wrong else ""


def _speed(found: Peers) -> float:
    """Bytes a second that come from a peer, the best of a few: whatever the environment says, every rank does this."""
    size = min((found.half - MESSAGE) // found.size, TRIAL) // 16 * 16
    x = torch.empty(size // 4, dtype=torch.int32, device=found.count.device)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # until all of this is launched
        found.say(0)  # the ranks begin together
        start.record()
        found.gather(x, x[:0], x[:0])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return size * (found.size - 1) / min(times)


def _watch(known: weakref.ref[Peers]) -> None:
    """Says who did not come when a kernel has ended for that: the error that CUDA reports names nobody."""
    while (found := known()) is not None and not _told(found):
        del found
        time.sleep(OFTEN)


def _told(found: Peers) -> bool:
    """Whether a rank was lost, which is said once."""
    told = found.missing()
    if told and not found.told:
        found.told = True
        log.error(told)
    return bool(told)


@atexit.register
def _last_word() -> None:
    """Of a process that ends by CUDA's error before the thread looks again."""
    for found in list(summed.known()):
        _told(found)
