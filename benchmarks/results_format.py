"""The JSON of a sweep: what was asked for, what it ran on, and every run of every arm.

The sweep writes it, the report reads it, and neither keeps figures anywhere else. Rates are in
tokens per second, times in milliseconds unless a name says seconds (`_s`, `seconds`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from benchmarks.records import RecordError, problems, write_whole

FORMAT_VERSION = 1

Kind = Literal["none", "fixed", "built-in adaptive", "ours"]


class Cell(NamedTuple):
    """One run that a sweep has or lacks: its arm's name, and the key of a run."""

    arm: str
    concurrency: int
    temperature: float
    repeat: int


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Spread(_Strict):
    """A time over the requests of one run, in ms."""

    mean: float = Field(ge=0, description="Arithmetic mean, ms.")
    p50: float = Field(ge=0, description="Median, ms.")
    p99: float = Field(ge=0, description="99th percentile, ms.")


class Run(_Strict):
    """One timed pass of one arm at one concurrency and temperature."""

    concurrency: int = Field(ge=1, description="Requests in flight.")
    temperature: float = Field(ge=0, description="Sampling temperature; 0 is greedy.")
    repeat: int = Field(ge=0, description="Number of the repeat, from 0.")
    prompts: int = Field(ge=1, description="Requests sent in all.")
    output_tokens: int = Field(ge=1, description="Tokens emitted for all requests.")
    seconds: float = Field(gt=0, description="Wall time of the pass, s.")
    tokens_per_second: float = Field(gt=0, description="Emitted by all requests together, tok/s.")
    tokens_per_second_per_user: float = Field(
        gt=0, description="What one user sees: 1000 / mean of time_per_output_token_ms, tok/s."
    )
    time_per_output_token_ms: Spread = Field(
        description="Time between tokens of a request after its first, ms."
    )
    time_to_first_token_ms: Spread = Field(description="From sending to the first token, ms.")
    accepted_length: float | None = Field(
        default=None,
        ge=1,
        description="Tokens emitted per round, the target's own included; None: no rounds.",
    )
    verified_per_request: float | None = Field(
        default=None,
        ge=0,
        description="Drafts verified per request and step, steps without drafts included; None: "
        "none drafted.",
    )
    drafted_per_request: float | None = Field(
        default=None, ge=0, description="Drafts per request and step, that is, mean draft depth."
    )
    skipped_per_request: float | None = Field(
        default=None,
        ge=0,
        description="Drafts that were drafted but not verified, per request and step.",
    )
    steps_by_depth: dict[str, float] | None = Field(
        default=None,
        description="Steps by the number of tokens that they drafted per request; None: our "
        "scheduler did not run, or the run is older than this.",
    )
    date: str = Field(description="Day of the run in UTC, YYYY-MM-DD.")


class Arm(_Strict):
    """One configuration of the engine and its runs."""

    options: dict[str, JsonValue] = Field(description="Engine options that define the arm.")
    gamma: int | None = Field(default=None, ge=1, description="Drafts a round; None: no drafter.")
    kind: Kind = Field(description="Who decides how many drafts are verified.")
    startup_s: float | None = Field(
        default=None, ge=0, description="Start of the process to ready, s; None: not measured."
    )
    memory_gib: float | None = Field(
        default=None, ge=0, description="Peak device memory, GiB; None: not measured."
    )
    error: str | None = Field(default=None, description="Why runs are missing; None: none are.")
    provenance: dict[str, JsonValue] = Field(description="What the arm ran on.")
    runs: list[Run] = Field(default_factory=list, description="In the order they were made.")

    @field_validator("runs")
    @classmethod
    def _one_run_per_cell(cls, runs: list[Run]) -> list[Run]:
        seen = set()
        for run in runs:
            if _key(run) in seen:
                raise ValueError(
                    f"two runs at concurrency {run.concurrency}, temperature "
                    f"{run.temperature}, repeat {run.repeat}"
                )
            seen.add(_key(run))
        return runs

    def repeats(self, concurrency: int, temperature: float) -> list[Run]:
        """Runs at one concurrency and temperature, by number of the repeat."""
        found = [
            run
            for run in self.runs
            if (run.concurrency, run.temperature) == (concurrency, temperature)
        ]
        return sorted(found, key=lambda run: run.repeat)

    def values(self, concurrency: int, temperature: float, field: str) -> list[float]:
        """`field` of every repeat that has it. A dot reaches into a spread:
        `"time_per_output_token_ms.p99"`.

        Raises:
            ValueError: no such field, or one that holds no number.
        """
        found = [_number(run, field) for run in self.repeats(concurrency, temperature)]
        return [value for value in found if value is not None]

    def median(self, concurrency: int, temperature: float, field: str) -> float | None:
        """Median of `field` over repeats, in the field's unit; None where there is no value.
        `field` as in `values`."""
        values = self.values(concurrency, temperature, field)
        return statistics.median(values) if values else None

    def relative_spread(self, concurrency: int, temperature: float, field: str) -> float | None:
        """(largest - smallest) / median of `field` over repeats, a fraction. None with fewer
        than two values, which say nothing about spread, or with a median of 0."""
        values = self.values(concurrency, temperature, field)
        if len(values) < 2 or not statistics.median(values):
            return None
        return (max(values) - min(values)) / statistics.median(values)


