"""What a run will take of each source of its mixture, told before it starts; `train --dry-run` shows it."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.mixture.forecast import SourceForecast, forecast
from lumina_ds.data.mixture.rows import MixedRows
from lumina_ds.data.shards.folder import ShardFolder
from preprocess.run_data import prepare_run_data
from preprocess.sources import resolve_inputs

# So much is tokenized in seconds, into a folder that goes again.
MAX_TRIED_BYTES = 64 << 20


def forecast_sources(config: RunConfig, readers: int) -> list[SourceForecast] | None:
    """For `readers` data-parallel ranks. None without sources, or where so much has to be tokenized that only the start
    of the run can tell."""
    sources = config.data.sources
    files = [path for source in sources for path in source.paths]
    if not sources or sum(file.size_bytes or 0 for file in resolve_inputs(files)) > MAX_TRIED_BYTES:
        return None
    with tempfile.TemporaryDirectory() as cache:
        data = prepare_run_data(_without_evaluation(config), Path(cache)).config.data
        folders = {each.name: ShardFolder.open(each.shards or "", force_streaming=True) for each in data.sources}
        rows = MixedRows({name: PackedRows(folder, config.seq_length) for name, folder in folders.items()})
        train = config.train
        order = rows.order(data, train.seed, None if train.max_steps is not None else train.epochs)
        rows_per_step = train.micro_batch_size * train.gradient_accumulation_steps * readers
        steps = train.max_steps or math.ceil((order.total_rows or 0) / rows_per_step)
        return forecast(order, min(order.total_rows or steps * rows_per_step, steps * rows_per_step))


def _without_evaluation(config: RunConfig) -> RunConfig:
    changed = config.model_copy(deep=True)
    changed.data.eval_sets, changed.data.eval_data, changed.data.eval_shards = [], [], None
    changed.train.best_by = None
    return changed
