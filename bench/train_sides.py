"""One side of ``bench/train.py`` in a process of its own: ``python bench/train_sides.py SIDE CASE.json`` prints one JSON object.

pause_ray   ``fit`` in this process: Ray Train's local mode, DeepSpeed, this project's step
step        this project's step alone, with torch's AdamW on float32 masters: needs neither Ray nor DeepSpeed
trainer     transformers' ``Trainer`` on a PEFT model, as its documentation has it
start       ``fit`` with a Ray Train worker, to the end of the first step
bare_start  the same with nothing but Ray Train, transformers, PEFT and DeepSpeed, as Ray's documentation has it
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pause_ray.data.shards import NO_LOSS, PackedRow, ShardSet
from pause_ray.training.batching import assign_rows, collate, learning_rate, num_loss_tokens, rows_of_step
from pause_ray.training.metrics import peak_memory_bytes
from pause_ray.training.spec import TrainSpec

LOOK_SECONDS = 0.01
"""Between two looks at the training log of ``fit``, so that steps are timed from outside."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What both sides train."""

    train: TrainSpec
    model_dir: Path
    shards: Path
    adapter: Path
    """First values of the adapter, in PEFT's format."""
    seed: int
    threads: int

    @classmethod
    def load(cls, path: Path) -> Case:
        data = json.loads(path.read_text())
        folders = {name: Path(data[name]) for name in ("model_dir", "shards", "adapter")}
        return cls(train=TrainSpec.parse(data["train"], origin=str(path)), seed=data["seed"], threads=data["threads"], **folders)

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def rows(self) -> list[list[list[PackedRow]]]:
        """``rows()[step][pass]``: those of one forward pass, in the order in which ``fit`` takes them."""
        shards, train = ShardSet.open(self.shards), self.train
        steps = []
        for step in range(train.max_steps):
            numbers = rows_of_step(step, num_rows=shards.num_rows, rows_per_step=train.rows_per_step, seed=self.seed)
            lengths = [len(row.input_ids) for row in shards.rows(numbers)]
            [passes] = assign_rows(numbers, lengths=lengths, micro_rows=train.micro_batch_size, groups=1)
            steps.append([shards.rows(chosen) for chosen in passes])
        return steps


@dataclass
class Clock:
    """When steps ended, and what their loss was."""

    started: float
    ends: list[float]
    losses: list[float]

    @classmethod
    def start(cls) -> Clock:
        return cls(time.perf_counter(), [], [])

    def step(self, loss: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() - self.started)
        self.losses.append(loss)

    def result(self, device: str) -> dict[str, Any]:
        return {"ends": self.ends, "losses": self.losses, "peak_memory_bytes": peak_memory_bytes(device)}


def pause_ray(case: Case, *, num_workers: int = 0) -> dict[str, Any]:
    """``fit``; with workers, on a Ray that has been started before the clock."""
    from pause_ray.core import ray_cluster
    from pause_ray.core.storage import Storage
    from pause_ray.training import launch, metrics
    from pause_ray.training.spec import TrainJob

    metrics.POLL_SECONDS = LOOK_SECONDS
    job = TrainJob(
        train=case.train,
        model_dir=case.model_dir,
        base_digest="bench",
        shards=case.shards,
        marker=None,
        policy=None,
        seed=case.seed,
        threads=case.threads,
    )
    with tempfile.TemporaryDirectory() as place, ray_cluster.connection() if num_workers else contextlib.nullcontext():
        clock = Clock.start()
        launch.fit(
            job,
            storage=Storage.open(Path(place)),
            num_workers=num_workers,
            cpus_per_worker=1,
            gpus_per_worker=float(num_workers and torch.cuda.is_available()),
            progress=lambda done, steps, row: clock.step(row["loss"]),
        )
        return clock.result(case.device)


