"""Whether an inflated pair computes what the tiny pair does: both in fp32, on the same text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.errors import BenchmarkError
from benchmarks.inflation.forward import Outputs, Probe, run_pair
from benchmarks.inflation.pair import Pair

TOLERANCE = 1e-3  # of logits, draft logits and confidences, absolute

_TEXTS = (
    "def total(numbers):\n    result = 0\n    for number in numbers:\n        result += number\n"
    "    return result\n\n\ndef mean(numbers):\n    return total(numbers) / len(numbers)\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n"
    "    def push(self, item):\n        self.items.append(item)\n        return self\n",
)


class InflationMismatchError(BenchmarkError, RuntimeError):
    """An inflated pair computes something else than its tiny pair."""


@dataclass(frozen=True)
class Difference:
    """Where one quantity of the two pairs is furthest apart."""

    quantity: str
    largest: float
    place: tuple[int, ...]  # index into the inflated pair's output
    tiny: float
    inflated: float

    @property
    def agrees(self) -> bool:
        """Within `TOLERANCE`; never where one of the two is not a number."""
        return self.largest <= TOLERANCE

    def __str__(self) -> str:
        place = ", ".join(map(str, self.place))
        return (
            f"{self.quantity} by {self.largest:.2e} at [{place}] "
            f"(tiny {self.tiny:.6g}, inflated {self.inflated:.6g})"
        )


def pick_device(name: str) -> torch.device:
    """Where to run: `cpu`, `cuda`, or `auto`, a GPU if there is one.

    Raises:
        ValueError: another name, or `cuda` where torch sees no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}, needed is auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU. Fix: leave it at auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def make_probe(pair: Pair, length: int = 24) -> Probe:
    """Two prompts of `length` tokens, with an early and a late block each.

    Raises:
        ValueError: `length` leaves a block no context or no room, or the texts are too short.
    """
    tokenizer = Tokenizer.from_file(str(pair.target.folder / "tokenizer.json"))
    rows = [tokenizer.encode(text).ids for text in _TEXTS]
    last = length - pair.spec.block_size
    if last < 2 or length > min(map(len, rows)):
        raise ValueError(
            f"length is {length}, needed is {pair.spec.block_size + 2} to {min(map(len, rows))}"
        )
    anchors = [[1, last], [last // 2, last]]
    return Probe(torch.tensor([row[:length] for row in rows]), torch.tensor(anchors))


def compare(tiny: Outputs, inflated: Outputs) -> list[Difference]:
    """The largest difference of logits, draft logits and confidences. Words beyond the tiny
    vocabulary are held against its last, the dead word."""
    last = tiny.logits.shape[-1] - 1
    words = torch.arange(inflated.logits.shape[-1]).clamp(max=last)
    return [
        _difference("logits", tiny.logits[..., words], inflated.logits),
        _difference("draft logits", tiny.draft_logits[..., words], inflated.draft_logits),
        _difference("confidences", tiny.confidences, inflated.confidences),
    ]


def check_pair(tiny: Pair, inflated: Pair, device: torch.device) -> list[Difference]:
    """Run both and compare.

    Raises:
        InflationMismatchError: something differs by more than `TOLERANCE`.
    """
    probe = make_probe(tiny)
    differences = compare(run_pair(tiny, probe, device), run_pair(inflated, probe, device))
    if wrong := [difference for difference in differences if not difference.agrees]:
        raise InflationMismatchError(
            f"{inflated.target.folder} does not compute what {tiny.target.folder} does. Found: "
            f"{'; '.join(map(str, wrong))}. Needed: at most {TOLERANCE}. The folder is kept as it "
            "is; do not measure with it."
        )
    return differences


def as_record(differences: list[Difference]) -> dict[str, Any]:
    """For JSON, by quantity."""
    records = [asdict(difference) for difference in differences]
    return {record.pop("quantity"): record for record in records}


def _difference(quantity: str, tiny: torch.Tensor, inflated: torch.Tensor) -> Difference:
    apart = (tiny - inflated).abs().nan_to_num(nan=torch.inf)
    place = torch.unravel_index(apart.argmax(), apart.shape)
    return Difference(
        quantity,
        float(apart[place]),
        tuple(map(int, place)),
        float(tiny[place]),
        float(inflated[place]),
    )
