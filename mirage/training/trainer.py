"""The training loop: next packs, token weights, forward and backward, check, step, log, checkpoint, callbacks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mirage.config.loader import resolved_json
from mirage.config.schema import Recipe
from mirage.data.collate import PackedBatch, step_weight
from mirage.data.lengths import LengthIndex, index_rows
from mirage.data.pack import PackPlan
from mirage.data.parts import Parts
from mirage.data.row_list import RowList
from mirage.data.sources import load_mixture
from mirage.errors import RunStopped, UserError
from mirage.files import write_atomic
from mirage.models.attention import attention_kernels
from mirage.models.lora import count_parameters
from mirage.models.quantize import check_quantize
from mirage.models.registry import load_adapter
from mirage.training import checkpoint as checkpoints
from mirage.training.callbacks import Callback
from mirage.training.distributed import build_accelerator, end, sum_over_ranks
from mirage.training.export import gather_state, link_untouched_model, save_model
from mirage.training.failures import stop_on_failure, stop_unless_finite
from mirage.training.feed import open_loader, open_pictures
from mirage.training.hangs import name_hung_rank, open_roll_call
from mirage.training.head_loss import choose_kernel
from mirage.training.layers import compile_layers, gather_by_layer
from mirage.training.ledger import NOT_DRAWN, TOO_LONG, UNUSABLE, Ledger
from mirage.training.loss import PackedLossModel
from mirage.training.optim import build_optimizer, set_learning_rates
from mirage.training.optimizer_state import load_optimizer_state
from mirage.training.pack_checks import guard_packs
from mirage.training.profile import open_profiler
from mirage.training.resume import check_same_run, check_shared
from mirage.training.saver import CheckpointSaver
from mirage.training.signals import SignalWatch, Terminated
from mirage.training.throughput import StepMeter, describe_peak
from mirage.training.weights import DTYPES, find_base, load_for_training


class Trainer:
    """One rank of a run. `fit()` does everything; callbacks see the attributes without underscore."""

    def __init__(self, recipe: Recipe, callbacks: Sequence[Callback] = (), *, tracker: Any = None) -> None:
        self.recipe = recipe
        self.run_dir: Path = recipe.run_dir.absolute()
        self.callbacks = list(callbacks)
        self.tracker = tracker
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.is_main = self.rank == 0
        self.step = 0
        self.epoch = 0.0
        self.kernels: dict[str, str] = {}
        self.signals = SignalWatch()
        self.saver = CheckpointSaver(self)
        self._lock = FileLock(self.run_dir / ".lock") if self.is_main else None

    # Set-up

    def setup(self) -> None:
        """Claim the run folder, load data, model and, if there is one, the last checkpoint; start the process group.

        The model is loaded before DeepSpeed exists: within a ZeRO-3 process transformers would shard it as it loads,
        compare empty tensors and tie heads that are not tied.
        """
        check_quantize(self.recipe.model)
        self._claim_run_dir()
        self.rows, self.index = self._load_data()
        self.plan = PackPlan.from_recipe(self.index, self.recipe, world_size=self.world_size)
        self.total_steps = self.plan.num_steps
        self.ledger = Ledger(self.left_out, self.rows, self.index, self.plan)
        if self.is_main:
            self.ledger.write(self.run_dir)
        last = checkpoints.last_resumable(self.run_dir)
        trained = last / "model" if last is not None else None
        self.model, self.peft_model = load_for_training(self.recipe, self.adapter, base=self.base, trained=trained)
        self.num_trained_parameters, self.num_parameters = count_parameters(self.model)
        self._accelerator = build_accelerator(
            self.recipe, world_size=self.world_size, hidden_size=self.model.config.get_text_config().hidden_size
        )
        self.device: torch.device = self._accelerator.device
        self._roll_call = open_roll_call(self.world_size)
        check_shared(self.run_dir, self.recipe, device=self.device)
        self.pictures = open_pictures(self)
        self._build_engine(last)
        self.meter = StepMeter(self)
        self.kernels["matrix products"] = describe_peak(self.meter.peak_flops, self.recipe.train.precision)

    def _claim_run_dir(self) -> None:
        if self._lock is None:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            # `mirage worker` holds it for a moment to see whether a run is going on.
            self._lock.acquire(timeout=2)
        except Timeout as error:
            raise UserError(
                f"another process is training in {self.run_dir}; wait for it or choose another run_dir"
            ) from error
        checkpoints.remove_torn(self.run_dir)
        check_same_run(self.run_dir, self.recipe)
        write_atomic(self.run_dir / "recipe.json", resolved_json(self.recipe) + "\n")

    def _load_data(self) -> tuple[RowList, LengthIndex]:
        """Base model's folder, rows, what is left out, and length index."""
        config = self.recipe.data
        mixture = load_mixture(config, seed=self.recipe.train.seed)
        self.base = find_base(self.recipe)
        trust = self.recipe.model.trust_remote_code
        self.adapter = load_adapter(self.base, preprocessing=self.recipe.preprocessing, trust_remote_code=trust)
        rows, index, too_long = index_rows(
            mixture.rows, self.adapter, config, unusable=mixture.left_out, num_bad=mixture.num_bad
        )
        self.parts = Parts(rows.sources.tolist()) if self.recipe.tracking.loss_by_part else None
        self.left_out = {UNUSABLE: mixture.left_out, TOO_LONG: too_long, NOT_DRAWN: mixture.not_drawn}
        return rows, index

    def _build_engine(self, last: Path | None) -> None:
        train, asked = self.recipe.train, self.recipe.model.attention
        dtype = DTYPES[train.precision]
        self.kernels |= attention_kernels(self.model, asked, device_type=self.device.type, dtype=dtype)
        kernel, why = choose_kernel(train.loss_kernel, device_type=self.device.type)
        self.kernels["loss"] = f"{kernel} ({why})"
        wrapped = PackedLossModel(self.model, kernel=kernel).train()
        if train.deterministic:
            self.kernels["arithmetic"] = "deterministic (an operation without such a kernel stops the run)"
        if train.compile != "off":
            self.kernels["compiled"] = f"{compile_layers(self.model, self.adapter, train)} modules ({train.compile})"
        if train.zero_stage == 3:
            gather_by_layer(self.model)
        optimizer = build_optimizer(wrapped, train, self.adapter, total_steps=self.total_steps)
        self.engine, _ = self._accelerator.prepare(wrapped, optimizer)
        if last is None:
            torch.manual_seed(self.recipe.train.seed * 1009 + self.rank)
            return
        self.step = checkpoints.checkpoint_step(last)
        load_optimizer_state(self.engine, last / "resume", num_steps=self.step, rank=self.rank)

    # The loop

    def fit(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        error: BaseException | None = None
        self.signals.install()
        try:
            self.setup()
            self._call("on_start")
            if self.step == 0 and self.recipe.eval.at_start and self.recipe.eval.mode != "off":
                self._checkpoint_untouched()
            with self.signals.waiting(), name_hung_rank(self, self._roll_call):
                self._train()
            self._call("on_end")
            self._retire()
        except BaseException as raised:
            error = raised
            raise
        finally:
            if isinstance(error, Exception):
                self.saver.wait(until_ready=self.is_main)
            for callback in self.callbacks:
                callback.on_close(self, error)
            if error is None or isinstance(error, RunStopped) or (isinstance(error, Terminated) and error.agreed):
                end(self._accelerator)
            self.signals.restore()
            if self._lock is not None:
                self._lock.release()

    def _train(self) -> None:
        """All steps that are left."""
        self.loader, first_step, profiler = open_loader(self), self.step, open_profiler(self)
        for batches in self.loader:
            if self.step == first_step:
                guard_packs(self, batches)
            with stop_on_failure(self, batches), profiler.step(), self.meter.step(self.loader.wait_seconds):
                metrics = self._train_step(batches)
            self.step += 1
            self.epoch = self.step / self.plan.steps_per_epoch
            if self.step % self.recipe.train.log_every == 0 or self.step == self.total_steps:
                self._call("on_step", metrics | self.meter.metrics(metrics))
            if self.saver.is_written:
                self.saver.finish()
            is_due = self._checkpoint_due()
            if is_due or self.signals.save or self.signals.stop:
                self.save_checkpoint(is_due=is_due)
            if self.signals.stop:
                raise Terminated(agreed=True)

    def _train_step(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """One optimiser step over this rank's micro-batches; gradients do not depend on how the batch is cut."""
        config = self.recipe.train
        total_weight = step_weight(self.index, self.plan.step_samples(self.step).tolist(), config.loss_reduction)
        rates = set_learning_rates(self.engine.optimizer.param_groups, self.step, self.total_steps, config)
        self.micro_losses: list[float] = []
        correct = supervised = tokens = 0.0
        parts = torch.zeros(len(self.parts) if self.parts is not None else 0, 4, dtype=torch.float64)
        for number, batch in enumerate(batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            with self.meter.part("forward"):
                on_device = batch.to(self.device, DTYPES[config.precision])
                loss, num_correct, num_supervised = self.engine(on_device)
            with self.meter.part("backward"):
                # DeepSpeed averages gradients over ranks; the loss is a sum over them.
                self.engine.backward(loss * (self.world_size / total_weight), scale_wrt_gas=False)
            self.micro_losses.append(loss.item())
            correct, supervised = correct + num_correct.item(), supervised + num_supervised.item()
            tokens += len(batch.labels)
            if self.parts is not None:
                parts += self.engine.module.part_sums.cpu()
        sums = [sum(self.micro_losses), correct, supervised, tokens, *self.signals.numbers(), self.saver.number()]
        totals = sum_over_ranks([*sums, *parts.flatten().tolist()], self.device)
        mean_loss = totals[0] / total_weight
        self.signals.agree(totals[4:6])
        self.saver.agree(totals[6])
        stop_unless_finite(self, mean_loss, "loss", batches)
        with self.meter.part("optimizer"):
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        grad_norm = float("nan") if norm is None else float(norm)
        stop_unless_finite(self, grad_norm, "gradient norm", batches)
        return {
            "train/loss": mean_loss,
            "train/token_accuracy": totals[1] / max(1.0, totals[2]),
            **(self.parts.metrics(totals[len(sums) :]) if self.parts is not None else {}),
            **rates,
            "train/grad_norm": grad_norm,
            "train/epoch": (self.step + 1) / self.plan.steps_per_epoch,
            "train/tokens": totals[3],
            "train/supervised_tokens": totals[2],
        }

    # Checkpoints

    def _checkpoint_due(self) -> bool:
        every = self.recipe.checkpoint.every_steps
        if self.step == self.total_steps:
            return True
        if every is not None:
            return self.step % every == 0
        return int(self.step / self.plan.steps_per_epoch) > int((self.step - 1) / self.plan.steps_per_epoch)

    def _checkpoint_untouched(self) -> None:
        """`checkpoint-000000`: the base model under the run's preprocessing, for step 0's evaluation."""
        final = self.run_dir / checkpoints.checkpoint_name(0)
        if self.is_main and checkpoints.read_ready(final) is None:
            aside = self.run_dir / checkpoints.aside_name(0)
            shutil.rmtree(aside, ignore_errors=True)
            link_untouched_model(self.base, aside / "model", self.adapter)
            checkpoints.publish(aside, final, step=0)
        self.barrier()
        self._call("on_checkpoint", final, 0)

    def save_checkpoint(self, *, is_due: bool = True) -> None:
        """Have the current step's checkpoint written while training goes on. All ranks call.

        Where something waits for it, the run's end or an evaluation in the run, it is finished at once.
        """
        self.saver.start(is_due=is_due)
        is_measured = is_due and self.recipe.eval.mode == "inline"
        if is_measured or self.signals.stop or self.step == self.total_steps:
            self.saver.finish()

    def checkpoint_ready(self, folder: Path, step: int, *, is_due: bool) -> None:
        """What follows a checkpoint that was marked READY. All ranks call."""
        if is_due and not self.signals.stop:
            with self.signals.at_once():
                self._call("on_checkpoint", folder, step)
        self._retire()
        self.engine.train()

    def _retire(self) -> None:
        """After each checkpoint, and at the end: a kill may have come in between, and what waited is measured then."""
        if self.is_main:
            checkpoints.retire(self.run_dir, keep_last=self.recipe.checkpoint.keep_last)

    def collect_weights(self) -> Callable[[Path], None]:
        """What writes the model part of a checkpoint, as it is now, into a new folder. A collective.

        The state is copied: training may go on before it is written, and in another thread. The main rank writes.
        """
        state = gather_state(self.engine, is_main=self.is_main, trained_only=self.peft_model is not None)

        def write(folder: Path) -> None:
            if self.is_main:
                save_model(self.model, self.peft_model, self.adapter, folder, state_dict=state, base=self.base)

        return write

    # Small services for callbacks

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def _call(self, moment: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self, *args)
