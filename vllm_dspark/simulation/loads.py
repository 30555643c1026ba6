"""Loads: a number of requests in flight, or arrivals at a rate, on one GPU or many.

GPUs are independent replicas behind a router that hands each request to the least loaded one. In a
closed loop it gives all of them the same number of requests, so one replica at that number tells of
all. Arrivals at a rate differ from replica to replica by chance: a few are simulated, and their sum
is scaled to the number of GPUs. The more replicas, the steadier their load, so that a fleet does
slightly better than what the few say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from vllm_dspark import checks
from vllm_dspark.simulation.replica import Replica
from vllm_dspark.simulation.workload import Lengths, Request

MAKE_REPLICA = Callable[[int], Replica]  # from a seed
MOST_REPLICAS = 4
WARM_SHARE = 0.25  # of the arrivals, before anything is counted
# More waiting than before counting began, and more unfinished: as shares of what arrived since.
_WAITING_SHARE, _UNFINISHED_SHARE = 0.02, 0.25
_FEW_WAITING = 8  # on each GPU, as chance has it


@dataclass(frozen=True)
class Result:
    """What a load got; figures of one GPU, but for `gpus`. NaN where there was nothing."""

    gpus: int
    requests: int  # that ended
    seconds: float
    tokens_per_second: float
    tokens_per_second_per_user: float  # 1000 / mean ms between tokens of a request
    first_token_ms: float  # mean, from arrival
    accepted_length: float  # tokens emitted per request and step that decodes it
    verified_per_request: float  # drafts per request and step
    drafted_per_request: float
    depth_shares: dict[int, float]  # of steps
    waiting: float = 0.0  # requests without a place when the last one arrived
    running: float = 0.0  # those with one
    keeps_up: bool = True  # False: more and more waited, or were unfinished

    def to_dict(self) -> dict[str, Any]:
        """For JSON; NaN becomes None."""
        plain = asdict(self)
        plain["depth_shares"] = {str(depth): s for depth, s in self.depth_shares.items()}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in plain.items()
        }


def closed_loop(
    make: MAKE_REPLICA, concurrency: int, lengths: Lengths, requests: int, seed: int, gpus: int = 1
) -> Result:
    """A number of requests in flight on every GPU, until all have ended: first all start at once,
    at the end fewer and fewer run.

    Args:
        make: a replica.
        concurrency: requests in flight on a GPU, at least 1.
        lengths: of the requests.
        requests: in all, on each GPU; at least `concurrency`.
        seed: of the lengths; the replica's.
        gpus: at least 1.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """
    concurrency = checks.whole("concurrency", concurrency, least=1)
    requests = checks.whole("requests", requests, least=concurrency)
    replica = make(seed)
    arriving = islice(lengths.draw(np.random.default_rng(seed)), requests)
    for request in islice(arriving, concurrency):
        replica.submit(request)
    ended: list[Request] = []
    while replica.load:
        for request in replica.step():
            ended.append(request)
            following = next(arriving, None)
            if following is not None:
                replica.submit(following)
    return _result([replica], ended, replica.clock, checks.whole("gpus", gpus, least=1))


def poisson(
    make: MAKE_REPLICA, rate: float, lengths: Lengths, requests: int, seed: int, gpus: int = 1
) -> Result:
    """Requests that arrive at random, `rate` a second for each GPU on average.

    Args:
        make: a replica.
        rate: requests per second and GPU, above 0.
        lengths: of the requests.
        requests: arrivals on each GPU that is simulated, at least 8; the first quarter is not
            counted, nor is what happens after the last.
        seed: of arrivals and lengths.
        gpus: at least 1.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """
    checks.positives("rate", [rate], "a number")
    replicas = [make(seed + i) for i in range(min(gpus, MOST_REPLICAS))]
    total = checks.whole("requests", requests, least=8) * len(replicas)
    random = np.random.default_rng(seed)
    gaps = random.exponential(1000 / (rate * len(replicas)), size=total)
    ended: list[Request] = []
    counted_from, before, backlog = 0.0, 0, (0, 0)
    arrivals = zip(np.cumsum(gaps).tolist(), lengths.draw(random), strict=False)
    for i, (now, request) in enumerate(arrivals):
        for replica in replicas:
            ended += _run_until(replica, now)
        if i == int(WARM_SHARE * total):
            ended, counted_from = [], now
            before = sum(replica.totals.emitted for replica in replicas)
            backlog = _backlog(replicas)
        min(replicas, key=lambda replica: replica.load).submit(request)
        request.arrived = now
    emitted = sum(replica.totals.emitted for replica in replicas) - before
    result = _result(replicas, ended, float(gaps.sum()) - counted_from, gpus, emitted)
    waiting, unfinished = _backlog(replicas)
    counted = (1 - WARM_SHARE) * total
    many = max(_WAITING_SHARE * counted, _FEW_WAITING * len(replicas))
    return replace(
        result,
        waiting=waiting / len(replicas),
        running=(unfinished - waiting) / len(replicas),
        keeps_up=waiting - backlog[0] <= many
        and unfinished - backlog[1] <= _UNFINISHED_SHARE * counted,
    )


def _backlog(replicas: Sequence[Replica]) -> tuple[int, int]:
    """Requests that wait for a place, and those and the running ones."""
    return sum(r.waiting for r in replicas), sum(r.load for r in replicas)


def _run_until(replica: Replica, now: float) -> list[Request]:
    """All steps that begin before `now`."""
    ended = []
    while replica.load and replica.clock < now:
        ended += replica.step()
    replica.clock = max(replica.clock, now)
    return ended


def _result(
    replicas: Sequence[Replica],
    ended: Sequence[Request],
    ms: float,
    gpus: int,
    emitted: int | None = None,
) -> Result:
    totals = [replica.totals for replica in replicas]
    steps, rounds = sum(t.steps for t in totals), sum(t.rounds for t in totals)
    if emitted is None:
        emitted = sum(t.emitted for t in totals)
    per_token = [request.per_token_ms for request in ended if request.output > 1]
    first = [request.first - request.arrived for request in ended]
    depths = sorted({depth for t in totals for depth in t.depths})
    return Result(
        gpus=gpus,
        requests=len(ended),
        seconds=ms / 1000,
        tokens_per_second=1000 * emitted / ms / len(replicas),
        tokens_per_second_per_user=1000 / float(np.mean(per_token)) if per_token else math.nan,
        first_token_ms=float(np.mean(first)) if first else math.nan,
        accepted_length=_share(sum(t.emitted - t.firsts for t in totals), rounds),
        verified_per_request=_share(sum(t.verified for t in totals), rounds),
        drafted_per_request=_share(sum(t.drafted for t in totals), rounds),
        depth_shares={d: sum(t.depths[d] for t in totals) / steps for d in depths},
    )


def _share(amount: int, of: int) -> float:
    return amount / of if of else math.nan
