"""Checkpoints: atomic, verified when read, keyed by global names. safetensors and JSON only, no pickle.

    checkpoints/
      latest                     the newest step, as text
      <step>/
        model.safetensors        parameters and buffers by name
        optimizer.safetensors    "<parameter name>.<state>", such as "head.0.weight.exp_avg"
        parts/<name>.safetensors anything else, each part written by the rank that owns it
        state.json               step, hyper-parameters of the optimizer, whatever the caller adds
        manifest.json            length and SHA-256 of every file above, and of itself

A checkpoint is built under a temporary name, flushed to the disk and renamed; then `latest` is replaced; then older
ones are removed. So a save can be killed at any instant, and the old or the new checkpoint loads. Nothing is keyed by
rank: another world size can load it.

`store` writes and reads; `manifest` verifies; `optimizer` converts an optimizer's state to names and tensors. `latest`
is kept for scripts, and to go back to an older checkpoint by hand: a loader follows it and says so where there are
newer ones.
"""

from rkdo_dist.checkpoint.manifest import CheckpointError, Facts
from rkdo_dist.checkpoint.optimizer import OptimizerState, optimizer_to_tensors, tensors_to_optimizer
from rkdo_dist.checkpoint.store import (
    AVERAGE,
    Checkpoint,
    CheckpointWarning,
    Kept,
    begin,
    commit,
    load,
    load_latest,
    model_digest,
    save,
    write_parts,
)

__all__ = [
    "AVERAGE",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "Facts",
    "Kept",
    "OptimizerState",
    "begin",
    "commit",
    "load",
    "load_latest",
    "model_digest",
    "optimizer_to_tensors",
    "save",
    "tensors_to_optimizer",
    "write_parts",
]
