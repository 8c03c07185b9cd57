"""The verbs that read results: report, compare, rescore, export, import."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pause_ray.cli.terminal import DEFAULT_STORAGE, AsJson, Sets, StageProgress, StorageRoot, app, err, out, print_json, require
from pause_ray.core.errors import SpecError, UserError
from pause_ray.core.spec import Spec, parse_assignments, read_yaml, with_overrides
from pause_ray.core.storage import Storage
from pause_ray.evaluation.suite import Scorer
from pause_ray.inference.engine import EndpointSpec, EngineSpec, HfEngineSpec, LoadedAs
from pause_ray.models.spec import ModelSpec

if TYPE_CHECKING:
    from pause_ray.evaluation.rescore import Judge

Precision = Literal["float32", "bfloat16", "float16"]


@app.command()
def report(
    name: Annotated[str, typer.Argument(help="Folder of a sweep, or its name under the storage root", show_default=False)],
    log: Annotated[bool, typer.Option("--log", help="Also send the results to MLflow that it does not have.")] = False,
    as_json: AsJson = False,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Write the report of a sweep from its ledgers, finished or not, and export its best trial.

    Example: `pause-ray report quickstart --log`

    Next: open the report in a browser; `pause-ray compare SWEEP:ARM SWEEP:ARM` compares two arms in detail.
    """
    from pause_ray.report.comparison import find_sweep
    from pause_ray.report.html import table, write_report
    from pause_ray.report.ranking import export_best
    from pause_ray.report.results import read_results
    from pause_ray.tracking.runs import log_sweep

    if log:
        require("mlflow")
    root = Storage.open(storage)
    folder = find_sweep(name, root)
    results = read_results(folder, root)
    best = export_best(results, root)
    path = write_report(results)
    logged = log_sweep(results, root) if log else None
    if as_json:
        model = {"model": logged.model} if logged else {}
        print_json({"folder": str(folder), "report": str(path), "best": str(best) if best else None, **model})
        return
    out.print(table(results))
    out.print(f"report: {path}", highlight=False, soft_wrap=True)
    if best:
        out.print(f"best trial: {best}", highlight=False, soft_wrap=True)
    if logged and logged.model:
        out.print(f"in MLflow: {logged.model}", highlight=False, soft_wrap=True)


Arms = Annotated[
    list[str],
    typer.Argument(
        metavar="ARM",
        help="Ledger file, trial folder, folder of ledgers (replicates of an arm), or SWEEP:ARM; the first is the reference.",
        show_default=False,
    ),
]


@app.command()
def compare(arms: Arms, as_json: AsJson = False, storage: StorageRoot = DEFAULT_STORAGE) -> None:
    """Compare arms cell by cell, with intervals and corrected p values. Any ledgers can be compared.

    Examples: `pause-ray compare quickstart:baseline quickstart:pauses_untuned`;
    `pause-ray compare base.jsonl tuned.jsonl`

    Next: `pause-ray rescore` grades the same answers by another rule.
    """
    from pause_ray.report.comparison import compare_ledgers, comparison_json, comparison_view

    compared = compare_ledgers(arms, Storage(Path(storage).expanduser().absolute()))  # not opened: the verb writes nothing
    if as_json:
        print_json(comparison_json(compared))
        return
    out.print(comparison_view(compared, width=out.width))


