"""The whole graph in real Ray tasks: the same rows however they are made, damage repaired, evaluation held apart."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pause_ray.core.errors import SourceError, SpecError, TextError
from pause_ray.core.spec import digest
from pause_ray.core.storage import MANIFEST, Storage
from pause_ray.data.documents import SourceSpec, read_documents
from pause_ray.data.shards import NO_LOSS, PackedRow, ShardSet
from pause_ray.data.spec import CorpusSpec, Evaluation, ShardJob
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import PromptSpec
from pause_ray.text.tokenizer import ModelTokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SPEC = {
    "sources": [{"path": "TALES", "from_percent": 0, "to_percent": 60}],
    "sequence_len": 512,
    "min_context_tokens": 384,
    "num_sequences": 21,
    "rows_per_shard": 8,
    "facts": {
        "facts": [
            {
                "needle": "The key of {room} hangs {place}.",
                "question": "Where is the key of {room}?",
                "slots": {"room": ["the attic", "the cellar"], "place": ["on a nail", "in a box"]},
            }
        ]
    },
}
BRIDGE = "The old bridge sings at night."
PARAGRAPHS = PausePolicy()
PROMPT = PromptSpec(system=None)
Make = Callable[..., "ShardSet"]


@pytest.fixture
def tales(tmp_path: Path) -> Path:
    folder = tmp_path / "tales"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text("\n\n".join(f"Tale {number}, part {part}. It rained. {BRIDGE}" for part in range(9)))
    return folder


@pytest.fixture
def make(tales: Path, tmp_path: Path, byte_model: Path) -> Make:
    """Build a shard set; keyword arguments change the spec, the job, or the storage root."""
    from pause_ray.data import pipeline

    def build(
        *,
        root: str = "runs",
        policy: PausePolicy | None = PARAGRAPHS,
        evaluation: Evaluation | None = None,
        seen: list[tuple[int, int]] | None = None,
        **changes: object,
    ) -> ShardSet:
        data = {**SPEC, **changes}
        data["sources"] = [{**source, "path": source["path"].replace("TALES", str(tales))} for source in data["sources"]]  # type: ignore[attr-defined]
        spec = CorpusSpec.parse(data, origin="test")
        job = ShardJob(
            spec=spec,
            prompt=PROMPT,
            policy=policy,
            model_dir=byte_model,
            tokenizer_digest=ModelTokenizer.load(byte_model).digest,
            seed=5,
            evaluation=evaluation or Evaluation(),
        )
        keep = (seen if seen is not None else []).append
        return pipeline.build_shards(job, storage=Storage.open(tmp_path / root), progress=lambda done, total: keep((done, total)))

    return build


def test_rows_are_made_once_and_found_again(make: Make, tales: Path, byte_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = make(seen=seen)
    assert [entry["rows"] for entry in made.manifest["shards"]] == [8, 8, 5]
    assert seen[0] == (0, 21)
    assert seen[-1] == (21, 21)
    assert seen == sorted(seen)
    documents = read_documents(SourceSpec(path=str(tales), to_percent=60), cache=tales)
    assert made.document_digests() == frozenset(document.digest for document in documents)
    tokenizer = ModelTokenizer.load(byte_model)
    for row in made.rows(range(21)):
        assert 384 <= len(row.input_ids) - len("<PAUSE>") * row.num_pauses <= 512
        assert "The key of the" in tokenizer.decode(row.input_ids[row.labels != NO_LOSS])
        assert row.num_pauses > 0
    stats = made.manifest["stats"]
    assert stats["rows"] == 21
    assert stats["row_tokens"] == sum(len(row.input_ids) for row in made.rows(range(21)))
    assert sum(bin_["rows"] for bin_ in stats["row_tokens_histogram"]) == 21
    assert stats["tokens_per_core_second"] > 0
    before = (made.folder / MANIFEST).stat().st_mtime_ns
    again = make(seen=seen)
    assert (again.folder, (again.folder / MANIFEST).stat().st_mtime_ns) == (made.folder, before)


@pytest.mark.parametrize("objective", ["needle_sft", "language_modeling"])
def test_the_same_rows_whatever_the_number_of_tasks(make: Make, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    from pause_ray.data import pipeline, transforms

    many = make(objective=objective, rows_per_shard=6)
    monkeypatch.setattr(pipeline, "TOKENS_PER_UNIT", 4 * 512)
    monkeypatch.setattr(pipeline, "MAX_BLOCKS", 3)
    monkeypatch.setattr(pipeline, "_tasks_at_once", lambda: 1)
    if objective == "needle_sft":
        monkeypatch.setattr(transforms, "FILES_PER_TASK", 5)
    few = make(objective=objective, rows_per_shard=6, root="other")
    assert many.num_rows == few.num_rows == 21
    assert many.folder.name == few.folder.name
    assert many.manifest["shards"] == few.manifest["shards"]
    assert many.document_digests() == few.document_digests()


def test_language_modeling_reads_documents_end_to_end(make: Make, tales: Path, byte_model: Path) -> None:
    made = make(objective="language_modeling", num_sequences=1000, policy=PausePolicy(token="added"), facts=None)
    tokenizer = ModelTokenizer.load(byte_model)
    tokens = np.concatenate([row.input_ids for row in made.rows(range(made.num_rows))])
    pauses = tokens >= tokenizer.vocab_size
    texts = tokenizer.decode(tokens[~pauses], skip_special_tokens=False).split("<|text_end|>")
    documents = read_documents(SourceSpec(path=str(tales), to_percent=60), cache=tales)
    assert texts == [*(document.text for document in documents), ""]
    for row in made.rows(range(made.num_rows)):
        unlearned = row.input_ids >= tokenizer.vocab_size
        unlearned[row.document_starts] = True
        assert np.array_equal(row.labels == NO_LOSS, unlearned)
        ends = np.flatnonzero(row.input_ids == tokenizer.end_ids[-1]) + 1
        assert row.document_starts.tolist() == [0, *(end for end in ends.tolist() if end < len(row.input_ids))]
    assert made.manifest["stats"]["pauses"] == int(pauses.sum()) == made.manifest["stats"]["paragraphs"]


@pytest.mark.parametrize("objective", ["needle_sft", "language_modeling"])
def test_held_out_rows_share_no_text_and_no_fact_with_training(make: Make, tales: Path, byte_model: Path, objective: str) -> None:
    rooms = {"room": ["the attic", "the cellar", "the barn"], "place": [f"under plank {number}" for number in range(30)]}
    facts = {"facts": [{**SPEC["facts"]["facts"][0], "slots": rooms}]}  # type: ignore[index]
    made = make(objective=objective, num_sequences=12, validation_rows=4, facts=facts, policy=None)
    assert (made.num_rows, made.validation_rows) == (12, 4)
    tokenizer = ModelTokenizer.load(byte_model)
    parts = [made.rows(range(12)), made.rows(range(12, 16))]

    def said(rows: list[PackedRow]) -> tuple[set[str], set[str]]:
        texts = [tokenizer.decode(row.input_ids) for row in rows]
        facts = {tokenizer.decode(row.input_ids[row.labels != NO_LOSS]) for row in rows} if objective == "needle_sft" else set()
        return {tale for text in texts for tale in re.findall(r"Tale \d+, part \d+\. It rained", text)}, facts

    (trained, hidden), (held_out, asked) = (said(rows) for rows in parts)
    whole = "".join(document.text for document in read_documents(SourceSpec(path=str(tales), to_percent=60), cache=tales))
    assert max(whole.index(tale) for tale in trained) < min(whole.index(tale) for tale in held_out)
    assert not hidden & asked
    again = make(objective=objective, num_sequences=12, validation_rows=4, facts=facts, policy=None, root="other")
    assert again.manifest["shards"] == made.manifest["shards"]


def test_a_truncated_shard_is_made_again_and_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    made = make()
    whole = made.paths[1].read_bytes()
    made.paths[1].write_bytes(whole[:100])
    with caplog.at_level(logging.WARNING, logger="pause_ray"):
        again = make()
    assert any("damaged" in message and made.paths[1].name in message for message in caplog.messages)
    assert again.manifest["shards"] == made.manifest["shards"]
    assert again.paths[1].read_bytes() == whole


def test_documents_of_the_evaluation_are_refused_unless_allowed(make: Make, tales: Path, tmp_path: Path) -> None:
    haystack = list(read_documents(SourceSpec(path=str(tales), from_percent=50), cache=tales))
    evaluation = Evaluation(document_digests=frozenset(document.digest for document in haystack))
    with pytest.raises(SpecError, match="of its documents are in the evaluation's haystack"):
        make(evaluation=evaluation)
    assert not any(path.is_dir() for path in (tmp_path / "runs" / "shards").iterdir()), "nothing half-built stays"
    assert make(evaluation=evaluation, allow_evaluation_overlap=True).manifest["overlap"] is True
    with pytest.raises(SpecError, match="of its documents are in the evaluation's haystack"):
        make(evaluation=evaluation)
    assert make().manifest["overlap"] is False


def test_needles_of_the_evaluation_are_refused_in_rows_and_in_facts(make: Make) -> None:
    make()
    with pytest.raises(SpecError, match="rows hold a needle of the evaluation"):
        make(evaluation=Evaluation(needles=(BRIDGE,)))
    assert make(evaluation=Evaluation(needles=("The old bridge sings.",), keywords=("sandwich",))).manifest["overlap"] is False
    with pytest.raises(SpecError, match="keyword 'On a Nail'"):
        make(evaluation=Evaluation(keywords=("On a Nail",)), root="other")


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"sources": [{"path": "TALES/*.csv"}]}, SourceError, r"\*\.csv"),
        ({"sources": [{"path": "TALES"}, {"path": "TALES/03.txt", "to_percent": 0.01}]}, SourceError, r"03\.txt: no document"),
        ({"policy": PausePolicy(marker="rained")}, TextError, "rained"),
        ({"sequence_len": 100_000}, SourceError, "tokens in all"),
        ({"sequence_len": 4096, "validation_rows": 1}, SourceError, "validation_rows need about 20,800 characters"),
        ({"validation_rows": 2}, SpecError, "corpus.facts: too few"),
        ({"sequence_len": 128, "min_context_tokens": 64}, TextError, "corpus row 0.*too short"),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(
    make: Make, tmp_path: Path, changes: dict[str, object], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "runs" / "shards"
    assert not folder.exists() or not any(path.is_dir() for path in folder.iterdir())


def test_identity_is_what_changes_rows_and_nothing_else(tales: Path, byte_model: Path) -> None:
    def identity(
        policy: PausePolicy | None = PARAGRAPHS,
        *,
        seed: int = 0,
        needles: tuple[str, ...] = (),
        prompt: PromptSpec = PROMPT,
        **changes: object,
    ) -> str:
        spec = CorpusSpec.parse({**SPEC, "sources": [{"path": str(tales)}], **changes}, origin="test")
        job = ShardJob(
            spec=spec,
            prompt=prompt,
            policy=policy,
            model_dir=byte_model,
            tokenizer_digest=ModelTokenizer.load(byte_model).digest,
            seed=seed,
            evaluation=Evaluation(needles=needles),
        )
        return digest(job.identity())

    same = [identity(), identity(rows_per_shard=3), identity(allow_evaluation_overlap=True), identity(needles=(BRIDGE,))]
    assert len(set(same)) == 1
    total = PausePolicy(budget="total")
    assert identity(objective="language_modeling") == identity(objective="language_modeling", prompt=PromptSpec(before="Read:"))
    assert identity(objective="language_modeling") != identity(total, objective="language_modeling")
    changed = [
        identity(prompt=PromptSpec(before="Read:")),
        identity(total),
        identity(None),
        identity(PausePolicy(every=2)),
        identity(seed=1),
        identity(num_sequences=22),
        identity(objective="language_modeling"),
    ]
    (tales / "00.txt").write_text("Another tale.")
    changed.append(identity())
    assert len({same[0], *changed}) == 1 + len(changed)
