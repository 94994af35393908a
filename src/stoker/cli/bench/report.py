"""What every benchmark says: percentiles, failures, ratios against something measured in the same run."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Report", "percentile"]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all are not above (nearest rank); NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's outcome. ``seconds`` are the measured times, ``failures`` the runs that gave none, with their reasons."""

    name: str
    seconds: Sequence[float]
    failures: Sequence[str] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "n": len(self.seconds) + len(self.failures),
            "failures": len(self.failures),
            **{f"p{share}_ms": _number(1000 * percentile(self.seconds, share / 100)) for share in (50, 90, 99)},
            "ratios": {name: _number(ratio) for name, ratio in self.ratios.items()},
            **self.more,
            "reasons": sorted(set(self.failures)),
            "host": {"cpus": os.cpu_count(), "kernel": platform.release(), "machine": platform.machine()},
        }

    def print(self, as_json: bool) -> None:
        """One JSON object, or lines for a person."""
        values = self.as_dict()
        if as_json:
            print(json.dumps(values))
            return
        print(f"{self.name}: {values['n']} runs, {values['failures']} failed")
        print("  p50 {p50_ms} ms   p90 {p90_ms} ms   p99 {p99_ms} ms".format_map(values))
        for name, ratio in values["ratios"].items():
            print(f"  {ratio} x {name}")
        for name, value in self.more.items():
            if isinstance(value, Mapping):
                print(f"  {name}: " + ", ".join(f"{key} {item}" for key, item in value.items()))
            else:
                print(f"  {name}: {value}")
        for reason in values["reasons"]:
            print(f"  failed: {reason}")