class SweepSettings(_Strict):
    """What all arms of a sweep share. Files are merged only where these are equal."""

    mode: Literal["online", "offline"] = Field(description="Through the HTTP server, or not.")
    target: str = Field(description="Name of the target; no path of a machine.")
    drafter: str | None = Field(description="Name of the drafter; None: the target's own.")
    dataset: str = Field(description="Name of the prompts.")
    dataset_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the prompts.")
    prompts_per_slot: int = Field(
        ge=1, description="Prompts of a run = this x concurrency, min_prompts at least."
    )
    min_prompts: int = Field(ge=1, description="Least number of prompts of a run.")
    max_tokens: int = Field(ge=1, description="Most tokens emitted for a request.")
    max_model_len: int = Field(ge=1, description="Longest prompt and output together, tokens.")
    max_num_seqs: int = Field(ge=1, description="Most requests in one step of the engine.")
    dtype: str = Field(description="Type of weights and activations.")
    drafting: str = Field(description="draft_sample_method: greedy or probabilistic.")
    seed: int = Field(description="Seed of the engine and the prompts.")
    extra: dict[str, JsonValue] = Field(
        default_factory=dict, description="Settings beyond these, by name."
    )

    @field_validator("target", "drafter", "dataset")
    @classmethod
    def _no_machine_path(cls, name: str | None) -> str | None:
        if name is not None and (name.startswith(("/", "~", ".")) or "\\" in name):
            raise ValueError(f"{name!r} is a path on one machine; give a name")
        return name

    def flat(self) -> dict[str, Any]:
        """All settings by name, those of `extra` too."""
        return self.model_dump(exclude={"extra"}) | self.extra


class Sweep(_Strict):
    """Every arm of one sweep."""

    version: Literal[1] = Field(description="Version of this format.")
    settings: SweepSettings = Field(description="What all arms share.")
    provenance: dict[str, JsonValue] = Field(
        description="What `benchmarks.provenance.provenance` says; key `merged` holds the others "
        "of files merged into this one."
    )
    arms: dict[str, Arm] = Field(default_factory=dict, description="By name, in plotting order.")

    def concurrencies(self, temperature: float | None = None) -> list[int]:
        """Concurrencies of any run, ascending; of one temperature if given."""
        return sorted({r.concurrency for r in self._runs() if temperature in (None, r.temperature)})

    def temperatures(self) -> list[float]:
        """Temperatures of any run, ascending."""
        return sorted({run.temperature for run in self._runs()})

    def _runs(self) -> Iterable[Run]:
        return (run for arm in self.arms.values() for run in arm.runs)

    def missing(
        self,
        arms: Iterable[str],
        concurrencies: Sequence[int],
        temperatures: Sequence[float],
        repeats: int,
    ) -> list[Cell]:
        """Runs that are not there, of repeats 0 to `repeats` - 1, in the order of the arguments:
        arm by arm, then temperature, concurrency, repeat. An unknown arm lacks everything."""
        lacking = []
        for name in arms:
            runs = self.arms[name].runs if name in self.arms else []
            present = {_key(run) for run in runs}
            lacking += [
                Cell(name, concurrency, temperature, repeat)
                for temperature in temperatures
                for concurrency in concurrencies
                for repeat in range(repeats)
                if (concurrency, temperature, repeat) not in present
            ]
        return lacking


def _key(run: Run) -> tuple[int, float, int]:
    return run.concurrency, run.temperature, run.repeat


def _number(run: Run, field: str) -> float | None:
    value: Any = run
    for part in field.split("."):
        if not isinstance(value, BaseModel) or part not in type(value).model_fields:
            raise ValueError(f"a run has no {field!r}; it has {', '.join(Run.model_fields)}")
        value = getattr(value, part)
    if value is None or isinstance(value, (int, float)):
        return value
    raise ValueError(f"{field!r} of a run holds no number")


def load(path: Path) -> Sweep:
    """Read a sweep.

    Raises:
        OSError: the file cannot be read.
        RecordError: it is no sweep of this version; names the file and every wrong key.
    """
    try:
        return Sweep.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RecordError(
            f"{path} is no sweep of version {FORMAT_VERSION}: {problems(error)}. Needed is a file "
            "that benchmarks.sweep wrote. Fix: name another file"
        ) from None


def save(sweep: Sweep, path: Path) -> None:
    """Write a sweep, see `records.write_whole`.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: it was filled with something that `load` would refuse; the old file is kept.
    """
    Sweep.model_validate(sweep.model_dump())
    write_whole(path, sweep.model_dump_json(indent=1) + "\n")
