"""Documents → packed rows → Parquet shards, as streaming Ray Data graphs over shared storage.

    sources ─read→ pieces of text ─segment→ staged Parquet            (sources, staging)
    row numbers or pieces ─pause, tokenise, pack→ packed Parquet       (packing)
    packed Parquet ─cut by row number→ shards ─→ manifest              (rows)

Through Ray pass file names, counts and, between reading and segmenting, one piece of text at a time; the driver sees counts.
A row depends on its number and the seed, so rows are the same however many tasks and machines make them. Ray is the caller's.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_ray.corpus.facts import shared_with_evaluation
from pause_ray.corpus.graph import run_graph
from pause_ray.corpus.sources import plan_readings, source_identity
from pause_ray.corpus.spec import CorpusSpec
