"""A training run on one rank: everything it needs is opened, taken up where it was left, trained with, and closed.

Everything that several ranks must do together happens in the same order on each; what only rank 0 does stands behind
train/outputs.py and `on_rank_0`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.checkpoint.state import load_checkpoint
from lumina_ds.config.elastic import describe_layout
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import PackedRows, Prefetcher
from lumina_ds.data.mixture.rows import MixedRows
from lumina_ds.engine.build import build_engine
from lumina_ds.engine.world import World, on_rank_0
from lumina_ds.monitor.console import TrainingConsole
from lumina_ds.monitor.layouts import LayoutRecord
from lumina_ds.monitor.writers import append_record
from lumina_ds.plan.duration import describe_saves
from lumina_ds.train.evaluation_sets import EvaluationSet
from lumina_ds.train.loop import TrainingLoop
from lumina_ds.train.outputs import Outputs
from lumina_ds.train.resume import changed_settings, checkpoint_to_resume, layout_changes
from lumina_ds.train.run_folder import RunFolder, write_environment
from lumina_ds.train.saves import Saves, check_disk_space
from lumina_ds.train.setting import Setting
from lumina_ds.train.state import RunState
from lumina_ds.train.stop import StopRequest
from lumina_ds.train.watch.long_steps import LongStepStop
from lumina_ds.train.watch.orphans import saving_first
from lumina_ds.train.watch.watchdog import Watchdog


class TrainingRun:
    """One run from its configuration to its last checkpoint."""

    def __init__(
        self, config: RunConfig, rows: PackedRows | MixedRows, eval_sets: Sequence[EvaluationSet], world: World
    ) -> None:
        self.setting = Setting.of(config, rows, eval_sets, world)
        self.folder = RunFolder.of(config)
        self.state = self.setting.fresh_state()
        self.outputs = Outputs(self._console(), leads=world.rank == 0)
        self.long_step_stop: LongStepStop | None = None

    def run(self) -> RunState:
        """Train to the end, to train.stop_at_step, or to a signal; returns where it ended.

        Raises Interrupted after a signal's checkpoint, UnstableError when too many steps are skipped in a row,
        and the typed errors of resuming.
        """
        watched = self.folder.stop_request if self.outputs.leads and self.setting.asked.run.elastic else None
        self.stop = StopRequest(watched)
        try:
            resume_from = self._open_folder()
            setting, world = self.setting, self.setting.world
            with (
                Watchdog(self.folder.logs, world, setting.config.health, self._on_beat) as self.watchdog,
                ExitStack() as opened,
            ):
                fresh = resume_from is None
                self.engine = build_engine(setting.config, world, setting.precision, setting.deepspeed_json, fresh)
                saves = self._open_saves(opened)
                if resume_from is not None:
                    self._restore(resume_from, saves)
                self._open_outputs(resume_from, opened)
                loop = TrainingLoop(
                    *(setting, self.state, self.engine, saves, self.outputs, self.watchdog),
                    *(lambda: self.stop.requested, self.folder),
                )
                self._open_long_step_stop(loop, opened)
                with saving_first(self.stop.launcher_gone), Prefetcher(loop.micro_batches, loop.last_step) as batches:
                    loop.train(batches)
        finally:
            self.stop.restore()
            self.outputs.stop()
            self.folder.release()
        return self.state

    def _console(self) -> TrainingConsole:
        setting = self.setting
        last_step = setting.last_step(self.state)
        return TrainingConsole(setting.length.num_steps, last_step, setting.strategy, setting.world.size)

    def _on_beat(self) -> None:
        """In the watchdog's thread, once a second."""
        self.stop.notice()
        if self.long_step_stop is not None:
            self.long_step_stop.beat()

    def _open_folder(self) -> Path | None:
        """Take the run folder, find the checkpoint to resume from, and write what the run is."""
        setting, checkpoints = self.setting, self.folder.checkpoints
        run, train, world = setting.config.run, setting.config.train, setting.world
        last_step = setting.last_step(self.state)
        resume_from = checkpoint_to_resume(
            *(self.folder, run.resume, setting.identity, world),
            lambda step: check_disk_space(checkpoints, train, setting.checkpoint_bytes, last_step - step),
            setting.rows.names if isinstance(setting.rows, MixedRows) else (),
        )
        if resume_from is not None:
            saved = on_rank_0(world, lambda: read_manifest(resume_from))
            self.setting = setting = setting.going_on(self.state, saved.filled, saved.mixture)
        if world.rank == 0:
            tokenizer = setting.rows.folder.tokenizer_path
            # That of an earlier life; whoever still wants it makes it anew.
            self.folder.stop_request.unlink(missing_ok=True)
            self.folder.write_settings(setting.effective_config, setting.deepspeed_json, tokenizer)
        write_environment(self.folder.path, world, setting.length.num_steps)
        dist.barrier()
        return resume_from

    def _open_saves(self, opened: ExitStack) -> Saves:
        setting = self.setting
        # The run's own copy: the shards may move while it trains.
        tokenizer = self.folder.path / setting.rows.folder.tokenizer_path.name
        saves = Saves(
            *(self.folder.checkpoints, tokenizer, setting.world, setting.config.train),
            *(setting.checkpoint_bytes, self.outputs.say, self.watchdog.enter),
        )
        opened.callback(lambda: saves.close(self.state.step))
        return saves

    def _restore(self, folder: Path, saves: Saves) -> None:
        """Go on from a verified checkpoint in a fresh engine. A collective."""
        saved = load_checkpoint(self.engine, folder)
        self.state.take(saved)
        self.outputs.set_length(self.setting.length.num_steps, self.setting.last_step(self.state))
        saves.step = saved.step
        for change in changed_settings(saved, self.setting.asked):
            self.outputs.say(f"changed since the checkpoint: {change}")
        for change in self.setting.changes_of_mixture:
            self.outputs.say(f"changed from step {saved.step + 1} on: {change}")
        for change in layout_changes(saved, self.setting.identity):
            self.outputs.say(f"the state is divided anew: {change}")

    def _open_outputs(self, resumed_from: Path | None, opened: ExitStack) -> None:
        setting = self.setting
        if resumed_from is None:
            self.outputs.start_anew(self.folder.path)
        self.outputs.open(setting.config.run, setting.effective_config, self.folder.path, self.state.step)
        opened.callback(self.outputs.close)
        self.outputs.say(setting.banner)
        for note in setting.notes_on_length:
            self.outputs.say(note)
        self._tell_layout()
        self.outputs.say(describe_saves(setting.config.train, setting.checkpoint_bytes))
        if losses := setting.rows.describe_losses():
            self.outputs.say(losses)
        if resumed_from is not None:
            self.outputs.say(f"resumed from {resumed_from}")
        self.outputs.show_progress(self.state.step)

    def _tell_layout(self) -> None:
        """Of an elastic run: which of its layouts this life has, on the console and in logs/layouts.jsonl."""
        setting, size = self.setting, self.setting.world.size
        if setting.asked.run.elastic is None:
            return
        self.outputs.say(f"elastic {setting.asked.run.elastic}: {describe_layout(setting.asked, size)}")
        if self.outputs.leads:
            ran = (setting.config.deepspeed.expert_parallel_size, setting.config.train.gradient_accumulation_steps)
            layout = LayoutRecord(self.state.step, time.time(), size, setting.zero_stage, *ran)
            append_record(self.folder.layouts, asdict(layout))

    def _open_long_step_stop(self, loop: TrainingLoop, opened: ExitStack) -> None:
        self.long_step_stop = LongStepStop(
            *(loop.steps.guard, self.setting.world, self.watchdog.life),
            *(lambda: self.stop.waiting_seconds, loop.save_inside_step),
        )
        opened.callback(self.long_step_stop.close)
