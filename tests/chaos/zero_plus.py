"""Try hierarchical and quantized ZeRO with four ranks: ``python -m tests.chaos.zero_plus``.

Every engine setting trains the same six steps, all parts or with a frozen encoder, and goes on from step 3 once more.
Prints exit codes, the largest difference of a loss to plain stage 3, and to its own steps when they were done again.
"""

import json
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path

from lcl_ds.data.demo.corpus import build_demo
from lcl_ds.metrics import read_metrics
from tests.support.ranks import Ranks

SETTINGS = {
    "stage 3": {},
    "hpZ over 2 of 4": {"zero_hpz_partition_size": 2},
    "hpZ over all 4": {"zero_hpz_partition_size": 4},
    "qgZ": {"zero_quantized_gradients": True},
    "qwZ": {"zero_quantized_weights": True},
    "MiCS": {"mics_shard_size": 2},
}
TRAINED = {"all parts": [], "frozen encoder": ["train.learning_rate_factors={vision: 0}"]}
SIZES = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
OVERRIDES = [
    "data.demo=null",
    "data.row_tokens=192",
    "data.lanes=4",
    f"model.vision={{model_type: clip_vision_model, intermediate_size: 64, image_size: 32, patch_size: 8, {SIZES}}}",
    "model.pooling.num_attention_heads=2",
    f"model.decoder={{model_type: llama, intermediate_size: 48, num_key_value_heads: 2, {SIZES}}}",
    *("train.global_batch_rows=4", "train.steps=6", "train.warmup_steps=2", "checkpoint.every=3"),
    "evaluation.shards=null",
]


def losses_of(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)] if (run_dir / "metrics.jsonl").exists() else []


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        corpus = base / "corpus"
        build_demo(corpus, documents=160, pairs=16, heldout_documents=4)
        data = [f"data.shards={corpus}/train-documents-*.tar", f"data.tokenizer={corpus}/tokenizer"]
        plain: list[float] = []
        for precision, trained in product(("fp32", "bf16"), TRAINED):
            for name, changes in SETTINGS.items():
                engine = base / "engine.json"
                limits = {"reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 100}
                engine.write_text(json.dumps({"zero_optimization": {"stage": 3, **limits, **changes}}))
                run_dir = base / f"{precision} {trained} {name}"
                command = [sys.executable, "launch/train.py", "--ds_config", str(engine), "--run_dir", str(run_dir)]
                command += [f"precision={precision}", *data, *OVERRIDES, *TRAINED[trained]]
                codes = Ranks(4, command, base / "log").wait(300)
                first = losses_of(run_dir)
                plain = first if name == "stage 3" else plain
                line = f"{precision}, {trained}, {name:16} exit {codes}"
                if first:
                    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
                    again = Ranks(4, command, base / "log").wait(300)
                    beside = max(abs(a - b) for a, b in zip(first, plain, strict=True))
                    repeated = max(abs(a - b) for a, b in zip(first, losses_of(run_dir), strict=True))
                    line += f", off stage 3 by {beside:.2g}; continued: exit {again}, off by {repeated:.2g}"
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
