"""The numbers of a running sweep that Prometheus gets through Ray: their names, what they mean, and how they get there.

The driver alone sends them (``heartbeat``), so a node that goes away takes no count with it, and an answer costs an addition in the
broker. The sweep's name is a label of all; trials are none, as there may be a thousand. Knows no trial and no actor.
"""

from __future__ import annotations

from dataclasses import dataclass

STATES = (
    "to_come",
    "waiting",
    "starting",
    "text",
    "training",
    "proxy",
    "paused",
    "queued",
    "scoring",
    "rechecking",
    "done",
    "failed",
    "stopped",
)
"""Of trials: stages as ``progress.TrialState`` has them, and those that have not begun."""


@dataclass(frozen=True)
class Metric:
    """One series, or one for each value of its labels."""

    name: str
    meaning: str
    labels: tuple[str, ...] = ()
    """Beside ``sweep``."""
    counts: bool = False
    """It only rises; Prometheus takes its rate."""

    @property
    def exported(self) -> str:
        """What Ray makes of the name."""
        return f"ray_{self.name}" + ("_total" if self.counts else "")


CELLS = Metric(
    "pause_ray_cells", "Cells answered; asked: for the ledger (grid), again in other shapes (recheck), by a proxy", ("asked",), counts=True
)
UNSCORED_CELLS = Metric("pause_ray_unscored_cells", "Of the answered cells, those that could not be scored", ("asked",), counts=True)
PREFILLED_TOKENS = Metric("pause_ray_prefilled_tokens", "Prompt tokens that went through the model", ("asked",), counts=True)
DECODED_TOKENS = Metric("pause_ray_decoded_tokens", "Tokens of answers", ("asked",), counts=True)
TRAINED_STEPS = Metric("pause_ray_trained_steps", "Optimizer steps, each step of a trial once", counts=True)
TRAINED_TOKENS = Metric("pause_ray_trained_tokens", "Tokens of those steps, without padding", counts=True)
CELLS_LEFT = Metric("pause_ray_cells_left", "Cells that trials to come and running ones have not answered yet")
TRIALS = Metric("pause_ray_trials", "Trials by state", ("state",))
SCORING_ACTORS = Metric("pause_ray_scoring_actors", "Scoring actors: busy, idle, or coming (starting, or without room)", ("state",))
GPUS = Metric("pause_ray_gpus", "GPUs of the cluster as Ray counts them")
GPU_IDLE_SHARE = Metric("pause_ray_gpu_idle_share", "Share of the GPUs, 0 to 1, that nobody holds or whose holder waits")
METRICS = (
    CELLS,
    UNSCORED_CELLS,
    PREFILLED_TOKENS,
    DECODED_TOKENS,
    TRAINED_STEPS,
    TRAINED_TOKENS,
    CELLS_LEFT,
    TRIALS,
    SCORING_ACTORS,
    GPUS,
    GPU_IDLE_SHARE,
)


class Exported:
    """All metrics of one sweep. Ray must be initialised; it sends them on every ten seconds, and when the driver leaves."""

    def __init__(self, sweep: str) -> None:
        """``sweep`` is the label of all of them."""
        from ray.util.metrics import Counter, Gauge

        self._labels = {"sweep": sweep}
        self._series = {
            metric: (Counter if metric.counts else Gauge)(metric.name, metric.meaning, ("sweep", *metric.labels)) for metric in METRICS
        }
        self._counted: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}

    def show(self, metric: Metric, value: float, **labels: str) -> None:
        """What is so now; must be told again at least every twenty seconds, or Ray forgets it."""
        self._series[metric].set(value, tags=self._labels | labels)

    def count(self, metric: Metric, total: float, **labels: str) -> None:
        """Let a counter come up to what has been counted; a total that is less than before was begun anew."""
        key = (metric, tuple(sorted(labels.items())))
        before = self._counted.get(key, 0)
        self._counted[key] = total
        more = total - before if total >= before else total
        if more:
            self._series[metric].inc(more, tags=self._labels | labels)