def step(case: Case) -> dict[str, Any]:
    """Model, loss and order of this project in the plainest loop."""
    from pause_ray.training.loss import LossModel, tensors
    from pause_ray.training.model import load_trainable

    torch.set_num_threads(case.threads)
    train = case.train
    clock = Clock.start()
    model = LossModel(load_trainable(train, model_dir=case.model_dir, marker=None, seed=case.seed, device=case.device, stage=0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(masters, lr=train.learning_rate, weight_decay=train.weight_decay)
    for number, passes in enumerate(case.rows()):
        labelled = sum(num_loss_tokens(row) for rows in passes for row in rows)
        total = torch.zeros((), device=case.device)
        for rows in passes:
            loss = model(**tensors(collate(rows), device=case.device)) / labelled
            loss.backward()
            total += loss.detach()
        for master, parameter in zip(masters, trained, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, train.gradient_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(number, train)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(trained, masters)
        clock.step(total.item())
    return clock.result(case.device)


def trainer(case: Case) -> dict[str, Any]:
    """``Trainer`` with PEFT: the same rows in the same order, padded by its collator to the longest of each batch."""
    import peft
    import safetensors.torch
    import transformers

    torch.set_num_threads(case.threads)
    train = case.train
    clock = Clock.start()
    model = peft_model(case)
    peft.set_peft_model_state_dict(model, safetensors.torch.load_file(case.adapter))
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for passes in case.rows() for chosen in passes for row in chosen]
    losses: list[torch.Tensor] = []

    class Timed(transformers.Trainer):  # type: ignore[misc]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            peak = train.learning_rate
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda done: learning_rate(min(done, train.max_steps - 1), train) / peak
            )
            return self.lr_scheduler

        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            losses.append(super().training_step(*arguments, **named))
            return losses[-1]

    class StepEnds(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            clock.step(torch.stack(losses).sum().item())
            losses.clear()

    def padded(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in chosen)
        filling = {"input_ids": 0, "labels": NO_LOSS, "attention_mask": 0}
        columns: dict[str, list[Any]] = {name: [] for name in filling}
        for row in chosen:
            for name, values in {**row, "attention_mask": np.ones(len(row["input_ids"]))}.items():
                columns[name].append(np.pad(values.astype(np.int64), (0, width - len(values)), constant_values=filling[name]))
        return {name: torch.from_numpy(np.stack(values)) for name, values in columns.items()}

    with tempfile.TemporaryDirectory() as place:
        arguments = transformers.TrainingArguments(
            output_dir=place,
            max_steps=train.max_steps,
            per_device_train_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            max_grad_norm=train.gradient_clip,
            bf16=train.precision == "bfloat16",
            fp16=train.precision == "float16",
            gradient_checkpointing=train.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
            train_sampling_strategy="sequential",
            use_cpu=case.device == "cpu",
            dataloader_pin_memory=case.device != "cpu",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=case.seed,
        )
        Timed(model=model, args=arguments, train_dataset=rows, data_collator=padded, callbacks=[StepEnds()]).train()
    return clock.result(case.device)


def peft_model(case: Case) -> Any:
    """The base model with a fresh adapter, by transformers and PEFT alone."""
    import peft
    import transformers

    dtype, train = getattr(torch, case.train.precision), case.train
    quantized = {}
    if train.quantize == "nf4":
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        quantized = {"quantization_config": settings, "device_map": {"": case.device}}
    base = transformers.AutoModelForCausalLM.from_pretrained(case.model_dir, dtype=dtype, **quantized)
    if quantized:
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=train.gradient_checkpointing)
    return peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=train.lora.rank, lora_alpha=train.lora.alpha, lora_dropout=0.0, target_modules="all-linear"
        ),
    )


def start(case: Case) -> dict[str, Any]:
    return pause_ray(case, num_workers=1)


def bare_start(case: Case) -> dict[str, Any]:
    """Ray Train, transformers, PEFT and DeepSpeed without this project: the same model, one row, one step."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from pause_ray.core import ray_cluster

    ids = case.rows()[0][0][0].input_ids.astype(np.int64)[None]

    def train_on_worker(config: dict[str, Any]) -> None:
        import deepspeed

        torch.set_num_threads(case.threads)
        device = ray.train.torch.get_device()
        model = peft_model(case).to(device)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "bf16": {"enabled": case.train.precision == "bfloat16"},
            "zero_optimization": {"stage": 0},
        }
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
        tokens = torch.from_numpy(ids).to(device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        Path(config["done"]).write_text(str(loss.item()))

    with tempfile.TemporaryDirectory() as place, ray_cluster.connection(), _wait_for(Path(place) / "done") as clock:
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        TorchTrainer(
            train_on_worker,
            train_loop_config={"done": str(Path(place) / "done")},
            scaling_config=ray.train.ScalingConfig(num_workers=1, use_gpu=on_gpu),
            run_config=ray.train.RunConfig(name="bare", storage_path=place),
        ).fit()
    return clock.result(case.device)


@contextlib.contextmanager
def _wait_for(path: Path) -> Iterator[Clock]:
    """A clock that sees the first step when its file appears."""
    import threading

    clock, ended = Clock.start(), threading.Event()

    def look() -> None:
        while not path.exists() or not path.read_text():
            if ended.wait(LOOK_SECONDS):
                return
        clock.step(float(path.read_text()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield clock
    finally:
        ended.set()
        thread.join()


SIDES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "pause_ray": pause_ray,
    "step": step,
    "trainer": trainer,
    "start": start,
    "bare_start": bare_start,
}

if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(json.dumps(SIDES[sys.argv[1]](Case.load(Path(sys.argv[2])))))