@app.command()
def rescore(
    ledgers: Arms,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the new ledgers; the old stay as they are.", show_default=False)],
    scorer: Annotated[Scorer | None, typer.Option(help="Rule by which the answers are scored.")] = None,
    judge: Annotated[Path | None, typer.Option(help="YAML file of a judge, such as eval/judges/single.yaml.")] = None,
    set_: Sets = None,
    as_json: AsJson = False,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Score the answers in ledgers again, by another rule (without a model) or by a judge model.

    Examples: `pause-ray rescore quickstart:baseline --scorer exact --out rescored`;
    a judge: `pause-ray rescore quickstart:baseline --judge eval/judges/single.yaml --out judged
    --set engine.kind=endpoint --set engine.url=http://127.0.0.1:8000/v1 --set engine.model=NAME --set engine.api=chat`,
    or a local judge: `--set model.source=FOLDER`

    Next: `pause-ray compare` with the new ledgers.
    """
    from pause_ray.evaluation.rescore import agreement_table, rescore_ledgers
    from pause_ray.report.comparison import find_arm

    if (scorer is None) == (judge is None):
        raise UserError("rescore: needs either --scorer or --judge, for example --scorer exact")
    if scorer is not None and set_:
        raise UserError("--set describes a judge's model, and --scorer needs none; leave it out")
    root = Storage.open(storage)
    paths = [path for name in ledgers for path in find_arm(name, root).ledgers]
    by = _judge(judge, set_, root) if judge else typing.cast(Scorer, scorer)
    with StageProgress() as show:
        rescored = rescore_ledgers(paths, scorer=by, out=out_folder, progress=lambda done, total: show("scoring", done, total))
    if as_json:
        print_json({"ledgers": [{**dataclasses.asdict(made), "source": str(made.source), "ledger": str(made.ledger)} for made in rescored]})
        return
    out.print(agreement_table(rescored))
    costs = [made.judge_cost for made in rescored if made.judge_cost is not None]
    if costs:
        out.print(f"the judge cost {sum(costs):.4f}", highlight=False)
    for made in rescored:
        out.print(f"ledger: {made.ledger}", highlight=False, soft_wrap=True)


class _JudgesModel(Spec):
    """The fields of a judge's model that ``--set`` may change."""

    model: ModelSpec | None = None
    engine: EngineSpec = HfEngineSpec()


def _judge(path: Path, set_: list[str] | None, storage: Storage) -> Judge:
    """Return the judge that a file describes, with the model that ``--set`` names."""
    from pause_ray.evaluation.rescore import Judge, judge_at
    from pause_ray.evaluation.scorers import JudgeSpec
    from pause_ray.models.sources import resolve_model
    from pause_ray.text.tokenizer import ModelTokenizer

    spec = JudgeSpec.parse(read_yaml(path), origin=str(path))
    asked = _JudgesModel.parse(with_overrides({}, parse_assignments(set_ or [])), origin="--set")
    remote = isinstance(asked.engine, EndpointSpec)
    folder = resolve_model(asked.model, cache=storage.cache, weights=not remote) if asked.model else None
    if isinstance(asked.engine, EndpointSpec):
        return judge_at(asked.engine, spec=spec, model_dir=folder)
    if folder is None or asked.model is None:
        raise SpecError(
            "--judge: needs a model; name it with --set model.source=FOLDER_OR_HUB_ID, or a server with --set engine.kind=endpoint …"
        )
    from pause_ray.inference.hf import HfEngine

    with err.status("loading the judge"):
        engine = HfEngine(asked.engine)
        engine.use(LoadedAs(model_dir=folder, dtype=asked.model.dtype, quantize=asked.model.quantize))
    return Judge(spec=spec, engine=engine, model=asked.model.source, tokenizer=ModelTokenizer.load(folder))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint, or its digest under the storage root", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Folder to write the model to; must not exist.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the base model; default: its source in training.")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Precision of the weights; default: the base model's.")] = None,
    as_json: AsJson = False,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Merge an adapter and its pause token into the base model; transformers, vLLM and others can load the result.

    Example: `pause-ray export runs/checkpoints/1c3e52d7a9b04f68 tuned-model`

    Next: `pause-ray eval eval/suites/single.yaml --model tuned-model` scores the merged model.
    """
    from pause_ray.models.checkpoint import Checkpoint

    root = Storage(Path(storage).expanduser().absolute())
    given, target = Path(checkpoint).expanduser(), folder.expanduser().absolute()
    found = Checkpoint.open(given if given.is_dir() else root.checkpoints / checkpoint)

    from pause_ray.models.sources import model_digest, resolve_model
    from pause_ray.text.tokenizer import ModelTokenizer
    from pause_ray.training.export import base_of, check_target, export_model  # torch, seconds

    check_target(target)
    base = ModelSpec.parse({"source": model or base_of(found)}, origin="--model")
    model_dir = resolve_model(base, cache=root.cache)
    found.check_fits(
        base_digest=model_digest(model_dir, cache=root.cache),
        tokenizer_digest=ModelTokenizer.load(model_dir).digest,
        marker=found.marker,
    )
    with StageProgress() as show:
        export_model(
            found,
            model_dir=model_dir,
            folder=target,
            dtype=dtype,
            progress=lambda done, total: show("merging", done, total),
        )
    if as_json:
        print_json({"folder": str(target), "base_digest": found.base_digest, "marker": found.marker.text if found.marker else None})
        return
    trained_on = found.spec.get("train", {}).get("quantize")
    if trained_on:
        out.print(f"note: trained on {trained_on} weights and merged into unquantized ones, so answers may differ from those in training")
    out.print(f"model: {target}", highlight=False, soft_wrap=True)


@app.command("import")
def import_(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RESULTS", help="Folders or files of results, one for each run.", show_default=False)
    ],
    out_file: Annotated[Path, typer.Option("--out", help="Ledger to create or to append to.", show_default=False)],
    arm: Annotated[str | None, typer.Option(help="Name of the arm; default: name of the folder.")] = None,
    task: Annotated[str | None, typer.Option(help="Name of the task; arms are compared by task; default: the tester's name.")] = None,
    model: Annotated[str | None, typer.Option(help="Import only the results of this model.")] = None,
    replicate: Annotated[int, typer.Option(min=0, help="Number of the first run.")] = 0,
    question: Annotated[str, typer.Option(help="The question, if the files do not state it.")] = "",
    reference: Annotated[
        list[str] | None, typer.Option(help="A text that a right answer contains, if the files do not state it. May be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Import results of the original needle-in-a-haystack tester (0.1: folders of JSON; 2: JSONL) into a ledger.

    Example: `pause-ray import results/base_run1 results/base_run2 --out base.jsonl --reference sandwich --reference "Dolores Park"`

    Next: `pause-ray compare base.jsonl tuned.jsonl`
    """
    from pause_ray.evaluation.imported import Naming, import_results

    naming = Naming(arm=arm, task=task, model=model, replicate=replicate, question=question, references=tuple(reference or ()))
    done = import_results(sources, out=out_file, naming=naming)
    if as_json:
        print_json({**dataclasses.asdict(done), "ledger": str(out_file)})
        return
    grid = f"{done.num_lengths} lengths × {done.num_depths} depths, {len(done.replicates)} replicates"
    out.print(f"{done.arm}: {done.num_results} results of {done.model} ({grid}), {done.num_added} new, {done.num_unscored} unscored")
    for note in done.notes:
        out.print(f"note: {note}", highlight=False)
    out.print(f"ledger: {out_file}", highlight=False, soft_wrap=True)
